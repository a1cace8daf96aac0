"""Whole runs on a world without a model: the plan holds, runs resume, nothing is paid twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import LinearWorld, declare, images

from blackbox_vlm.adapter import Adapter
from blackbox_vlm.backend import Access, Answer, Price, Request, ScoreKind, query_key
from blackbox_vlm.craft import craft
from blackbox_vlm.craft.recipes import CRAFT, CRAFT_PAPER, RECIPES
from blackbox_vlm.errors import (
    BudgetError,
    InputError,
    Interrupted,
    RateLimited,
    RunMismatch,
    StorageError,
    UnknownOutcome,
)
from blackbox_vlm.evaluation import evaluate, evaluation_cost, predict
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.result import TuneResult
from blackbox_vlm.task import Task
from blackbox_vlm.tuning import Options, dry_run, tune

SMALL = {"intrinsic_dimension": 8, "population_size": 6, "hidden": 8, "fit_epochs": 5}
BUDGET = 100


@pytest.fixture(autouse=True)
def _small_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "small", replace(CRAFT, name="small", **SMALL))
    paper = replace(CRAFT_PAPER, name="small-paper", **SMALL)
    monkeypatch.setitem(RECIPES, "small-paper", paper)


def options(**changes: Any) -> Options:
    return replace(Options(budget=BUDGET, recipe="small", method="craft"), **changes)


def planned(**changes: Any) -> Options:
    """No method: the plan chooses."""
    return options(**{"method": None, **changes})


def make_task(n_classes: int = 3, per_class: int = 6) -> Task:
    names = tuple(f"class {i}" for i in range(n_classes))
    labels = np.repeat(np.arange(n_classes), per_class)
    return Task(names, "a photo of a {}.", images(len(labels)), labels)


def soft_world(**changes: Any) -> LinearWorld:
    return LinearWorld(declare(Access.SOFT, idempotent=True, requests_per_batch=64, **changes))


def files(run: Path) -> dict[str, bytes]:
    """What a run leaves for its user; paths in it are made equal."""
    kept = [run / "result.json", *sorted((run / "adapter").iterdir())]
    return {p.name: p.read_bytes().replace(str(run).encode(), b"RUN") for p in kept}


def keys(world: LinearWorld) -> list[str]:
    return [query_key(request, world.capabilities.model_id) for request in world.requests]


@pytest.mark.parametrize(
    ("access", "method", "limits"),
    [
        (Access.SOFT, "craft", {}),
        (Access.SOFT, "paper", {}),
        (Access.SOFT, "craft", {"images_per_request": 7}),
        (Access.SOFT, "craft", {"texts_per_request": 2, "score_kind": ScoreKind.SOFTMAX}),
        (Access.SCORES, None, {"images_per_request": 1}),
        (Access.SCORES, None, {"score_kind": ScoreKind.SIGMOID, "decimals": 3}),
        (Access.SCORES, None, {"score_kind": ScoreKind.SOFTMAX, "top_k": 2}),
        (Access.EMBEDDINGS, None, {"images_per_request": 5}),
        (Access.LABEL, None, {}),
        (Access.SCORES, "refine", {}),
        (Access.LABEL, "refine", {"images_per_request": 1}),
    ],
)
def test_the_plan_is_what_is_spent(
    tmp_path: Path, access: Access, method: str | None, limits: dict[str, Any]
) -> None:
    world = LinearWorld(
        declare(access, idempotent=True, price=Price(0.01, 0.001, 0.0001), **limits)
    )
    task, asked = make_task(), options(method=method, budget=400)
    if method == "paper":
        asked = planned(recipe="small-paper", budget=400)
    plan = dry_run(task, world.capabilities, asked)
    assert world.asked == 0
    result = tune(task, world, tmp_path / "run", asked)
    assert result.queries_spent == plan.queries == len(world.requests) <= 400
    assert result.spent_by_purpose == {s.purpose: s.queries for s in plan.steps if s.queries}
    assert result.images_shown == sum(step.images for step in plan.steps)
    assert result.cost_usd == pytest.approx(plan.usd)
    assert result.cost_usd > 0


def test_a_plan_holds_whole_generations_only() -> None:
    world, task = soft_world(), make_task()
    for budget in range(25, 140):
        try:
            plan = dry_run(task, world.capabilities, options(budget=budget))
        except InputError as error:
            enough = int(str(error).split("--budget ")[1].split(",")[0])
            assert enough > budget
            assert dry_run(task, world.capabilities, options(budget=enough)).queries <= enough
            continue
        assert plan.queries <= budget
        searched = sum(s.queries for s in plan.steps if s.purpose.startswith("search"))
        assert searched % 6 == 0
        assert budget - plan.queries < 3 * 6  # what is left pays for no further generation of each


def test_folds_never_see_the_images_that_judge_them(tmp_path: Path) -> None:
    world, task = soft_world(), make_task()
    asked = options()
    stages = dry_run(task, world.capabilities, asked).stages
    held = [set(range(len(task))) - set(stage.members) for stage in stages[:-1]]
    assert [sorted(h) for h in held] == [sorted(set(range(len(task))) - h) for h in held[::-1]]
    tune(task, world, tmp_path / "run", asked)
    index = {image: i for i, image in enumerate(task.images)}
    shown = [{index[image] for image in request.images} for request in world.requests]
    for stage in stages:
        assert shown.count(set(stage.members)) >= stage.generations * 6


def test_the_last_search_starts_where_the_folds_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, means = [], []
    init, train = craft.init, craft.train_refiner

    def watched_init(recipe: Any, n_classes: int, seed: int, start: Any = None) -> Any:
        starts.append(start)
        means.append(None)
        return init(recipe, n_classes, seed, start)

    def watched_train(recipe: Any, state: Any, *rest: Any, **more: Any) -> Any:
        means[-1] = state.search.mean
        return train(recipe, state, *rest, **more)

    monkeypatch.setattr(craft, "init", watched_init)
    monkeypatch.setattr(craft, "train_refiner", watched_train)
    tune(make_task(), soft_world(), tmp_path / "run", options())
    assert starts[:2] == [None, None]
    np.testing.assert_allclose(starts[2], (means[0] + means[1]) / 2)
    assert starts[2].any()


def test_the_same_run_twice_leaves_the_same_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        tune(make_task(), soft_world(), tmp_path / name, options())
    assert files(tmp_path / "first") == files(tmp_path / "second")
    other = tune(make_task(), soft_world(), tmp_path / "third", options(seed=1))
    assert other.seed == 1
    assert files(tmp_path / "third") != files(tmp_path / "first")


class StopAfter:
    """Asks for a stop at the n-th reservation."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("recipe", ["small", "small-paper"])
@pytest.mark.parametrize("batch", [64, 4])
def test_a_run_stopped_anywhere_resumes_bit_for_bit(
    tmp_path: Path, recipe: str, batch: int
) -> None:
    task, asked = make_task(), options(recipe=recipe)
    whole = soft_world()
    world = LinearWorld(replace(whole.capabilities, requests_per_batch=batch))
    undisturbed = LinearWorld(replace(whole.capabilities, requests_per_batch=batch))
    tune(task, undisturbed, tmp_path / "whole", asked)
    run, stops = tmp_path / "run", 0
    while True:  # stopped again after every second batch
        try:
            stop = StopAfter(2)
            tune(task, world, run, asked, resume=stops > 0, should_stop=stop)
            break
        except Interrupted:
            stops += 1
            assert Ledger(run / "ledger.sqlite").totals().queries == len(world.requests)
    assert stops > 5
    assert files(run) == files(tmp_path / "whole")
    assert sorted(keys(world)) == sorted(keys(undisturbed))
    assert len(set(keys(world))) == len(world.requests)  # nothing was asked twice


class Flaky(LinearWorld):
    """Loses the answers of every third batch after having done the work."""

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        answers = await super().answer(requests)
        if self.asked % 3 == 0:
            raise UnknownOutcome("the connection broke", final=True)
        return answers


def test_lost_answers_of_an_idempotent_endpoint_are_not_paid_twice(tmp_path: Path) -> None:
    task = make_task()
    tune(task, soft_world(), tmp_path / "whole", options())
    world, run, losses = Flaky(soft_world().capabilities), tmp_path / "run", 0
    while True:
        try:
            result = tune(task, world, run, options(), resume=losses > 0)
            break
        except UnknownOutcome:
            losses += 1
    assert losses >= 2
    assert result.queries_spent == len(set(keys(world))) < len(world.requests)
    assert files(run) == files(tmp_path / "whole")


def test_lost_answers_elsewhere_stop_the_run_or_are_paid_again(tmp_path: Path) -> None:
    task, run = make_task(), tmp_path / "run"
    world = Flaky(replace(soft_world().capabilities, idempotent=False))
    with pytest.raises(UnknownOutcome, match="connection broke"):
        tune(task, world, run, options())
    with pytest.raises(UnknownOutcome, match="--on-lost resend"):
        tune(task, world, run, options(), resume=True)
    world.asked = 0
    spent = Ledger(run / "ledger.sqlite").totals()
    assert spent.unknown > 0
    with pytest.raises(UnknownOutcome, match="connection broke"):
        tune(task, world, run, options(on_lost="resend"), resume=True)
    assert Ledger(run / "ledger.sqlite").totals().queries <= BUDGET


class Busy(LinearWorld):
    """Refuses some of the first batches for now."""

    async def answer(self, requests: Sequence[Request]) -> list[Any]:
        answers = await super().answer(requests)
        return [RateLimited("429", retry_after=0.0)] if self.asked in (2, 4, 7) else answers


@pytest.mark.parametrize("limit", ["budget", "max_cost"])
def test_a_run_whose_budget_went_to_refusals_goes_on_under_a_higher_one(
    tmp_path: Path, limit: str
) -> None:
    task, run = make_task(), tmp_path / "run"
    priced = declare(Access.SOFT, idempotent=True, price=Price(per_request=0.01))
    plan = dry_run(task, priced, options(budget=BUDGET + 5))  # too little for a generation more
    exact = options(budget=plan.queries)
    if limit == "max_cost":
        exact = options(budget=plan.queries + 5, max_cost=plan.usd)
    undisturbed = tune(task, LinearWorld(priced), tmp_path / "whole", exact)
    with pytest.raises(BudgetError, match=f"--{limit.replace('_', '-')}"):
        tune(task, Busy(priced), run, exact)
    world = Busy(replace(priced, price=Price(per_request=0.005), refusals_free=True))
    with pytest.raises(BudgetError):
        tune(task, world, run, exact, resume=True)
    assert world.asked == 0
    dearer = Price(per_request=0.012)
    world = LinearWorld(replace(priced, concurrency=4, refusals_free=True, price=dearer))
    more: dict[str, Any] = {"budget": 150} if limit == "budget" else {"max_cost": 1.5}
    result = tune(task, world, run, exact, resume=True, **more)
    assert world.asked > 0
    assert exact.budget < result.queries_spent <= result.budget or limit == "max_cost"
    assert replace(result, adapter="", cost_usd=None) == replace(
        undisturbed,
        budget=more.get("budget", exact.budget),
        queries_spent=result.queries_spent,
        images_shown=result.images_shown,
        spent_by_purpose=result.spent_by_purpose,
        cost_usd=None,
        adapter="",
    )
    adapter = files(run)
    assert tune(task, LinearWorld(priced), run, exact, resume=True) == result  # it stays raised
    assert files(run) == adapter
    with pytest.raises(RunMismatch, match="spent"):
        tune(task, LinearWorld(priced), run, exact, resume=True, **dict.fromkeys(more, 1))


def test_a_finished_run_costs_nothing_again(tmp_path: Path) -> None:
    task, run = make_task(), tmp_path / "run"
    first = tune(task, soft_world(), run, options())
    before = files(run)
    idle = soft_world()
    again = tune(task, idle, run, options(), resume=True)
    assert idle.asked == 0
    assert again == first
    assert files(run) == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"asked": {"seed": 1}}, "seed"),
        ({"asked": {"recipe": "small-paper"}}, "recipe"),
        ({"asked": {"method": "observe"}}, "method"),
        ({"task": {"per_class": 5}}, "data"),
        ({"world": {"model_id": "another"}}, "model"),
        ({"world": {"decimals": 4}}, "endpoint"),
        ({"asked": {"budget": 120}}, "budget"),
    ],
)
def test_another_run_is_not_resumed(
    tmp_path: Path, changes: dict[str, dict[str, Any]], name: str
) -> None:
    run = tmp_path / "run"
    tune(make_task(), soft_world(), run, options())
    world = soft_world(**changes.get("world", {}))
    with pytest.raises(RunMismatch, match=name):
        tune(
            make_task(**changes.get("task", {})),
            world,
            run,
            options(**changes.get("asked", {})),
            resume=True,
        )
    assert world.asked == 0


def test_a_run_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tune(make_task(), soft_world(), run, options())
    for folder, words in ((run, "resume"), (tmp_path, "is no run")):
        world = soft_world()
        with pytest.raises(InputError, match=words):
            tune(make_task(), world, folder, options())
        assert world.asked == 0
    with pytest.raises(InputError, match="not a run's folder"):
        tune(make_task(), soft_world(), tmp_path / "none", options(), resume=True)
    (tmp_path / "file").write_text("taken")
    with pytest.raises((InputError, StorageError), match="file"):
        tune(make_task(), soft_world(), tmp_path / "file" / "run", options())


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_run_that_lost_its_ledger_does_not_start_at_zero(tmp_path: Path, spoil: Any) -> None:
    run = tmp_path / "run"
    tune(make_task(), soft_world(), run, options())
    spoil(run / "ledger.sqlite")
    world = soft_world()
    with pytest.raises(StorageError, match="missing or empty"):
        tune(make_task(), world, run, options(), resume=True)
    assert world.asked == 0


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    from blackbox_vlm.run_directory import RunDirectory

    run = tmp_path / "run"
    tune(make_task(), soft_world(), run, options())
    with RunDirectory(run).locked(), pytest.raises(StorageError, match="another process"):
        tune(make_task(), soft_world(), run, options(), resume=True)


@pytest.mark.parametrize(
    ("asked", "access", "words"),
    [
        ({"budget": 0}, Access.SOFT, "at least 1"),
        ({"budget": -5}, Access.SOFT, "at least 1"),
        ({"budget": 5}, Access.SOFT, "one generation takes 6"),
        ({"budget": 20}, Access.SOFT, "leave --method out"),
        ({"method": "craft"}, Access.SCORES, "takes soft prompts"),
        ({"method": "craft"}, Access.LABEL, "takes soft prompts"),
        ({"method": "magic"}, Access.SOFT, "refine, craft"),
        ({"recipe": "magic"}, Access.SOFT, "craft-paper"),
        ({"max_cost": 0.5}, Access.SOFT, "USD"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_query_is_spent(
    tmp_path: Path, asked: dict[str, Any], access: Access, words: str
) -> None:
    world = LinearWorld(declare(access, price=Price(per_request=1.0)))
    with pytest.raises(InputError, match=words) as caught:
        tune(make_task(), world, tmp_path / "run", options(**asked))
    assert world.asked == 0
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_method_that_needs_labels_refuses_images_without(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labelled images alone"):
        tune(make_task().unlabelled(), soft_world(), tmp_path / "run", options(method="craft"))
    assert not (tmp_path / "run").exists()


def test_the_result_says_what_was_chosen_and_why(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = tune(make_task(), soft_world(), run, options())
    assert isinstance(result, TuneResult)
    written = json.loads((run / "result.json").read_text())
    assert written["strategy"] == result.strategy
    assert "out-of-fold accuracy on 18 training images" in result.reason
    adapter = Adapter.from_pretrained(run / "adapter")
    assert adapter.strategy == result.strategy
    figures = adapter.recipe["out_of_fold_accuracy"]
    assert figures[result.strategy] == result.tuned_accuracy
    assert figures["zero-shot"] == pytest.approx(result.zero_shot_accuracy)
    assert adapter.cost["queries"] == result.queries_spent


def test_a_recipe_without_a_guard_claims_no_accuracy(tmp_path: Path) -> None:
    result = tune(make_task(), soft_world(), tmp_path / "run", options(recipe="small-paper"))
    assert result.tuned_accuracy is None
    assert result.strategy == "prompt+refiner"
    assert "without a guard" in result.reason


@pytest.mark.parametrize("access", [a for a in Access if a is not Access.TEXT])
def test_evaluation_spends_what_it_says_and_remembers(tmp_path: Path, access: Access) -> None:
    world = LinearWorld(declare(access, idempotent=True, images_per_request=4))
    result = tune(make_task(), world, tmp_path / "run", planned(budget=600))
    adapter = Adapter.from_pretrained(result.adapter)
    shuffled = Task(("class 2", "class 0", "class 1"), "x {}", images(25)[18:], np.arange(7) % 3)
    cost = evaluation_cost(adapter, shuffled, world)
    world.requests.clear()
    first = evaluate(adapter, shuffled, world, tmp_path / "e.sqlite")
    assert first.queries_spent == cost == len(world.requests)
    again = evaluate(adapter, shuffled, world, tmp_path / "e.sqlite", budget=cost + 5)
    assert again.queries_spent == 0
    assert (again.accuracy, again.zero_shot_accuracy) == (first.accuracy, first.zero_shot_accuracy)


def test_evaluation_matches_classes_by_name(tmp_path: Path) -> None:
    world = LinearWorld(declare(Access.SCORES))
    result = tune(make_task(), world, tmp_path / "run", planned())
    adapter = Adapter.from_pretrained(result.adapter)
    pictures = images(40)[18:]
    guess = predict(adapter, pictures, world, tmp_path / "p.sqlite")[0].labels
    names = [adapter.classes.names[label] for label in guess]
    order = ("class 1", "class 2", "class 0")
    labels = np.array([order.index(name) for name in names])
    perfect = evaluate(adapter, Task(order, "{}", pictures, labels), world, tmp_path / "e.sqlite")
    assert perfect.accuracy == 1.0
    strangers = Task(("class 0", "owl"), "{}", pictures[:2], np.array([0, 1]))
    with pytest.raises(InputError, match="owl"):
        evaluate(adapter, strangers, world, tmp_path / "f.sqlite")
