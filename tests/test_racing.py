"""A race under the meter: what it asks, what that costs, and how it goes on after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blackbox_vlm.backends.local import LocalBlackBox
from doubles import SOFT_PROMPTS, LinearWorld, declare, images

from blackbox_vlm.backend import (
    Access,
    Capabilities,
    ImageEmbeddings,
    Labels,
    ScoreKind,
    TextEmbeddings,
    TextScores,
    nearest_text,
)
from blackbox_vlm.batching import distinct
from blackbox_vlm.errors import InputError, Interrupted
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.prompts.race import OWN, Round, cross_entropy
from blackbox_vlm.prompts.templates import prompts
from blackbox_vlm.proposing import GENERATIONS, SURROGATE, projected_templates
from blackbox_vlm.racing import RacePlan, RaceResult, plan_race, race, usable
from blackbox_vlm.running import run_sync
from blackbox_vlm.task import Classes

NAMES = ("cat", "dog", "owl")
TEMPLATES = tuple(f"template {i} of {{}}" for i in range(12))
RIGHT = 7  # the template that the labels follow
PICTURES = images(60)
PROMPTS = prompts(NAMES, TEMPLATES)
LABELS = LinearWorld().logits(TextScores(PICTURES, PROMPTS[RIGHT].texts)).argmax(axis=1)

SOFTMAX: dict[str, Any] = {"score_kind": ScoreKind.SOFTMAX}
ENDPOINTS = {
    "scores": declare(images_per_request=1, texts_per_request=3),
    "scores of many texts": declare(images_per_request=1),
    "scores of many images": declare(texts_per_request=9),
    "softmax": declare(images_per_request=4, texts_per_request=30, **SOFTMAX),
    "letters": declare(images_per_request=4, texts_per_request=20, **SOFTMAX),
    "softmax, rounded": declare(images_per_request=4, decimals=4, **SOFTMAX),
    "top-k": declare(images_per_request=1, top_k=2, **SOFTMAX),
    "cosines": declare(images_per_request=7, texts_per_request=6, score_kind=ScoreKind.COSINE),
    "labels": declare(Access.LABEL, images_per_request=1),
    "embeddings": declare(Access.EMBEDDINGS, images_per_request=1, texts_per_request=5),
    "soft": declare(Access.SOFT, images_per_request=16, soft_prompts=SOFT_PROMPTS),
}
ENDPOINTS = {
    name: replace(e, requests_per_batch=32) for name, e in ENDPOINTS.items()
}  # fewer commits
every_endpoint = pytest.mark.parametrize("limits", ENDPOINTS.values(), ids=ENDPOINTS)


def planned(limits: Capabilities, budget: int = 2000, **options: Any) -> RacePlan:
    return plan_race(limits, PICTURES, LABELS, PROMPTS, budget=budget, **{"seed": 5} | options)


def raced(world: LinearWorld, ledger: Ledger, plan: RacePlan, **meter: Any) -> RaceResult:
    return run_sync(race(Meter(world, ledger, **meter), plan, PICTURES, LABELS, PROMPTS))


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger(tmp_path / "ledger.sqlite", 2000) as ledger:
        yield ledger


def same(one: RaceResult, other: RaceResult) -> bool:
    equal = np.array_equal(one.answers, other.answers) and np.array_equal(one.images, other.images)
    return (
        equal
        and replace(one, answers=0, images=0).__dict__
        == replace(other, answers=0, images=0).__dict__
    )


# -- what it finds, and what that costs ------------------------------------------------------------


@every_endpoint
def test_it_finds_the_template_that_the_labels_follow(limits: Capabilities, ledger: Ledger) -> None:
    plan = planned(limits)
    result = raced(LinearWorld(limits), ledger, plan)
    assert result.best == RIGHT
    assert OWN in result.survivors
    assert ledger.by_purpose() == {"race": result.queries}
    assert result.queries <= plan.queries <= 2000
    assert result.reason


@every_endpoint
@pytest.mark.parametrize("budget", [100, 200, 400])
def test_the_plan_is_exact_where_nobody_drops_out(
    limits: Capabilities, ledger: Ledger, budget: int
) -> None:
    plan = planned(limits, budget, keep=12)  # all are kept, so the worst case happens
    assert 0 < plan.queries <= budget
    result = raced(LinearWorld(limits), ledger, plan)
    assert ledger.spent() == result.queries == plan.queries
    assert len(result.survivors) == plan.rounds[0].candidates


@every_endpoint
def test_answers_of_the_survivors_are_those_of_the_endpoint(
    limits: Capabilities, ledger: Ledger
) -> None:
    result = raced(LinearWorld(limits), ledger, planned(limits, 300, keep=3))
    assert list(result.images) == sorted(set(result.images.tolist()))
    for position, answers in zip(result.survivors, result.answers, strict=True):
        shown = tuple(PICTURES[i] for i in result.images)
        logits = LinearWorld().logits(TextScores(shown, PROMPTS[position].texts))
        if limits.access is Access.LABEL:
            np.testing.assert_array_equal(answers, logits.argmax(axis=1))
        elif limits.top_k is None and limits.decimals is None:
            expected = logits - logits.mean(axis=1, keepdims=True)
            np.testing.assert_allclose(answers, expected, atol=1e-3)
        else:
            np.testing.assert_array_equal(answers.argmax(axis=1), logits.argmax(axis=1))


def test_prompts_share_requests_where_that_costs_no_precision() -> None:
    wide, rounded = (
        declare(images_per_request=1),
        declare(images_per_request=1, decimals=4, **SOFTMAX),
    )
    assert planned(wide, 60).rounds == tuple(planned(wide, 2000).rounds)
    assert planned(wide).queries == 60
    assert planned(rounded).queries > 600
    few = declare(images_per_request=1, texts_per_request=26, **SOFTMAX)
    assert planned(few).queries == planned(rounded).queries > planned(ENDPOINTS["cosines"]).queries


def test_all_images_in_one_request_are_one_query_for_a_prompt() -> None:
    limits = declare(texts_per_request=3)
    assert planned(limits).rounds == (Round(12, 60, 12),)
    assert planned(limits, 8).rounds == (Round(8, 60, 8),)


def test_with_embeddings_it_is_texts_that_are_paid_for(ledger: Ledger) -> None:
    limits = ENDPOINTS["embeddings"]
    plan = planned(limits)
    assert (plan.vectors, plan.rounds) == (60, (Round(12, 60, 8),))  # 36 texts, 5 in a request
    world = LinearWorld(limits)
    raced(world, ledger, plan)
    kinds = [type(request) for request in world.requests]
    assert kinds.count(ImageEmbeddings) == 60
    assert kinds.count(TextEmbeddings) == 8
    assert planned(limits, 62).rounds == (Round(3, 60, 2),)
    again = planned(limits, 8, observed=True)
    assert again.queries == 8
    raced(world, ledger, again)
    assert ledger.spent() == 68


def test_what_the_zero_shot_pass_brought_is_not_asked_again(ledger: Ledger) -> None:
    limits = ENDPOINTS["labels"]
    plain = [Labels(PICTURES, PROMPTS[0].texts)]
    run_sync(Meter(LinearWorld(limits), ledger).observe(plain, "zero-shot"))
    result = raced(LinearWorld(limits), ledger, planned(limits, keep=12))
    assert ledger.by_purpose() == {"zero-shot": 60, "race": result.queries - 60}


def test_nor_is_it_where_all_images_go_together(ledger: Ledger) -> None:
    limits = declare(texts_per_request=3)
    plain = [TextScores(PICTURES, PROMPTS[0].texts)]
    run_sync(Meter(LinearWorld(limits), ledger).observe(plain, "zero-shot"))
    result = raced(LinearWorld(limits), ledger, planned(limits))
    assert ledger.by_purpose() == {"zero-shot": 1, "race": result.queries - 1}


def test_a_plan_counts_what_the_ledger_will() -> None:
    """The worst case is the sum of the different requests that its rounds would ask."""
    limits = ENDPOINTS["softmax"]
    plan, total, seen = planned(limits, 250), 0, 0
    for r in plan.rounds:
        shown = tuple(PICTURES[i] for i in np.sort(plan.order[seen : r.images]))
        for at in range(0, r.candidates, 10):  # 30 texts hold ten prompts of 3 classes
            texts = [t for prompt in PROMPTS[at : min(at + 10, r.candidates)] for t in prompt.texts]
            total += len(distinct([TextScores(shown, tuple(texts))], limits))
        seen = r.images
    assert plan.queries == total


def test_too_small_a_budget_asks_nothing(ledger: Ledger) -> None:
    plan = planned(ENDPOINTS["labels"], 20)
    assert plan.queries == 0
    world = LinearWorld(ENDPOINTS["labels"])
    result = raced(world, ledger, plan)
    assert world.asked == 0
    assert (result.best, result.survivors, result.queries) == (OWN, (OWN,), 0)
    assert "budget" in result.reason


# -- the same again --------------------------------------------------------------------------------


@every_endpoint
def test_a_race_that_is_over_is_replayed_for_nothing(limits: Capabilities, ledger: Ledger) -> None:
    plan = planned(limits, 300)
    first = raced(LinearWorld(limits), ledger, plan)
    world = LinearWorld(limits)
    assert same(raced(world, ledger, planned(limits, 300)), first)
    assert world.asked == 0


def test_a_stopped_race_goes_on_where_it_stood(ledger: Ledger, tmp_path: Path) -> None:
    limits = ENDPOINTS["labels"]
    plan = planned(limits, 400)
    with pytest.raises(Interrupted):
        raced(LinearWorld(limits), ledger, plan, should_stop=lambda: ledger.spent() >= 150)
    assert 0 < ledger.spent() < 400
    with Ledger(tmp_path / "other.sqlite", 2000) as other:
        whole = raced(LinearWorld(limits), other, plan)
        assert same(raced(LinearWorld(limits), ledger, plan), whole)
        assert ledger.spent() == other.spent()


def test_another_seed_shows_other_images_first() -> None:
    limits = ENDPOINTS["labels"]
    assert not np.array_equal(planned(limits).order, planned(limits, seed=6).order)


# -- templates -------------------------------------------------------------------------------------


class Particular(LinearWorld):
    def check_texts(self, template: str, class_names: tuple[str, ...]) -> None:
        if "3" in template or "0" in template:
            raise InputError("too long")


def test_templates_that_do_not_fit_the_model_stay_out() -> None:
    assert usable(LinearWorld(), TEMPLATES, NAMES) == TEMPLATES
    left = usable(Particular(), TEMPLATES, NAMES)
    assert left[:3] == TEMPLATES[:3]
    assert not {TEMPLATES[3], TEMPLATES[10]} & set(left)


@pytest.mark.parametrize("change", [{"keep": 1}, {"prompts": PROMPTS[:1]}, {"labels": LABELS[:3]}])
def test_what_is_no_race(change: dict[str, Any]) -> None:
    given = {"prompts": PROMPTS, "labels": LABELS, "budget": 9, "seed": 0} | change
    with pytest.raises(InputError, match="got"):
        plan_race(declare(), PICTURES, **given)


def test_a_label_endpoint_that_cannot_see_all_classes_is_refused() -> None:
    limits = declare(Access.LABEL, texts_per_request=2)
    with pytest.raises(InputError, match="all 3 classes"):
        planned(limits)


# -- soft prompts as words -------------------------------------------------------------------------

TEMPLATE = "an old photo of a {}, with rain."


@pytest.fixture(scope="module")
def box(one_load: None) -> LocalBlackBox:
    return LocalBlackBox(model="nano")


def test_no_offset_is_the_template_itself(box: LocalBlackBox) -> None:
    assert nearest_text(box, TEMPLATE, np.zeros((4, 192), np.float32)) == TEMPLATE
    assert nearest_text(box, "{}s", np.zeros((4, 192), np.float32)) == "a photo of a {}s"


def test_an_offset_to_other_words_is_those_words(box: LocalBlackBox, load: Any) -> None:
    tower = load("nano")
    before, after = (
        tower._texts.embed(torch.tensor(tower._words(text))).numpy()
        for text in ("old photo of a", "tiny wooden toy train")
    )
    near = 0.3 * np.random.default_rng(0).normal(size=after.shape) * after.std()
    offset = (2 * after + near - before).astype(np.float32)
    assert nearest_text(box, TEMPLATE, offset) == "an tiny wooden toy train {}, with rain."


def test_words_are_lower_case_tokens_of_their_own(load: Any) -> None:
    tower, every = load("nano"), load("nano")._whole_words()
    assert len(every) > 30_000
    entries = {token: text for text, token in tower._tokenize.encoder.items()}
    assert all(entries[token].removesuffix("</w>").islower() for token in every)
    for token in np.random.default_rng(0).choice(every, 300):
        word = tower._tokenize.decode([int(token)]).strip()
        assert tower._words(word) == [token]


def test_nearest_is_by_cosine(box: LocalBlackBox, load: Any) -> None:
    tower = load("nano")
    table = tower._texts.embed(torch.tensor(tower._whole_words())).numpy()
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    words = tower._texts.embed(torch.tensor(tower._words("old photo of a"))).numpy()
    for seed in range(5):
        offset = np.random.default_rng(seed).normal(size=(4, 192)).astype(np.float32)
        best = ((words + offset) @ table.T).argmax(axis=1)
        ids = [tower._whole_words()[i] for i in best]
        expected = f"an {tower._tokenize.decode(ids).strip()} {{}}, with rain."
        assert nearest_text(box, TEMPLATE, offset) == expected


def test_no_box_without_soft_prompts_or_a_vocabulary_finds_words(ledger: Ledger) -> None:
    world = LinearWorld(declare(Access.SOFT))
    for backend in (world, LocalBlackBox(model="nano", access="scores")):
        work = projected_templates(backend, ledger, PICTURES, LABELS, Classes(NAMES, "{}"), seed=0)
        with pytest.raises(InputError, match="words"):
            run_sync(work)
    assert world.asked == 0


class Worded(LinearWorld):
    """A world whose soft prompts have words."""

    def nearest_text(self, template: str, offset: Any) -> str:
        words = ("dim", "red", "wet", "far")
        kept = [word for word, x in zip(words, offset[:, 0], strict=True) if x > 0]
        return " ".join([*kept, template])


def test_a_surrogate_proposes_templates_of_words(tmp_path: Path) -> None:
    limits = declare(Access.SOFT, requests_per_batch=64)
    classes = Classes(NAMES, "a {}")

    def projected(name: str, **options: Any) -> tuple[tuple[str, ...], int]:
        with Ledger(tmp_path / name, 500) as own:
            work = projected_templates(
                Worded(limits), own, PICTURES, LABELS, classes, seed=1, **options
            )
            return run_sync(work), own.spent()

    found, queries = projected("a.sqlite", count=20)
    assert len(found) > 3
    assert queries == GENERATIONS * SURROGATE.population_size + len(found)
    assert "a {}" not in found
    assert projected("b.sqlite", count=2)[0] == found[:2]
    logits = np.stack(
        [LinearWorld().logits(TextScores(PICTURES, Classes(NAMES, t).texts)) for t in found]
    )
    losses = cross_entropy(logits.astype(np.float32), LABELS).mean(axis=1)
    assert list(losses) == sorted(losses)
