"""What a run will ask, in which order, and exactly what that costs, before anything is spent.

The plan is made from the same observations that the run will ask, so its number of queries is the
number that is then spent, to the query. It never holds half a generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from blackbox_vlm.backend import Access, Capabilities, PromptScores, Request
from blackbox_vlm.batching import distinct, split
from blackbox_vlm.craft.guard import stratified_folds
from blackbox_vlm.craft.recipes import Recipe
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image
from blackbox_vlm.observations import plain_requests
from blackbox_vlm.task import Task

MOST_USD = 9e9  # of a limit; what a ledger can count
RESEND_SHARE = 0.1  # of what is left for the searches, where a lost answer must be paid again


class Method(StrEnum):
    """How to tune."""

    CRAFT = "craft"  # soft prompts and refiner, trained together
    REFINE = "refine"  # the refiner alone, on one pass of plain predictions


@dataclass(frozen=True, slots=True)
class Step:
    """A line of the plan: so many queries, for one purpose."""

    purpose: str
    queries: int
    images: int  # images shown, over all queries
    texts: int
    usd: float | None  # None: the endpoint declares no price
    why: str


@dataclass(frozen=True, slots=True)
class Stage:
    """One search: on which images, for how many generations, under which purpose."""

    purpose: str
    members: tuple[int, ...]  # indices of the images that it may see
    generations: int

    @property
    def refine_purpose(self) -> str:
        """What the mean prompt's scores are asked for, where the recipe asks for them."""
        return f"refine {self.purpose}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do within its budget."""

    method: Method
    budget: int
    steps: tuple[Step, ...]
    stages: tuple[Stage, ...] = ()  # the searches on folds, then the one that is deployed

    @property
    def queries(self) -> int:
        """Exactly what will be spent."""
        return sum(step.queries for step in self.steps)

    @property
    def usd(self) -> float | None:
        """What that costs at most; None if the endpoint declares no price."""
        costs = [step.usd for step in self.steps if step.usd is not None]
        return sum(costs) if len(costs) == len(self.steps) else None


def make_plan(
    task: Task,
    capabilities: Capabilities,
    recipe: Recipe,
    *,
    budget: int,
    method: Method,
    seed: int,
) -> Plan:
    """Plan a run.

    Raises:
        InputError: the data, the access level or the budget does not allow the method; the message
            says what would.
    """
    if task.labels is None:
        raise InputError(
            f"method {method.value!r} learns from labelled images, and these have no labels; "
            "give class folders or a CSV with labels"
        )
    if method is Method.CRAFT:
        return _plan_craft(task, capabilities, recipe, budget, seed)
    return _plan_refine(task, capabilities, budget)


def check_max_cost(max_cost: float | None, capabilities: Capabilities) -> None:
    """Refuse a limit on money that nobody could keep.

    Raises:
        InputError: it is no limit, or the endpoint's price is unknown or has no bound.
    """
    if max_cost is None:
        return
    if not 0 <= max_cost < MOST_USD:
        raise InputError(f"the limit is {max_cost} USD; give a number of 0 or more")
    if capabilities.price is None:
        raise InputError(
            f"the limit is {max_cost:g} USD and the endpoint's price is unknown, so that it cannot "
            "be kept; declare the price ([price] in its file), or leave the limit out"
        )
    if capabilities.price.per_million_tokens and not capabilities.price.most_tokens:
        raise InputError(
            f"the limit is {max_cost:g} USD and the tokens of a request have none, so that it "
            "cannot be kept; declare most_tokens in [price], or leave the limit out"
        )


def default_method(access: Access) -> Method:
    """CraFT where soft prompts are taken, its refiner elsewhere."""
    return Method.CRAFT if access is Access.SOFT else Method.REFINE


def plain_step(task: Task, capabilities: Capabilities) -> Step:
    """The pass that every method starts from."""
    requests = plain_requests(capabilities, task.images, task.classes)
    why = "the endpoint's own predictions for the training images"
    return _step("zero-shot", requests, capabilities, why)


def first_steps(task: Task, capabilities: Capabilities) -> list[Step]:
    """What every method starts with: the plain pass, and a canary where answers may vary."""
    steps = [plain_step(task, capabilities)]
    if needs_canary(capabilities):
        first = split(plain_requests(capabilities, task.images, task.classes)[0], capabilities)[:1]
        why = "the first question once more: do answers repeat?"
        steps.append(_step("canary", first, capabilities, why))
    return steps


def needs_canary(capabilities: Capabilities) -> bool:
    """Whether to spend a query on the endpoint's noise; under a key it would repeat itself."""
    return not (capabilities.deterministic or capabilities.idempotent)


def fold_members(task: Task, n_folds: int, seed: int) -> list[tuple[int, ...]]:
    """For each fold, the indices of the images that its search may see."""
    assert task.labels is not None  # make_plan has refused unlabelled tasks
    folds = stratified_folds(task.labels, n_folds, seed)
    return [tuple(np.flatnonzero(folds != fold).tolist()) for fold in range(n_folds)]


def _plan_refine(task: Task, capabilities: Capabilities, budget: int) -> Plan:
    plan = Plan(Method.REFINE, budget, tuple(first_steps(task, capabilities)))
    if plan.queries > budget:
        raise InputError(
            f"one pass over {len(task)} images takes {plan.queries} queries at this endpoint and "
            f"the budget is {budget}; give --budget {plan.queries} or fewer --shots"
        )
    return plan


def _plan_craft(
    task: Task, capabilities: Capabilities, recipe: Recipe, budget: int, seed: int
) -> Plan:
    if capabilities.soft_prompts is None:
        raise InputError(
            f"method 'craft' searches soft prompts, and this endpoint gives "
            f"{capabilities.access.value!r} access; use one that takes soft prompts "
            "(the local black box does with --access soft), or --method refine"
        )
    first, last = first_steps(task, capabilities), _passes(task, capabilities, recipe)
    left = budget - sum(step.queries for step in [*first, *last])
    stages = _stages(task, capabilities, recipe, left, seed)
    if stages is None:
        raise InputError(_too_small(task, capabilities, recipe, budget, seed))
    searches = [step for stage in stages for step in _search(task, capabilities, recipe, stage)]
    return Plan(Method.CRAFT, budget, (*first, *searches, *last), tuple(stages))


def _stages(
    task: Task, capabilities: Capabilities, recipe: Recipe, left: int, seed: int
) -> list[Stage] | None:
    """Share out the generations; None if there is not one for every search."""
    if not capabilities.idempotent:  # a run that lost a few answers must still come to its end
        left -= int(left * RESEND_SHARE)
    stages = []
    folds = fold_members(task, recipe.folds, seed) if recipe.folds else []
    share = int(left * recipe.fold_share)
    for number, members in enumerate(folds, start=1):
        cost = _generation_cost(task, capabilities, recipe, members)
        stages.append(Stage(f"search fold {number}", members, max(share // cost, 1)))
        left -= stages[-1].generations * cost
    everyone = tuple(range(len(task)))
    cost = _generation_cost(task, capabilities, recipe, everyone)
    stages.append(Stage("search", everyone, left // cost))
    return stages if all(stage.generations > 0 for stage in stages) else None


def _too_small(
    task: Task, capabilities: Capabilities, recipe: Recipe, budget: int, seed: int
) -> str:
    """The message for a budget without a whole generation for every search, with one that has."""
    first = first_steps(task, capabilities)
    passes = [*first, *_passes(task, capabilities, recipe)]
    fixed = sum(step.queries for step in passes)
    generation = _generation_cost(task, capabilities, recipe, range(len(task)))
    enough = next(
        size
        for size in range(fixed + generation, 2**62, generation)
        if _stages(task, capabilities, recipe, size - fixed, seed) is not None
    )
    return (
        f"the budget is {budget} queries; one generation takes {generation} at this endpoint and "
        f"CraFT with {recipe.folds} fold searches needs {enough} in all. Give --budget {enough}, "
        f"or --method refine, which takes {sum(step.queries for step in first)}"
    )


def _generation_cost(
    task: Task, capabilities: Capabilities, recipe: Recipe, members: tuple[int, ...] | range
) -> int:
    per_prompt = len(distinct([_prompt_request(task, capabilities, members)], capabilities))
    return (recipe.population_size + (recipe.refine_on == "mean")) * per_prompt


def _search(task: Task, capabilities: Capabilities, recipe: Recipe, stage: Stage) -> Iterator[Step]:
    request = _prompt_request(task, capabilities, stage.members)
    prompts = stage.generations * recipe.population_size
    why = f"{stage.generations} generations of {recipe.population_size} prompts"
    yield _step(stage.purpose, [request], capabilities, why, times=prompts)
    if recipe.refine_on == "mean":
        why = "each generation's mean prompt, for the refiner's epoch"
        yield _step(stage.refine_purpose, [request], capabilities, why, times=stage.generations)


def _passes(task: Task, capabilities: Capabilities, recipe: Recipe) -> list[Step]:
    """The passes over all images that follow the searches."""
    request, steps = _prompt_request(task, capabilities, range(len(task))), []
    if recipe.folds:
        why = "each fold's prompt on all images: out-of-fold predictions for the guard"
        steps.append(_step("guard", [request], capabilities, why, times=recipe.folds))
    if recipe.refit:
        why = "the deployed prompt on all images: what its refiner is fitted to"
        steps.append(_step("deploy", [request], capabilities, why))
    return steps


def _prompt_request(
    task: Task, capabilities: Capabilities, members: tuple[int, ...] | range
) -> PromptScores:
    soft = capabilities.soft_prompts
    assert soft is not None  # _plan_craft has refused endpoints without
    offset = np.zeros((soft.context_tokens, soft.width), dtype=np.float32)
    images: tuple[Image, ...] = tuple(task.images[i] for i in members)
    return PromptScores(images, task.class_names, task.template, offset)


def _step(
    purpose: str,
    observations: Sequence[Request],
    capabilities: Capabilities,
    why: str,
    *,
    times: int = 1,
) -> Step:
    """The cost of asking the observations so many times."""
    requests = distinct(observations, capabilities)
    price = capabilities.price
    return Step(
        purpose=purpose,
        queries=times * len(requests),
        images=times * sum(request.n_images for request in requests),
        texts=times * sum(request.n_texts for request in requests),
        usd=times * sum(price.of(request) for request in requests) if price else None,
        why=why,
    )
