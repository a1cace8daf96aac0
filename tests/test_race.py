"""The race as pure mathematics: what it plans, whom it drops, when it ends."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.prompts.race import (
    OWN,
    Losses,
    Race,
    Round,
    ask,
    balanced_order,
    cross_entropy,
    errors,
    schedule,
    standings,
    start,
    tell,
)


def one_each(candidates: int, images: int) -> int:
    """An endpoint that takes one image and one prompt per request."""
    return candidates * images


def world(means: list[float], n_images: int, spread: float = 0.3, seed: int = 0) -> Losses:
    """Losses with these means that share the images' difficulty."""
    random = np.random.default_rng(seed)
    difficulty = random.normal(size=n_images) * 3
    return (
        np.array(means)[:, None] + difficulty + random.normal(size=(len(means), n_images)) * spread
    )


def run(race: Race, losses: Losses) -> tuple[Race, list[tuple[int, ...]]]:
    asked = []
    while (question := ask(race)) is not None:
        asked.append(question.candidates)
        race = tell(race, losses[list(question.candidates), : question.last])
    return race, asked


# -- the schedule ----------------------------------------------------------------------------------


def test_a_large_budget_shows_everything_to_everyone() -> None:
    rounds = schedule(8, one_each, 100, 800)
    assert rounds == (Round(8, 13, 104), Round(8, 25, 96), Round(8, 50, 200), Round(8, 100, 400))


def test_a_smaller_one_halves() -> None:
    rounds = schedule(8, one_each, 100, 220)
    assert rounds == (Round(8, 13, 104), Round(4, 25, 48), Round(2, 50, 50))
    rounds = schedule(8, one_each, 100, 240)
    assert rounds == (Round(8, 13, 104), Round(5, 25, 60), Round(3, 50, 75))


def test_a_tiny_one_lets_fewer_in() -> None:
    assert schedule(64, one_each, 1000, 40) == (Round(2, 16, 32),)
    assert schedule(64, one_each, 1000, 31) == ()


def test_where_all_images_cost_as_much_as_one_all_are_shown_at_once() -> None:
    assert schedule(50, lambda k, n: k, 1600, 50) == (Round(50, 1600, 50),)
    assert schedule(50, lambda k, n: k, 1600, 20) == (Round(20, 1600, 20),)


def test_requests_are_filled() -> None:
    rounds = schedule(4, lambda k, n: k * -(-n // 10), 95, 10**6)
    assert [r.images for r in rounds] == [30, 50, 95]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 70),
    st.integers(2, 300),
    st.integers(0, 5000),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(2, 6),
)
def test_no_race_costs_more_than_its_budget_or_ends_in_half_a_round(
    n: int, n_images: int, budget: int, per_request: int, together: int, keep: int
) -> None:
    def cost_of(candidates: int, images: int) -> int:
        return -(-candidates // together) * -(-images // per_request)

    rounds = schedule(n, cost_of, n_images, budget, keep=keep)
    assert sum(r.queries for r in rounds) <= budget
    seen = 0
    for before, r in zip((None, *rounds), rounds, strict=False):
        assert r.queries == cost_of(r.candidates, r.images - seen) > 0
        assert seen < r.images <= n_images
        assert before is None or before.candidates >= r.candidates >= min(keep, before.candidates)
        seen = r.images
    if budget >= cost_of(2, n_images):  # two can see everything
        assert rounds
    if budget >= 4 * cost_of(n, n_images) * 9:  # so can all, in rounds that are not full
        assert rounds[-1].candidates == n
        assert seen == n_images


# -- who stays -------------------------------------------------------------------------------------


def test_the_best_wins_and_the_bad_leave_early() -> None:
    means = [1.0, 0.9, 2.0, 0.2, 1.5, 1.1, 3.0, 0.8]
    race, asked = run(start(schedule(8, one_each, 200, 10**6), 8), world(means, 200))
    assert standings(race)[0].candidate == 3
    assert asked == [tuple(range(8))]
    assert "worse than the leader" in race.reason


def test_common_images_make_small_differences_visible() -> None:
    """The images' difficulty varies ten times as much as the prompts differ."""
    losses = world([0.3, 0.0, 0.3], 16, spread=0.1)
    race, _ = run(start((Round(3, 16, 48), Round(3, 32, 48)), 3), losses)
    assert race.told == 1
    assert standings(race)[0].error > 0.5  # of the loss itself: unpaired, nothing could be said


def test_the_own_prompt_stays_to_the_end_though_it_is_the_worst() -> None:
    means = [5.0, *(0.01 * i for i in range(15))]
    race, asked = run(start(schedule(16, one_each, 256, 1400), 16), world(means, 256))
    assert len(asked) > 2
    assert all(candidates[0] == OWN for candidates in asked)
    assert all(len(c) <= r.candidates for c, r in zip(asked, race.rounds, strict=False))
    assert standings(race)[-1].images < standings(race)[0].images
    assert OWN in race.alive


def test_who_is_within_two_standard_errors_stays_if_there_is_room() -> None:
    means = [0.0, 0.02, 0.03, 2.0]
    rounds = (Round(4, 16, 64), Round(4, 32, 64))
    _, asked = run(start(rounds, 4), world(means, 32, spread=0.5))
    assert asked[1] == (0, 1, 2)


def test_kept_ones_see_everything_though_the_race_is_decided() -> None:
    means = [1.0, 0.0, 2.0, 3.0, 4.0, 5.0]
    race = start(schedule(6, one_each, 64, 10**6, keep=4), 6, keep=4)
    race, asked = run(race, world(means, 64, spread=0.01))
    assert asked == [(0, 1, 2, 3, 4, 5), (0, 1, 2, 3), (0, 1, 2, 3)]
    assert "rounds" in race.reason


def test_it_ends_when_nobody_could_be_better_by_much() -> None:
    losses = np.repeat(world([0.0], 512), 4, axis=0)
    race, _ = run(start(schedule(4, one_each, 512, 10**6), 4), losses)
    assert "no other is likely" in race.reason
    assert 200 <= standings(race)[0].images < 512


def test_a_few_equal_answers_settle_nothing() -> None:
    same = np.zeros((4, 64))
    race = tell(start(schedule(4, one_each, 64, 10**6), 4), same[:, :16])
    assert not race.reason
    assert race.alive == (0, 1, 2, 3)


def test_without_a_round_the_own_prompt_has_won() -> None:
    race = start((), 5)
    assert ask(race) is None
    assert race.alive == (OWN,)
    assert "budget" in race.reason


def test_those_that_did_not_enter_are_not_asked() -> None:
    race = start(schedule(64, one_each, 1000, 40), 64)
    race, asked = run(race, world([0.0] * 64, 16))
    assert asked == [(0, 1)]
    assert sorted(row.candidate for row in standings(race)) == [0, 1]


# -- images and losses -----------------------------------------------------------------------------


def test_every_beginning_is_balanced() -> None:
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(6), [9, 7, 9, 9, 2, 9]))
    order = balanced_order(labels, seed=1)
    assert sorted(order) == list(range(45))
    for size in range(1, 46):
        counts = np.bincount(labels[order[:size]], minlength=6)
        full = counts < np.bincount(labels)
        assert counts.max() - counts[full].min(initial=counts.max()) <= 1
    assert not np.array_equal(order, balanced_order(labels, seed=2))
    np.testing.assert_array_equal(order, balanced_order(labels, seed=1))


def test_cross_entropy_is_calibrated_over_all_and_not_for_each() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 300)
    signal = np.eye(4)[labels] * 2 + random.normal(size=(300, 4))
    vague = np.eye(4)[labels] * 0.5 + random.normal(size=(300, 4))
    logits = np.stack([signal, vague]).astype(np.float32)
    losses = cross_entropy(logits, labels)
    assert losses.shape == (2, 300)
    np.testing.assert_allclose(losses, cross_entropy(logits * 40, labels), rtol=0.02, atol=0.02)
    assert losses[0].mean() < losses[1].mean() < np.log(4) + 0.05


def test_no_label_is_an_error() -> None:
    answers = np.array([[0, 1, NO_LABEL], [1, 1, 2]])
    np.testing.assert_array_equal(errors(answers, np.array([0, 1, 2])), [[0, 0, 1], [1, 0, 0]])


def test_races_beat_an_even_split_of_the_same_queries() -> None:
    """60 prompts, 320 images, 2,000 queries: how far the winner is from the best, on average."""
    raced, even = [], []
    for trial in range(40):
        means = list(np.random.default_rng(trial).normal(scale=0.2, size=60))
        losses = world(means, 320, spread=1.0, seed=1000 + trial)
        race, _ = run(start(schedule(60, one_each, 320, 2000), 60), losses)
        raced.append(means[standings(race)[0].candidate] - min(means))
        even.append(means[losses[:, : 2000 // 60].mean(axis=1).argmin()] - min(means))
    assert np.mean(raced) < 0.8 * np.mean(even)
