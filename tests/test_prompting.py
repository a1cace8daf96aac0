"""Tuning by text prompts alone: what is deployed, what it costs, and who else proposes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import Floats, LinearWorld, declare, images
from test_tuning import StopAfter, files, keys, make_task

from blackbox_vlm.adapter import Adapter
from blackbox_vlm.backend import (
    Access,
    Answer,
    ImageEmbeddings,
    Labels,
    Price,
    Request,
    TextScores,
)
from blackbox_vlm.errors import InputError, Interrupted
from blackbox_vlm.evaluation import evaluate, evaluation_cost
from blackbox_vlm.plan_prompts import KEEP
from blackbox_vlm.prompts.templates import candidates
from blackbox_vlm.scores import centred, predicted
from blackbox_vlm.task import Task
from blackbox_vlm.tuning import Options, TuneResult, dry_run, tune

ACCESS = (Access.EMBEDDINGS, Access.SCORES, Access.LABEL)
OWN = "a photo of a {}."


class Rigged(LinearWorld):
    """Pictures of a class lie together; texts of the good templates know where.

    Args:
        error: by how much each of these texts is wrong, in a way of its own.
    """

    def __init__(
        self,
        task: Task,
        *good: str,
        access: Access = Access.SCORES,
        error: float = 0.0,
        **limits: Any,
    ) -> None:
        super().__init__(declare(access, idempotent=True, **limits))
        self._error = error
        assert task.labels is not None
        draw = np.random.default_rng(5)
        self._centres = draw.standard_normal((len(task.class_names), 16))
        self._centres /= np.linalg.norm(self._centres, axis=1, keepdims=True)
        self._labels = dict(zip(task.images, task.labels, strict=True))
        self._texts = {
            template.replace("{}", name): label
            for template in good
            for label, name in enumerate(task.class_names)
        }

    def see(self, pictures: Sequence[Any]) -> Floats:
        own = super().see(pictures)
        for row, picture in enumerate(pictures):
            if picture in self._labels:
                own[row] = 2 * self._centres[self._labels[picture]] + own[row]
        vectors: Floats = own / np.linalg.norm(own, axis=1, keepdims=True)
        return vectors

    def read(self, texts: Sequence[str]) -> Floats:
        vectors = super().read(texts)
        for row, text in enumerate(texts):
            if text in self._texts:
                vectors[row] = self._centres[self._texts[text]] + self._error * vectors[row]
        unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


def good_template(at: int = 3) -> str:
    """One of the fixed list, not the own."""
    return candidates(OWN)[at]


def run(
    world: LinearWorld, out: Path, task: Task | None = None, *, budget: int = 400, **more: Any
) -> TuneResult:
    asked = {"method": "prompts", **{k: v for k, v in more.items() if k in OPTIONS}}
    others = {k: v for k, v in more.items() if k not in OPTIONS}
    return tune(task or make_task(3, 8), world, out, Options(budget, **asked), **others)


OPTIONS = set(Options.__dataclass_fields__)


def adapter_of(result: TuneResult) -> Adapter:
    return Adapter.from_pretrained(result.adapter)


# -- what is deployed ------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ACCESS)
def test_the_own_template_stays_where_no_other_is_clearly_better(
    tmp_path: Path, access: Access
) -> None:
    task = make_task(3, 8)
    world = Rigged(task, OWN, access=access)
    result = run(world, tmp_path / "run", task)
    adapter = adapter_of(result)
    assert result.strategy == "zero-shot"
    assert result.zero_shot_accuracy > 0.95
    assert result.queries_per_image == 1
    if access is not Access.EMBEDDINGS:
        assert adapter.question.lists == (task.classes.texts,)


@pytest.mark.parametrize("access", ACCESS)
def test_a_better_template_is_found(tmp_path: Path, access: Access) -> None:
    task, better = make_task(3, 8), good_template()
    result = run(Rigged(task, better, access=access), tmp_path / "run", task)
    assert result.strategy in ("text prompt", "text prompts")
    assert repr(better) in result.reason
    assert result.zero_shot_accuracy < 0.7
    assert result.tuned_accuracy is not None
    assert result.tuned_accuracy > 0.95


@pytest.mark.parametrize("access", ACCESS)
def test_as_good_is_no_reason_to_leave_the_own_template(tmp_path: Path, access: Access) -> None:
    task = make_task(3, 8)
    result = run(Rigged(task, *candidates(OWN), access=access), tmp_path / "run", task)
    assert (result.strategy, result.queries_per_image) == ("zero-shot", 1)


@pytest.mark.parametrize("access", ACCESS)
def test_no_more_prompts_stay_than_a_prediction_may_take(tmp_path: Path, access: Access) -> None:
    """Each of many is right in part, so that a mixture is better than the best."""
    task = make_task(8, 8)
    world = Rigged(task, *candidates(OWN)[1:], access=access, error=1.5)
    result = run(world, tmp_path / "run", task, budget=3000)
    lists = adapter_of(result).question.lists
    kept = len(result.reason.split("prompts: ")[1].split("; ")[0].split("', '"))
    assert result.strategy == "text prompts"
    assert 1 < kept <= KEEP
    if access is Access.LABEL:
        assert result.queries_per_image == len(lists) == kept
    else:
        assert result.queries_per_image == 1
        assert sum(map(len, lists)) == (8 * kept if access is Access.SCORES else 0)


def test_the_readout_of_vectors_is_that_of_the_prompt(tmp_path: Path) -> None:
    task, better = make_task(3, 8), good_template()
    world = Rigged(task, better, access=Access.EMBEDDINGS)
    result = run(world, tmp_path / "run", task)
    adapter = adapter_of(result)
    vectors = world.values(ImageEmbeddings(task.images))
    logits = adapter.logits(vectors)
    assert (predicted(logits) == task.labels).mean() > 0.95
    if result.strategy == "text prompt":
        texts = tuple(better.replace("{}", name) for name in task.class_names)
        direct = centred(world.logits(TextScores(task.images, texts)).astype(np.float32))
        scale = (logits * direct).sum() / (direct * direct).sum()  # the temperature
        np.testing.assert_allclose(logits, scale * direct, atol=1e-3)
        assert adapter.zero_shot is None


def test_labels_agree_over_prompts(tmp_path: Path) -> None:
    """A mixture asks each of its prompts, and every label counts for its class."""
    task = make_task(8, 8)
    world = Rigged(task, *candidates(OWN)[1:], access=Access.LABEL, error=1.5)
    result = run(world, tmp_path / "run", task, budget=3000)
    adapter = adapter_of(result)
    votes = [world.values(Labels(task.images, texts)) for texts in adapter.question.lists]
    assert len(votes) > 1
    one_hot = np.concatenate([np.eye(8, dtype=np.float32)[vote] for vote in votes], axis=1)
    logits = adapter.logits(one_hot)
    named = np.zeros((len(task), 8), dtype=bool)
    for vote in votes:
        named[np.arange(len(task)), vote] = True
    assert (logits[named] > 0).all()
    assert (logits[~named] < 0).all()
    assert {len(set(row)) for row in np.array(votes).T} > {1}  # they do not always agree
    none = np.zeros((1, one_hot.shape[1]), dtype=np.float32)  # no prompt was answered
    np.testing.assert_allclose(adapter.logits(none), 0, atol=1e-6)


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("good", [0, 3])
def test_evaluation_costs_what_it_says(tmp_path: Path, access: Access, good: int) -> None:
    task = make_task(3, 8)
    world = Rigged(task, good_template(good), access=access, images_per_request=4)
    result = run(world, tmp_path / "run", task)
    adapter = adapter_of(result)
    unseen = replace(task, images=images(40)[24:], labels=np.arange(16) % 3)
    cost = evaluation_cost(adapter, unseen, world)
    world.requests.clear()
    found = evaluate(adapter, unseen, world, tmp_path / "evaluate.sqlite")
    assert found.queries_spent == cost == len(world.requests)
    if adapter.zero_shot is not None:  # read off the same answers
        assert cost == 4 * result.queries_per_image


# -- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_race_spends_no_more_than_planned(
    tmp_path: Path, access: Access, deterministic: bool
) -> None:
    price = Price(0.01, 0.001, 0.0001)
    limits = {"deterministic": deterministic, "images_per_request": 5, "texts_per_request": 7}
    world, task = LinearWorld(declare(access, price=price, **limits)), make_task(3, 8)
    for budget in (40, 100, 300):
        asked = Options(budget, method="prompts")
        plan = dry_run(task, world.capabilities, asked)
        world.requests.clear()
        result = tune(task, world, tmp_path / str(budget), asked)
        assert result.queries_spent == len(world.requests) <= plan.queries <= budget
        assert plan.usd is not None
        assert result.cost_usd is not None
        assert result.cost_usd <= plan.usd + 1e-9
        assert result.spent_by_purpose.get("canary", 0) == (0 if deterministic else 2)


def test_money_is_a_limit_too(tmp_path: Path) -> None:
    world, task = LinearWorld(declare(price=Price(0.01, 0.001, 0.0001))), make_task(3, 8)
    usd = dry_run(task, world.capabilities, Options(400, method="prompts")).usd
    assert usd is not None
    with pytest.raises(InputError, match="the plan costs"):
        run(world, tmp_path / "run", task, max_cost=usd * 0.99)
    assert world.asked == 0
    assert not (tmp_path / "run").exists()
    result = run(world, tmp_path / "run", task, max_cost=usd)
    assert result.cost_usd is not None
    assert 0 < result.cost_usd <= usd


@pytest.mark.parametrize("access", ACCESS)
def test_a_race_stopped_anywhere_resumes_bit_for_bit(tmp_path: Path, access: Access) -> None:
    task = make_task(3, 8)

    def world() -> Rigged:
        limits = {"images_per_request": 4, "texts_per_request": 30}
        return Rigged(task, good_template(), access=access, **limits)

    undisturbed, stopping = world(), world()
    run(undisturbed, tmp_path / "whole", task)
    stops = 0
    while True:
        try:
            run(stopping, tmp_path / "run", task, resume=stops > 0, should_stop=StopAfter(5))
            break
        except Interrupted:
            stops += 1
    assert stops > 1
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert sorted(keys(stopping)) == sorted(keys(undisturbed))
    assert len(set(keys(stopping))) == len(stopping.requests)


# -- who proposes ------------------------------------------------------------------------------


class Scribe:
    """A language model that writes the same lines to everybody; keeps what it was asked."""

    def __init__(self, *lines: str, **changes: Any) -> None:
        self.capabilities = declare(Access.TEXT, model_id="scribe", idempotent=True, **changes)
        self._text = "\n".join(lines)
        self.prompts: list[str] = []

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        self.prompts += [request.prompt for request in requests]
        values = np.frombuffer(self._text.encode(), dtype=np.uint8)
        return [Answer(values, self.capabilities.model_id) for _ in requests]

    async def aclose(self) -> None:
        pass


WRITTEN = "a charcoal study of a {}."


def test_what_a_language_model_writes_can_win_and_is_counted(tmp_path: Path) -> None:
    task, scribe = make_task(3, 8), Scribe(WRITTEN, "nonsense", "two {} places {}")
    world = Rigged(task, WRITTEN)
    planned = dry_run(
        task,
        world.capabilities,
        Options(400, method="prompts"),
        writer=scribe.capabilities,
    )
    result = run(world, tmp_path / "run", task, writer=scribe)
    assert repr(WRITTEN) in result.reason
    assert result.strategy in ("text prompt", "text prompts")
    assert len(scribe.prompts) == 1
    assert json.dumps(OWN)[1:-1] in scribe.prompts[0]
    assert result.spent_by_purpose["proposals"] == 1
    assert result.queries_spent == len(world.requests) + 1 <= planned.queries <= 400
    assert {step.purpose for step in planned.steps} == {"race", "proposals", "second race"}


def test_what_was_written_is_replayed(tmp_path: Path) -> None:
    task, scribe = make_task(3, 8), Scribe(WRITTEN)
    whole = run(Rigged(task, WRITTEN), tmp_path / "whole", task, writer=Scribe(WRITTEN))
    world, stops = Rigged(task, WRITTEN), 0
    while True:
        try:
            stop = StopAfter(2)
            again = {"resume": stops > 0, "should_stop": stop}
            result = run(world, tmp_path / "run", task, writer=scribe, **again)
            break
        except Interrupted:
            stops += 1
    assert stops > 1
    assert len(scribe.prompts) == 1
    assert replace(result, adapter="") == replace(whole, adapter="")
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_the_money_of_both_is_one_limit(tmp_path: Path) -> None:
    task = make_task(3, 8)
    world = Rigged(task, WRITTEN, price=Price(per_request=0.01))
    scribe = Scribe(WRITTEN, price=Price(per_request=1.0))
    plan = dry_run(
        task, world.capabilities, Options(400, method="prompts"), writer=scribe.capabilities
    )
    assert plan.usd is not None
    assert plan.usd > 1
    with pytest.raises(InputError, match="the plan costs"):
        run(world, tmp_path / "run", task, writer=scribe, max_cost=1.0)
    result = run(world, tmp_path / "run", task, writer=scribe, max_cost=plan.usd)
    assert result.cost_usd == pytest.approx(1.0 + 0.01 * len(world.requests))


def test_descriptions_of_classes_are_tried(tmp_path: Path) -> None:
    task = make_task(3, 8)
    said = {
        name: [f"it looks like {name}", f"{name} is known by its ears"] for name in task.class_names
    }
    world = Rigged(task, "{} is known by its ears")
    result = run(world, tmp_path / "run", task, descriptions=said)
    assert "description 2" in result.reason
    assert result.tuned_accuracy is not None
    assert result.tuned_accuracy > 0.95
    lists = adapter_of(result).question.lists
    assert any("is known by its ears" in text for texts in lists for text in texts)


@pytest.mark.parametrize("method", [None, "observe", "refine"])
def test_proposals_that_nobody_would_try_are_refused(tmp_path: Path, method: str | None) -> None:
    for more in ({"writer": Scribe("x {}")}, {"descriptions": {"class 0": ["a"]}}):
        world = LinearWorld(declare())
        with pytest.raises(InputError, match="give --method prompts"):
            run(world, tmp_path / "run", method=method, **more)
        assert world.asked == 0
