"""The plan of a run that learns from images without labels, CoFT's: one pass over all of them.

What the layer itself does is local and free (`coft/`). An unlabelled image is worth its query as
long as the budget pays; where it does not pay for all, a random part is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256

from blackbox_vlm.backend import Access, Capabilities
from blackbox_vlm.describing import describe_step, placeholders
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image
from blackbox_vlm.observations import Question
from blackbox_vlm.observe.bank import make_bank
from blackbox_vlm.plan import Method, Plan, make_step
from blackbox_vlm.planner import VIEWS, plan_observation, view_images, with_rest
from blackbox_vlm.prompts.describing import in_label_order
from blackbox_vlm.racing import Usable
from blackbox_vlm.task import MIN_IMAGES, Task


def plan_coft(
    task: Task,
    pool: tuple[Image, ...],
    capabilities: Capabilities,
    *,
    budget: int,
    method: Method | None,
    seed: int,
    student: bool = False,
    usable: Usable = tuple,
    descriptions: Mapping[str, Sequence[str]] | None = None,
    writer: Capabilities | None = None,
) -> Plan:
    """Plan a pass over the labelled images and as many of the others as the budget pays for.

    Args:
        task: labelled images; there may be none.
        pool: images without labels.
        capabilities: of the endpoint.
        budget: queries.
        method: COFT, COFT_PLUS, or None: COFT.
        seed: of the part that is drawn.
        student: whether a local encoder describes the images.
        usable: leaves out templates that do not fit the model; the first stays.
        descriptions: of the classes, by name, for CoFT+.
        writer: of the language model that writes them where there are none, for CoFT+.

    Raises:
        InputError: as `make_plan`; descriptions of what is no class; or there is no pool, or the
            access level says too little.
    """
    _check_pool_allowed(capabilities, method, pool, student)
    few = sorted(range(len(pool)), key=lambda at: _drawn(pool[at], seed))

    described = in_label_order(task.class_names, descriptions or {})
    describes = writer is not None and not descriptions
    steps = [describe_step(writer, task.classes)] if describes and writer is not None else []
    if describes:
        described = placeholders(task.classes)
    spent = sum(step.queries for step in steps)

    def first(size: int) -> Plan:
        shown = tuple(pool[at] for at in sorted(few[:size]))
        how = (method or Method.COFT, shown, student, usable, described)
        plan = plan_observation(task, capabilities, budget - spent, *how)
        return replace(
            plan,
            budget=budget,
            steps=(*steps, *plan.steps),
            described=described if any(described) else (),
            describes=describes,
        )

    least = max(len(task.class_names), MIN_IMAGES) - len(task)
    fits = _most_that_fit(first, max(min(least, len(pool)), 1), len(pool))
    plan = first(fits)
    notes: tuple[str, ...] = ()
    if method is Method.COFT_PLUS:
        plan = _with_pool_views(plan, task, capabilities, student=student)
    if fits < len(pool):
        notes = (f"the budget pays for {fits} of {len(pool)} unlabelled images, drawn at random",)
    if capabilities.soft_prompts is not None:
        notes += ("CraFT is left out: the heads refine what the pseudo-labels start from",)
    return with_rest(replace(plan, notes=(*plan.notes, *notes)))


def _with_pool_views(plan: Plan, task: Task, capabilities: Capabilities, *, student: bool) -> Plan:
    """Contrast needs views: those of a local encoder are free, those of an endpoint are queries."""
    assert plan.question is not None
    if student:
        return replace(plan, pool_views=VIEWS)
    images = view_images(plan.pool, VIEWS)
    requests = plan.question.requests(images, task.classes, capabilities.access)
    why = f"{VIEWS} crops of every unlabelled image: what differs between them is no class"
    step = make_step("pool views", requests, capabilities, why)
    if plan.queries + step.queries > plan.budget:
        note = (
            f"momentum contrast is left out: {VIEWS} views of the pool are {step.queries} queries"
        )
        return replace(plan, notes=(*plan.notes, note))
    return replace(plan, steps=(*plan.steps, step), pool_views=VIEWS)


def _check_pool_allowed(
    capabilities: Capabilities, method: Method | None, pool: tuple[Image, ...], student: bool
) -> None:
    if not pool:
        raise InputError(
            f"method {(method or Method.COFT).value!r} learns from images without labels, and "
            "there are none; give some (--unlabeled or --pool FOLDER; `pool=` in Python), or leave "
            "the method out"
        )
    if method not in (None, Method.COFT, Method.COFT_PLUS):
        raise InputError(
            f"method {method.value!r} learns from labelled images alone, and there is a pool of "
            f"{len(pool)} without labels; leave the method or the pool out"
        )
    if capabilities.access is Access.LABEL and not student:
        raise InputError(
            "an endpoint that only names labels says too little of images without labels; give a "
            "--local-encoder that describes them, or an access level with scores or vectors"
        )


def _drawn(image: Image, seed: int) -> bytes:
    return sha256(f"{seed} {image.sha256}".encode()).digest()


def _most_that_fit(make: Callable[[int], Plan], least: int, most: int) -> int:
    """The largest size, by bisection, whose plan the budget pays for; `least` raises if none."""
    try:
        make(most)
        return most
    except InputError:
        make(least)
    while most - least > 1:
        middle = (least + most) // 2
        try:
            make(middle)
            least = middle
        except InputError:
            most = middle
    return least


def with_descriptions(
    plan: Plan, task: Task, capabilities: Capabilities, descriptions: Mapping[str, Sequence[str]]
) -> Plan:
    """The plan with what a language model has written, in place of its placeholders."""
    described = in_label_order(task.class_names, descriptions)
    plan = replace(plan, described=described if any(described) else ())
    if plan.readout is None or len(plan.readout) == len(task.class_names):
        return plan  # vectors, or the classes alone
    bank = make_bank(
        task.class_names,
        task.template,
        capabilities,
        size=len(plan.readout),
        descriptions=described,
    )
    return replace(plan, question=Question((bank.texts,)), readout=bank.readout)
