"""What a run will ask, by access level, budget and limits: never more, and what is then spent."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import LinearWorld, declare, images
from test_tuning import SMALL, make_task

from blackbox_vlm.backend import Access, Capabilities, Price, ScoreKind
from blackbox_vlm.background import background_images
from blackbox_vlm.craft.recipes import CRAFT, CRAFT_PAPER, RECIPES
from blackbox_vlm.errors import InputError
from blackbox_vlm.plan import Method, Plan
from blackbox_vlm.tuning import Options, dry_run, tune

VISION = (Access.EMBEDDINGS, Access.SCORES, Access.LABEL, Access.SOFT)
ONE = {"images_per_request": 1}
N_BACKGROUND = len(background_images())


@pytest.fixture(autouse=True)
def _small_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "small", replace(CRAFT, name="small", **SMALL))
    paper = replace(CRAFT_PAPER, name="small-paper", **SMALL)
    monkeypatch.setitem(RECIPES, "small-paper", paper)


def plan_of(access: Access, budget: int = 8000, *, per_class: int = 4, **more: Any) -> Plan:
    """The plan for three classes; `more` are options of the run or limits of the endpoint."""
    names = Options.__dataclass_fields__
    asked = Options(budget, **{"recipe": "small", **{k: v for k, v in more.items() if k in names}})
    limits = {k: v for k, v in more.items() if k not in names}
    return dry_run(make_task(3, per_class), declare(access, **limits), asked)


def queries(plan: Plan) -> dict[str, int]:
    """What is asked for, and how often."""
    return {step.purpose: step.queries for step in plan.steps}


# -- what is picked -------------------------------------------------------------------------------


def test_embeddings_take_every_image_once_and_texts_as_calls_of_their_own() -> None:
    plan = plan_of(Access.EMBEDDINGS, **ONE)
    assert plan.method is Method.OBSERVE
    assert list(queries(plan)) == ["observe", "texts"]
    observe, texts = plan.steps
    assert (observe.queries, observe.images, observe.texts) == (12, 12, 0)
    assert texts.images == 0
    assert 1 < len(plan.templates) == len(set(plan.templates))
    assert plan.templates[0] == "a photo of a {}."
    assert 0 < texts.queries <= observe.queries
    assert texts.texts == 3 * len(plan.templates)


def test_scores_take_every_image_against_a_bank_in_one_request() -> None:
    plan = plan_of(Access.SCORES, **ONE)
    assert plan.question is not None
    [texts] = plan.question.lists
    assert texts[:3] == make_task().classes.texts
    assert len(texts) > 100
    assert queries(plan) == {"observe": 12, "background": N_BACKGROUND}
    assert plan.steps[0].texts == 12 * len(texts)
    assert plan.readout is not None
    assert plan.readout.shape == (len(texts), 3)


def test_labels_take_several_questions() -> None:
    plan = plan_of(Access.LABEL, **ONE)
    assert plan.question is not None
    assert plan.question.lists[0] == make_task().classes.texts
    assert queries(plan) == {"observe": 12 * len(plan.question.lists)}
    assert len(plan.question.lists) > 1


def test_soft_prompts_observe_first_and_then_let_craft_compete() -> None:
    plan = plan_of(Access.SOFT, idempotent=True)
    assert plan.method is Method.OBSERVE
    purposes = list(queries(plan))
    assert purposes[:2] == ["observe", "background"]
    assert purposes[2:] == ["search fold 1", "search fold 2", "search", "guard", "deploy"]
    assert [stage.purpose for stage in plan.stages] == purposes[2:5]
    reserve = plan_of(Access.SOFT)  # where lost answers are paid again
    assert 7000 < reserve.queries < plan.queries
    assert any("CraFT stops as soon as the heads" in note for note in plan.notes)
    assert 8000 - plan.queries < 3 * 6


def test_what_is_left_is_said() -> None:
    plan = plan_of(Access.EMBEDDINGS, 1000, **ONE)
    assert any(f"{1000 - plan.queries} queries stay unspent" in note for note in plan.notes)
    exact = plan_of(Access.EMBEDDINGS, plan.queries, **ONE)
    assert queries(exact) == queries(plan)
    assert exact.notes == ()


@pytest.mark.parametrize("access", [Access.EMBEDDINGS, Access.SCORES])
def test_views_are_for_few_images_where_the_budget_has_room(access: Access) -> None:
    for per_class, views in ((1, 2), (2, 2), (3, 0), (4, 0)):
        plan = plan_of(access, per_class=per_class, **ONE)
        assert plan.views == views
        assert queries(plan).get("views", 0) == views * 3 * per_class
    spent = queries(plan_of(access, per_class=2, **ONE))
    enough = sum(spent.get(purpose, 0) for purpose in ("observe", "texts", "views"))
    assert plan_of(access, enough, per_class=2, **ONE).views == 2
    assert plan_of(access, enough - 1, per_class=2, **ONE).views == 0


def test_views_are_for_nobody_else() -> None:
    assert plan_of(Access.LABEL, per_class=1).views == 0
    assert plan_of(Access.SCORES, per_class=1, method="refine").views == 0


def test_the_median_class_counts() -> None:
    for labels, views in (([0, 0, 0, 0, 0, 1, 1, 2, 2], 2), ([0, 0, 0, 1, 1, 1, 2], 0)):
        task = replace(make_task(), images=images(len(labels)), labels=np.array(labels))
        assert dry_run(task, declare(), Options(8000)).views == views


def test_drawings_take_no_more_than_half_of_what_is_left() -> None:
    least = 12 + 2 * N_BACKGROUND
    assert queries(plan_of(Access.SCORES, least, **ONE))["background"] == N_BACKGROUND
    assert "background" not in queries(plan_of(Access.SCORES, least - 1, **ONE))
    assert "background" not in queries(plan_of(Access.SCORES, method="refine"))


def test_a_request_of_few_texts_asks_about_more_and_prunes() -> None:
    limits = {"texts_per_request": 4, **ONE}
    plan = plan_of(Access.SCORES, **limits)
    assert plan.question is not None
    [texts] = plan.question.lists
    assert plan.prune_to == 4 < len(texts) == 16
    assert queries(plan)["observe"] == 12 * 4
    poor = plan_of(Access.SCORES, 12 * 4 - 1, **limits)  # cannot pay for more than the classes' own
    assert poor.question is not None
    assert (poor.prune_to, len(poor.question.lists[0]), poor.queries) == (None, 4, 12)
    assert plan_of(Access.SCORES, per_class=1, **limits).prune_to is None


@pytest.mark.parametrize("limits", [{}, {"texts_per_request": 4}])
def test_a_local_encoder_needs_the_plain_question_alone(limits: dict[str, Any]) -> None:
    plan = plan_of(Access.SCORES, local_encoder="nano", **ONE, **limits)
    assert plan.question is not None
    assert plan.question.lists == (make_task().classes.texts,)
    assert queries(plan) == {"observe": 12}
    assert plan.prune_to is None
    label = plan_of(Access.LABEL, local_encoder="nano", **ONE)
    assert queries(label) == {"observe": 12}


@pytest.mark.parametrize(
    ("per_class", "budget", "count"),
    [
        (4, 12, 1),
        (4, 23, 1),
        (4, 24, 2),
        (4, 35, 2),
        (4, 36, 3),
        (4, 8000, 10),
        (6, 8000, 19),
        (1, 8000, 5),
        (1, 6, 2),
    ],
)
def test_labels_get_as_many_questions_as_the_budget_pays_for(
    per_class: int, budget: int, count: int
) -> None:
    plan = plan_of(Access.LABEL, budget, per_class=per_class, **ONE)
    assert plan.question is not None
    assert len(plan.question.lists) == count
    assert plan.queries == count * 3 * per_class <= budget


def test_the_canary_leaves_a_question_out_and_refuses_no_budget() -> None:
    uncertain = {"deterministic": False, **ONE}
    assert queries(plan_of(Access.LABEL, 24, **uncertain)) == {"observe": 12, "canary": 1}
    assert queries(plan_of(Access.LABEL, 25, **uncertain)) == {"observe": 24, "canary": 1}
    assert "canary" not in queries(plan_of(Access.LABEL, 25, idempotent=True, **uncertain))


def test_a_small_budget_leaves_templates_out() -> None:
    least = plan_of(Access.EMBEDDINGS, 13, **ONE, texts_per_request=3)
    assert queries(least) == {"observe": 12, "texts": 1}
    assert least.templates == ("a photo of a {}.",)
    more = [
        len(plan_of(Access.EMBEDDINGS, budget, **ONE, texts_per_request=3).templates)
        for budget in (13, 14, 20)
    ]
    assert more == sorted(more)
    assert more[-1] > 1


def test_craft_is_left_out_with_a_note() -> None:
    one = plan_of(Access.SOFT, per_class=1)
    assert one.stages == ()
    assert any("with an image per class" in note for note in one.notes)
    fixed = sum(queries(plan_of(Access.SCORES)).values())
    full = next(b for b in range(fixed, 200) if plan_of(Access.SOFT, b).stages)
    little = plan_of(Access.SOFT, full - 1)
    assert any("no whole generation" in note for note in little.notes)
    assert little.queries == fixed
    assert plan_of(Access.SOFT, full).queries <= full


def test_a_recipe_without_a_guard_is_craft_as_published() -> None:
    plan = plan_of(Access.SOFT, recipe="small-paper")
    assert plan.method is Method.CRAFT
    assert "zero-shot" in queries(plan)
    assert len(plan.stages) == 1
    assert plan.question is None
    other = plan_of(Access.SCORES, recipe="small-paper")  # there are no soft prompts to search
    assert other.method is Method.OBSERVE


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("access", VISION)
def test_a_method_is_what_it_says(access: Access, method: Method) -> None:
    if method is Method.CRAFT and access is not Access.SOFT:
        with pytest.raises(InputError, match="takes soft prompts"):
            plan_of(access, method=method.value)
        return
    if method in (Method.COFT, Method.COFT_PLUS):
        with pytest.raises(InputError, match="images without labels, and there are none"):
            plan_of(access, method=method.value)
        return
    plan = plan_of(access, method=method.value)
    assert plan.method is method
    if method is Method.PROMPTS:
        assert plan.races
        assert plan.prompts[0].texts == make_task().classes.texts
    elif method is Method.CRAFT:
        assert len(plan.stages) == 3
        assert plan.question is None
    else:
        assert plan.stages == plan.races == ()
        assert "observe" in queries(plan)
    if method is Method.REFINE:
        assert plan.question is not None
        plain = () if access is Access.EMBEDDINGS else (make_task().classes.texts,)
        assert plan.question.lists == plain


def test_one_head_asks_a_label_endpoint_one_question() -> None:
    plan = plan_of(Access.LABEL, method="prototypes", **ONE)
    assert queries(plan) == {"observe": 12}


# -- never above the budget ------------------------------------------------------------------------

LIMITS: list[dict[str, Any]] = [
    {},
    {"images_per_request": 4},
    {"images_per_request": 5, "texts_per_request": 4, "score_kind": ScoreKind.SOFTMAX},
    {"images_per_request": 3, "deterministic": False},
]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("access", VISION)
def test_no_budget_is_exceeded_and_one_that_is_too_small_names_the_least(
    access: Access, limits: dict[str, Any]
) -> None:
    least = None
    for budget in range(1, 100):
        try:
            plan = plan_of(access, budget, per_class=2, **limits)
        except InputError as error:
            assert least is None, "a higher budget is refused"
            enough = int(re.findall(r"--budget (\d+)", str(error))[0])
            assert enough > budget
            continue
        least = least or budget
        assert 0 < plan.queries <= budget
        assert plan.queries == sum(queries(plan).values())
    assert least is not None
    if least > 1:
        with pytest.raises(InputError, match=rf"--budget {least}\b"):
            plan_of(access, least - 1, per_class=2, **limits)


@pytest.mark.parametrize("method", [None, "refine", "prompts"])
@pytest.mark.parametrize("access", VISION)
def test_too_small_a_budget_sends_nothing(
    tmp_path: Path, access: Access, method: str | None
) -> None:
    world = LinearWorld(declare(access, **ONE))
    with pytest.raises(InputError, match="--budget"):
        tune(make_task(), world, tmp_path / "run", Options(2, method=method, recipe="small"))
    assert world.asked == 0
    assert not (tmp_path / "run").exists()


# -- and exactly what is spent -----------------------------------------------------------------


def spends_as_planned(folder: Path, capabilities: Capabilities, asked: Options) -> None:
    world, task = LinearWorld(capabilities), make_task(3, 2)
    plan = dry_run(task, capabilities, asked)
    assert world.asked == 0
    result = tune(task, world, folder / f"run-{asked.method}", asked)
    assert result.queries_spent == len(world.requests) <= plan.queries <= asked.budget
    assert result.queries_planned == plan.queries
    assert plan.usd is not None
    assert result.cost_usd is not None
    spent = result.spent_by_purpose
    for purpose, count in queries(plan).items():
        assert spent.get(purpose, 0) <= count
    if asked.method == "prompts" or result.stopped is not None:
        assert result.cost_usd <= plan.usd * 1.000001
        return
    assert spent == {p: q for p, q in queries(plan).items() if q}
    assert result.images_shown == sum(step.images for step in plan.steps)
    assert result.cost_usd == pytest.approx(plan.usd)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("access", VISION)
def test_the_plan_is_what_is_spent(tmp_path: Path, access: Access, limits: dict[str, Any]) -> None:
    capabilities = declare(access, price=Price(0.01, 0.001, 0.0001), **limits)
    craft = ["craft"] if access is Access.SOFT else []
    for method in (None, "prototypes", "refine", "prompts", *craft):
        spends_as_planned(tmp_path, capabilities, Options(180, method=method, recipe="small"))
