"""The pass over the images, and CraFT's race against what it made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import DIM, Floats, LinearWorld, declare
from numpy.typing import NDArray
from test_tuning import SMALL, StopAfter, files, keys, make_task

from blackbox_vlm.augment import AugmentedImage, augmented
from blackbox_vlm.backend import (
    Access,
    Array,
    ImageEmbeddings,
    Request,
    ScoreKind,
    TextEmbeddings,
    TextScores,
)
from blackbox_vlm.background import background_images
from blackbox_vlm.craft.guard import Verdict
from blackbox_vlm.craft.recipes import CRAFT, RECIPES
from blackbox_vlm.errors import Interrupted
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.local_encoder import DOMINANT
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import ask
from blackbox_vlm.observing import Observed, observe
from blackbox_vlm.plan import Plan
from blackbox_vlm.running import run_sync
from blackbox_vlm.scores import centred, predicted
from blackbox_vlm.search import CraftRun, Searched
from blackbox_vlm.task import Task
from blackbox_vlm.tuning import Options, dry_run, tune


@pytest.fixture(autouse=True)
def _small_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "small", replace(CRAFT, name="small", **SMALL))


def seen_by(
    world: LinearWorld, folder: Path, task: Task, encoder: Any = None, **more: Any
) -> tuple[Observed, Plan]:
    """What a pass over the images brings, and the plan behind it."""
    local = "nano" if encoder is not None else None
    plan = dry_run(task, world.capabilities, Options(8000, local_encoder=local, **more))
    folder.mkdir(exist_ok=True)
    with Ledger(folder / "ledger.sqlite", 8000) as ledger:
        meter = Meter(world, ledger)
        return run_sync(observe(meter, task, plan, 0, encoder)), plan


def class_logits(world: LinearWorld, task: Task) -> Array:
    """The endpoint's own logits, asked directly."""
    return centred(world.logits(TextScores(task.images, task.classes.texts)).astype(np.float32))


class Encoder:
    """Vectors of a local model: drawn by the picture's hash."""

    identity = "local"

    def __init__(self) -> None:
        self.shown: list[Image] = []

    async def vectors(self, pictures: Sequence[Image]) -> NDArray[np.float32]:
        self.shown += pictures
        world = LinearWorld(declare(Access.EMBEDDINGS))
        return world.values(ImageEmbeddings(tuple(pictures)))


# -- the pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("access", [Access.EMBEDDINGS, Access.SCORES])
def test_views_follow_the_images_that_they_show(tmp_path: Path, access: Access) -> None:
    world, task = LinearWorld(declare(access, images_per_request=4)), make_task(3, 2)
    seen, plan = seen_by(world, tmp_path, task)
    assert plan.views == 2
    np.testing.assert_array_equal(seen.owners, [*range(6)] * 3)
    answers = seen.observation.answers
    for row, owner in enumerate(seen.owners):
        shown = task.images[owner]
        shown = augmented(shown, row // 6 - 1) if row >= 6 else shown
        if access is Access.EMBEDDINGS:
            wanted = world.values(ImageEmbeddings((shown,)))
        else:
            assert seen.question.lists
            wanted = centred(world.values(TextScores((shown,), seen.question.lists[0])))
        np.testing.assert_allclose(answers[[row]], wanted, atol=1e-5)
    assert seen.plain.shape == (6, 3)  # of the images alone


@pytest.mark.parametrize(
    ("access", "limits"),
    [
        (Access.EMBEDDINGS, {"images_per_request": 1}),
        (Access.SCORES, {}),
        (Access.SCORES, {"texts_per_request": 4}),  # with texts that are pruned
        (Access.SCORES, {"score_kind": ScoreKind.COSINE}),
        (Access.SOFT, {}),
    ],
)
@pytest.mark.parametrize("student", [False, True])
def test_the_endpoints_own_prediction_is_read_off_the_same_answers(
    tmp_path: Path, access: Access, limits: dict[str, Any], student: bool
) -> None:
    world, task = LinearWorld(declare(access, **limits)), make_task(3, 4)
    seen, _ = seen_by(world, tmp_path, task, Encoder() if student else None)
    np.testing.assert_allclose(seen.plain, class_logits(world, task), atol=1e-3)


def test_a_label_endpoints_own_prediction_is_its_label(tmp_path: Path) -> None:
    world, task = LinearWorld(declare(Access.LABEL)), make_task(3, 4)
    seen, _ = seen_by(world, tmp_path, task)
    np.testing.assert_array_equal(predicted(seen.plain), class_logits(world, task).argmax(axis=1))


def test_pruned_texts_are_not_asked_for_again(tmp_path: Path) -> None:
    world, task = LinearWorld(declare(texts_per_request=5)), make_task(3, 4)
    seen, plan = seen_by(world, tmp_path, task)
    assert plan.question is not None
    assert seen.pruned is not None
    [asked], [kept] = plan.question.lists, seen.question.lists
    assert len(kept) == seen.n_answers == plan.prune_to == 5 < len(asked)
    assert kept[:3] == task.classes.texts
    assert set(kept) < set(asked)
    direct = centred(world.values(TextScores(task.images, asked)))
    columns = [asked.index(text) for text in kept]
    wanted = centred(direct[:, columns])
    np.testing.assert_allclose(seen.observation.answers, wanted, atol=1e-4)


def test_the_drawings_are_asked_once_and_are_nobodys_answers(tmp_path: Path) -> None:
    world, task = LinearWorld(declare()), make_task(3, 4)
    seen, plan = seen_by(world, tmp_path, task)
    assert plan.background
    assert seen.metric is not None
    assert len(seen.observation.answers) == len(task) == len(seen.owners)
    shown = [
        request for request in world.requests if set(request.images) & set(background_images())
    ]
    assert len(shown) == 1
    assert shown[0].images == background_images()
    plain, _ = seen_by(LinearWorld(declare()), tmp_path / "..", task, method="refine")
    assert plain.metric is None


def test_a_students_vectors_follow_the_answers(tmp_path: Path) -> None:
    world, task, encoder = LinearWorld(declare()), make_task(3, 2), Encoder()
    seen, _ = seen_by(world, tmp_path, task, encoder)
    assert seen.n_answers == 3
    answers, vectors = seen.observation.answers[:, :3], seen.observation.answers[:, 3:]
    assert encoder.shown[:6] == list(task.images)
    assert [view.path for view in encoder.shown[6:]] == [
        picture.path for picture in task.images
    ] * 2
    fresh = run_sync(Encoder().vectors(encoder.shown))
    np.testing.assert_allclose(vectors, DOMINANT * fresh, rtol=1e-5)
    np.testing.assert_allclose(answers[:6], class_logits(world, task), atol=1e-3)
    assert not seen.readout[3:].any()
    assert not seen.observation.readout[3:].any()


def test_answers_that_vary_are_measured_with_one_query(tmp_path: Path) -> None:
    class Noisy(LinearWorld):
        def values(self, request: Request) -> Array:
            return super().values(request) + np.float32(0.25 * self.asked)

    certain, _ = seen_by(LinearWorld(declare()), tmp_path / "certain", make_task(), method="refine")
    assert certain.noise is None
    world = Noisy(declare(deterministic=False, images_per_request=9))
    seen, _ = seen_by(world, tmp_path / "noisy", make_task(), method="refine")
    assert len(world.requests) == 3  # two for 18 images, one again
    assert seen.noise == pytest.approx(0.5, abs=1e-5)


class Rigged(LinearWorld):
    """Texts of one template point to where the pictures of their class are."""

    def __init__(self, task: Task, template: str) -> None:
        super().__init__(declare(Access.EMBEDDINGS, images_per_request=1))
        assert task.labels is not None
        self._means = {}
        vectors = self.see(task.images)
        for label, name in enumerate(task.class_names):
            mean = vectors[task.labels == label].mean(axis=0)
            self._means[template.replace("{}", name)] = mean / np.linalg.norm(mean)

    def values(self, request: Request) -> Array:
        values = super().values(request)
        if isinstance(request, TextEmbeddings):
            for row, text in enumerate(request.texts):
                if text in self._means:
                    values[row] = self._means[text]
        return values


def test_the_heads_start_from_a_better_template_and_zero_shot_stays_the_own(
    tmp_path: Path,
) -> None:
    task = make_task(3, 6)
    plan = dry_run(task, declare(Access.EMBEDDINGS, images_per_request=1), Options(8000))
    better = plan.templates[3]
    world = Rigged(task, better)
    seen, _ = seen_by(world, tmp_path, task)
    own = accuracy(seen.plain, task)
    prior = accuracy(seen.observation.zero_shot, task)
    assert prior > own + 0.2
    assert own == accuracy(class_logits(LinearWorld(world.capabilities), task), task)


def accuracy(logits: Array, task: Task) -> float:
    assert task.labels is not None
    return float((predicted(logits) == task.labels).mean())


# -- CraFT against a rival -------------------------------------------------------------------------


BUDGET = 150


def soft() -> LinearWorld:
    return LinearWorld(declare(Access.SOFT, idempotent=True, requests_per_batch=64))


def craft_against(
    folder: Path, rival: Array | None, world: LinearWorld | None = None
) -> tuple[Searched | Verdict, dict[str, int]]:
    """CraFT's search beside out-of-fold logits of something else, and what it spent."""
    task, world = make_task(), world or soft()
    recipe = RECIPES["small"]
    plan = dry_run(task, world.capabilities, Options(BUDGET, recipe="small", method="craft"))
    plain = class_logits(world, task)
    folder.mkdir(exist_ok=True)
    with Ledger(folder / "ledger.sqlite", BUDGET) as ledger:
        run = CraftRun(task, plan, recipe, 0, Meter(world, ledger), ledger, lambda progress: None)
        return run_sync(run.run(plain, rival)), ledger.by_purpose()


def one_hot(right: NDArray[np.bool_]) -> Array:
    """Logits of three classes that are right for some of the images."""
    labels = make_task().labels
    assert labels is not None
    shown = np.where(right, labels, (labels + 1) % 3)
    return np.eye(3, dtype=np.float32)[shown]


def test_a_rival_that_is_clearly_better_stops_the_search_after_one_fold(tmp_path: Path) -> None:
    verdict, spent = craft_against(tmp_path, one_hot(np.ones(18, dtype=bool)))
    assert isinstance(verdict, Verdict)
    assert set(spent) == {"search fold 1", "guard"}
    assert spent["guard"] == 1
    assert verdict.n_images == verdict.held.sum() == 9


def test_a_rival_that_is_not_better_lets_the_search_go_on(tmp_path: Path) -> None:
    alone, spent_alone = craft_against(tmp_path / "alone", None)
    searched, spent = craft_against(tmp_path / "rival", one_hot(np.zeros(18, dtype=bool)))
    assert isinstance(searched, Searched)
    assert isinstance(alone, Searched)
    assert spent == spent_alone
    assert {"search fold 1", "search fold 2", "search", "guard", "deploy"} == set(spent)
    assert searched.offset is not None
    np.testing.assert_array_equal(searched.offset, alone.offset)


def correct_out_of_fold(folder: Path) -> NDArray[np.bool_]:
    """Which images CraFT gets right out-of-fold."""
    alone, _ = craft_against(folder, None)
    assert isinstance(alone, Searched)
    assert alone.verdict is not None
    assert alone.verdict.held.all()
    return alone.verdict.correct


def test_a_rival_that_is_as_good_wins_after_the_last_fold_because_it_costs_nothing(
    tmp_path: Path,
) -> None:
    correct = correct_out_of_fold(tmp_path / "alone")
    verdict, spent = craft_against(tmp_path / "equal", one_hot(correct))
    assert isinstance(verdict, Verdict)
    assert set(spent) == {"search fold 1", "search fold 2", "guard"}
    worse = correct.copy()
    worse[np.flatnonzero(correct)[0]] = False
    searched, spent = craft_against(tmp_path / "worse", one_hot(worse))
    assert isinstance(searched, Searched)
    assert "search" in spent


class Clustered(LinearWorld):
    """Pictures of a class lie together, and no text knows where: heads see it, prompts do not."""

    def __init__(self, task: Task) -> None:
        super().__init__(soft().capabilities)
        assert task.labels is not None
        self._labels = dict(zip(task.images, task.labels, strict=True))
        self._centres = np.random.default_rng(3).standard_normal((len(task.class_names), DIM))

    def see(self, pictures: Sequence[Image]) -> Floats:
        own = super().see(pictures)
        for row, picture in enumerate(pictures):
            original = picture.original if isinstance(picture, AugmentedImage) else picture
            if original in self._labels:
                own[row] = self._centres[self._labels[original]] + 0.5 * own[row]
        vectors: Floats = own / np.linalg.norm(own, axis=1, keepdims=True)
        return vectors


def test_a_run_stops_early_where_the_heads_win(tmp_path: Path) -> None:
    task = make_task()
    world, asked = Clustered(task), Options(300, recipe="small")
    plan = dry_run(task, world.capabilities, asked)
    result = tune(task, world, tmp_path / "run", asked)
    assert result.strategy == "heads"
    assert result.stopped is not None
    assert "no more than heads" in result.stopped
    assert result.queries_spent == len(world.requests) < plan.queries == result.queries_planned
    assert "search fold 2" not in result.spent_by_purpose
    assert result.tuned_accuracy == result.out_of_fold_accuracy["heads"] > 0.9
    assert "prompt+refiner" in result.out_of_fold_accuracy


def test_a_run_goes_on_where_they_do_not(tmp_path: Path) -> None:
    asked = Options(300, recipe="small")
    world = soft()
    result = tune(make_task(3, 4), world, tmp_path / "run", asked)
    assert result.stopped is None
    assert result.queries_spent == result.queries_planned == len(world.requests)
    assert {"observe", "search fold 2", "search", "deploy"} <= set(result.spent_by_purpose)
    assert {"heads", "zero-shot", "prompt", "prompt+refiner"} <= set(result.out_of_fold_accuracy)


@pytest.mark.parametrize("wins", ["heads", "craft"])
def test_a_run_stopped_anywhere_resumes_bit_for_bit(tmp_path: Path, wins: str) -> None:
    task, asked = make_task(3, 4 if wins == "craft" else 6), Options(300, recipe="small")

    def world() -> LinearWorld:
        made = Clustered(task) if wins == "heads" else soft()
        made.capabilities = replace(made.capabilities, requests_per_batch=4)
        return made

    undisturbed, stopping = world(), world()
    whole = tune(task, undisturbed, tmp_path / "whole", asked)
    assert (whole.stopped is not None) == (wins == "heads")
    run, stops = tmp_path / "run", 0
    while True:  # stopped again after every seventh batch
        try:
            tune(task, stopping, run, asked, resume=stops > 0, should_stop=StopAfter(7))
            break
        except Interrupted:
            stops += 1
    assert stops > (2 if wins == "heads" else 8)
    assert files(run) == files(tmp_path / "whole")
    assert sorted(keys(stopping)) == sorted(keys(undisturbed))
    assert len(set(keys(stopping))) == len(stopping.requests)


def test_an_early_stop_is_found_again_for_nothing(tmp_path: Path) -> None:
    task, asked = make_task(), Options(300, recipe="small")
    first = tune(task, Clustered(task), tmp_path / "run", asked)
    before, idle = files(tmp_path / "run"), Clustered(task)
    assert tune(task, idle, tmp_path / "run", asked, resume=True) == first
    assert (idle.asked, files(tmp_path / "run")) == (0, before)


def test_pruned_answers_are_what_a_prediction_will_be_answered(tmp_path: Path) -> None:
    """More texts are asked about than stay: learned from is what those that stay would bring."""
    limits = {"texts_per_request": 8, "score_kind": ScoreKind.SOFTMAX}
    world, task = LinearWorld(declare(Access.SCORES, idempotent=True, **limits)), make_task()
    observed, plan = seen_by(world, tmp_path, task)
    assert plan.prune_to == len(observed.question.lists[0]) == 8 < len(plan.question.lists[0])
    with Ledger(tmp_path / "later.sqlite", 10) as ledger:
        again = run_sync(
            ask(Meter(world, ledger), observed.question, task.images, task.classes, "predict")
        )
    np.testing.assert_allclose(observed.observation.answers, again, atol=1e-4)
