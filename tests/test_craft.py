"""The collaborative algorithm on a world small enough to check by hand, and its pure parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from blackbox_vlm.backend import SoftPrompts
from blackbox_vlm.craft import craft
from blackbox_vlm.craft.guard import FoldSearch, Strategy, decide, judge, stratified_folds
from blackbox_vlm.craft.prompts import offsets, prompt_space
from blackbox_vlm.craft.recipes import (
    CRAFT,
    CRAFT_PAPER,
    CRAFT_PAPER_FLOWERS,
    RECIPES,
    recipe_named,
)
from blackbox_vlm.craft.refine import Adam
from blackbox_vlm.craft.state import Finished, Saved, from_bytes, to_bytes
from blackbox_vlm.errors import InputError, StorageError

D, N, C = 6, 30, 3
RECIPE = replace(CRAFT, intrinsic_dimension=D, population_size=8, hidden=8, sigma0=0.5)
LABELS = np.arange(N) % C


def world(candidates: np.ndarray) -> np.ndarray:
    """Logits that grow better as z nears (1, ..., 1): `(n, N, C)`, centred."""
    closeness = -np.square(candidates - 1).mean(1)
    noise = np.random.default_rng(0).standard_normal((N, C))
    right = np.eye(C)[LABELS]
    logits = noise + right * (closeness[:, None, None] * 2 + 1)
    return (logits - logits.mean(-1, keepdims=True)).astype(np.float32)


def search(recipe, generations: int, state=None, seed: int = 0):
    state = state or craft.init(recipe, C, seed)
    while state.generation < generations:
        candidates, state = craft.ask(recipe, seed, state)
        logits = world(candidates)
        state, fitness = craft.tell_prompts(recipe, seed, state, candidates, logits, LABELS)
        state, view = craft.elite_view(state, logits, fitness)
        progress = state.generation / generations
        state = craft.train_refiner(recipe, state, view, LABELS, progress=progress)
    return state


@pytest.mark.parametrize("separable", [True, False])
def test_the_search_finds_the_good_prompts_and_trains_the_refiner(separable: bool) -> None:
    state = search(replace(RECIPE, separable=separable), 60)
    assert np.square(state.search.mean - 1).mean() < 0.1
    mean = world(state.search.mean[None])[0]
    plain_loss = decide({Strategy.ZERO_SHOT: mean}, LABELS).log_loss[Strategy.ZERO_SHOT]
    better = craft.refined(state.refiner.refiner, mean)
    assert decide({Strategy.BOTH: better}, LABELS).log_loss[Strategy.BOTH] < plain_loss


def test_the_search_starts_at_the_template() -> None:
    state = craft.init(RECIPE, C, 0)
    assert not state.search.mean.any()
    elsewhere = craft.init(RECIPE, C, 0, start=np.full(D, 2.0))
    assert (elsewhere.search.mean == 2).all()


def test_the_same_state_asks_the_same_candidates() -> None:
    state = craft.init(RECIPE, C, 3)
    first, _ = craft.ask(RECIPE, 3, state)
    second, _ = craft.ask(RECIPE, 3, state)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (8, D)


def test_the_refiner_changes_the_fitness_through_consistency() -> None:
    """What ties the two modules: without w, a refiner could not influence the search."""
    state = search(RECIPE, 20)
    candidates, state = craft.ask(RECIPE, 0, state)
    logits = world(candidates)

    def fitness(weight: float) -> np.ndarray:
        recipe = replace(RECIPE, consistency_weight=weight)
        return craft.tell_prompts(recipe, 0, state, candidates, logits, LABELS)[1]

    assert (fitness(0.5) > fitness(0.0)).all()


def test_consistency_leaves_the_refiner_after_its_share() -> None:
    recipe = replace(RECIPE, consistency_weight=5.0, consistency_share=0.25)
    state = craft.init(replace(recipe, zero_output=False), C, 0)
    logits = world(np.zeros((1, D)))[0]

    def train(progress: float, weight: float) -> torch.Tensor:
        used = replace(recipe, consistency_weight=weight)
        return craft.train_refiner(used, state, logits, LABELS, progress=progress)[1].refiner[0]

    assert torch.equal(train(0.26, 5.0), train(0.26, 0.0))
    assert not torch.equal(train(0.25, 5.0), train(0.25, 0.0))


def test_an_elite_view_shows_each_image_once_under_good_prompts() -> None:
    state = craft.init(RECIPE, C, 0)
    logits = np.arange(8 * N * C, dtype=np.float32).reshape(8, N, C)
    fitness = np.array([5.0, 1, 7, 0, 6, 2, 4, 3])
    state, view = craft.elite_view(state, logits, fitness)
    assert view.shape == (N, C)
    prompts = {int(np.argwhere((logits[:, i] == view[i]).all(1))[0, 0]) for i in range(N)}
    assert prompts == {3, 1, 5, 7}  # the better half, each drawn for some of the thirty images
    _, other = craft.elite_view(state, logits, fitness)
    assert not np.array_equal(view, other)


@pytest.mark.parametrize("separable", [True, False])
def test_a_saved_run_goes_on_bit_for_bit(separable: bool) -> None:
    recipe = replace(RECIPE, separable=separable)
    whole = search(recipe, 12)
    half = search(recipe, 5)
    finished = [Finished(whole.search.mean, whole.refiner)]
    record = {"stage": "search", "generation": 5, "best": 1.0}
    data = to_bytes(Saved(finished, half, [record]))
    saved = from_bytes(data, [craft.settings(recipe, 9), craft.settings(recipe, 0)])
    assert saved.trajectory == [record]
    np.testing.assert_array_equal(saved.finished[0].mean, whole.search.mean)
    assert saved.finished[0].refiner.steps == whole.refiner.steps
    resumed = search(recipe, 12, state=saved.now)
    np.testing.assert_array_equal(resumed.search.mean, whole.search.mean)
    for ours, theirs in zip(resumed.refiner.refiner, whole.refiner.refiner, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(resumed.random, whole.random)


@pytest.mark.parametrize("data", [b"", b"\0" * 40, b"pickle"])
def test_a_state_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(StorageError, match="checkpoint"):
        from_bytes(data, [craft.settings(RECIPE, 0)])


def test_an_offset_has_the_scale_of_the_models_token_embeddings() -> None:
    soft = SoftPrompts(context_tokens=4, width=192, token_std=0.024)
    space = prompt_space(soft, 512, entry_std=None, seed=0)
    unit = np.random.default_rng(0).standard_normal((50, 512))
    moved = offsets(space, unit)
    assert moved.shape == (50, 4, 192)
    assert moved.dtype == np.float32
    assert moved.std() == pytest.approx(0.024, rel=0.05)
    published = prompt_space(soft, 512, entry_std=0.2, seed=0)
    assert offsets(published, unit).std() == pytest.approx(0.2 * 512**0.5, rel=0.05)
    assert not offsets(space, np.zeros((1, 512))).any()


def test_the_projection_belongs_to_its_seed() -> None:
    soft = SoftPrompts(2, 8, 0.1)
    same = [prompt_space(soft, 16, entry_std=None, seed=s).projection for s in (1, 1, 2)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])


def test_folds_are_stratified() -> None:
    labels = np.repeat(np.arange(5), [8, 8, 7, 3, 1])
    folds = stratified_folds(labels, 2, seed=0)
    for label in range(5):
        counts = np.bincount(folds[labels == label], minlength=2)
        assert abs(counts[0] - counts[1]) <= 1
    np.testing.assert_array_equal(folds, stratified_folds(labels, 2, seed=0))
    one_shot = stratified_folds(np.arange(6), 2, seed=0)
    assert sorted(np.bincount(one_shot)) == [3, 3]


def test_the_guard_takes_the_best_out_of_fold_and_breaks_ties_by_log_loss() -> None:
    labels = np.array([0, 1, 0, 1])
    right = np.eye(2, dtype=np.float32)[labels]
    sharp, soft, wrong = 4 * right, right, -right
    verdict = decide({Strategy.ZERO_SHOT: wrong, Strategy.PROMPT: soft}, labels)
    assert verdict.chosen is Strategy.PROMPT
    assert verdict.accuracy == {Strategy.ZERO_SHOT: 0.0, Strategy.PROMPT: 1.0}
    assert "zero-shot 0.0 %" in verdict.reason
    tie = {Strategy.ZERO_SHOT: soft, Strategy.REFINER: sharp}
    assert decide(tie, labels).chosen is Strategy.REFINER
    assert decide(dict.fromkeys(Strategy, soft), labels).chosen is Strategy.ZERO_SHOT


def test_the_guard_leaves_its_default_only_for_what_is_clearly_better() -> None:
    labels = np.zeros(100, dtype=np.int64)

    def right(count: int) -> np.ndarray:
        return np.where(np.arange(100)[:, None] < count, [[1.0, 0]], [[0, 1.0]]).astype(np.float32)

    default = Strategy.BOTH
    close = {Strategy.ZERO_SHOT: right(51)[::-1], default: right(50)}
    assert decide(close, labels).chosen is Strategy.ZERO_SHOT
    assert decide(close, labels, default).chosen is default
    clear = {Strategy.ZERO_SHOT: right(60), default: right(50)}
    assert decide(clear, labels, default).chosen is Strategy.ZERO_SHOT
    assert decide({default: right(50)}, labels, default).chosen is default


def test_the_guard_refuses_a_refiner_that_only_memorises() -> None:
    """Labels independent of the scores: whatever is learnt cannot help on held-out images."""
    random = np.random.default_rng(0)
    labels = random.integers(0, C, 120)
    plain = np.eye(C, dtype=np.float32)[np.where(random.random(120) < 0.8, labels, 0)] * 6
    plain -= plain.mean(1, keepdims=True)
    folds = stratified_folds(labels, 2, 0)
    members = [np.flatnonzero(folds != f) for f in range(2)]
    memory = plain + 0
    noise = random.standard_normal(plain.shape).astype(np.float32) * 8
    fresh = craft.fresh_refiner(RECIPE, C, 0).refiner
    searches = [FoldSearch(memory + noise, fresh)] * 2
    verdict = judge(replace(RECIPE, fit_epochs=5), 0, labels, plain, members, searches)
    assert verdict.chosen in (Strategy.ZERO_SHOT, Strategy.REFINER)
    assert verdict.accuracy[Strategy.PROMPT] < verdict.accuracy[Strategy.ZERO_SHOT]


def test_a_refit_replaces_the_refiner_of_the_search() -> None:
    """The guard judges what is deployed: a spoilt search refiner matters only without a refit."""
    plain = world(np.ones((1, D)))[0]
    members = [np.arange(0, N, 2), np.arange(1, N, 2)]
    good = craft.fresh_refiner(RECIPE, C, 0).refiner
    spoilt = good._replace(output_bias=torch.tensor([100.0, 0, 0]))
    searches = [FoldSearch(plain, spoilt)] * 2
    kept = judge(replace(RECIPE, refit=False), 0, LABELS, plain, members, searches)
    assert kept.accuracy[Strategy.BOTH] == pytest.approx(1 / C)
    refit = judge(replace(RECIPE, refit=True), 0, LABELS, plain, members, searches)
    assert refit.accuracy[Strategy.BOTH] == refit.accuracy[Strategy.REFINER] > 1 / C


def test_the_guard_judges_the_folds_that_were_searched() -> None:
    plain = world(np.ones((1, D)))[0]
    members = [np.arange(0, N, 2), np.arange(1, N, 2)]
    search = FoldSearch(plain, craft.fresh_refiner(RECIPE, C, 0).refiner)
    verdict = judge(RECIPE, 0, LABELS, plain, members[:1], [search])
    assert np.flatnonzero(verdict.held).tolist() == list(range(1, N, 2))
    right = plain[verdict.held].argmax(1) == LABELS[verdict.held]
    assert verdict.accuracy[Strategy.ZERO_SHOT] == right.mean()
    assert len(verdict.correct) == verdict.n_images == verdict.held.sum()


def test_out_of_fold_predictions_do_not_see_their_own_labels() -> None:
    """Scores that identify every image and no class: a refiner that saw the labels were right."""
    plain = np.random.default_rng(1).standard_normal((N, C)).astype(np.float32)
    labels = np.random.default_rng(2).integers(0, C, N)
    recipe = replace(RECIPE, fit_epochs=2000, hidden=64, adam=Adam(learning_rate=1e-2))
    memory = craft.refined(craft.fit_refiner(recipe, plain, labels, 0), plain)
    assert (memory.argmax(1) == labels).mean() > 0.9
    members = [np.arange(0, N, 2), np.arange(1, N, 2)]
    searches = [FoldSearch(plain, craft.fresh_refiner(recipe, C, 0).refiner)] * 2
    verdict = judge(recipe, 0, labels, plain, members, searches)
    assert verdict.accuracy[Strategy.REFINER] < 0.7


def test_recipes_hold_the_published_settings() -> None:
    """craft_configs/eurosat.yaml and oxford_flowers.yaml of mrflogs/CraFT."""
    for recipe in (CRAFT_PAPER, CRAFT_PAPER_FLOWERS):
        assert (recipe.intrinsic_dimension, recipe.population_size, recipe.bounds) == (512, 40, 5)
        assert not recipe.separable
        assert recipe.adam.learning_rate == 1e-3
        assert recipe.batch_size == 256
    euro, flowers = CRAFT_PAPER, CRAFT_PAPER_FLOWERS
    assert (euro.sigma0, euro.entry_std, euro.consistency_weight) == (0.02, 1, 0.01)
    assert (flowers.sigma0, flowers.entry_std, flowers.consistency_weight) == (1, 0.2, 0.1)
    assert (euro.consistency_share, flowers.consistency_share) == (1, 0.25)
    assert set(RECIPES) == {"craft", "craft-paper", "craft-paper-flowers"}
    with pytest.raises(InputError, match="craft-paper"):
        recipe_named("nope")
