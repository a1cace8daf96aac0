"""Tune a black box on a task, inside a budget: plan, ask, decide, save."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm._version import __version__
from blackbox_vlm.adapter import Adapter
from blackbox_vlm.backend import Backend, Capabilities, check_texts
from blackbox_vlm.craft.craft import fit_refiner
from blackbox_vlm.craft.guard import Strategy, Verdict, judge
from blackbox_vlm.craft.recipes import Recipe, recipe_named
from blackbox_vlm.errors import InputError
from blackbox_vlm.ledger import Ledger, Lost, Totals
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import Logits, plain_logits, plain_requests
from blackbox_vlm.plan import (
    Method,
    Plan,
    check_max_cost,
    default_method,
    fold_members,
    make_plan,
    needs_canary,
)
from blackbox_vlm.run_directory import RunDirectory
from blackbox_vlm.running import run_sync
from blackbox_vlm.scores import predicted
from blackbox_vlm.search import CraftRun, Progress, Tuned
from blackbox_vlm.task import Task

REFINE_FOLDS = 5  # folds cost nothing where one pass is all that is asked


@dataclass(frozen=True)
class Options:
    """What a run is asked to do, apart from its data and its endpoint.

    Attributes:
        budget: queries that may be spent.
        method: "craft" or "refine"; None chooses by access level.
        recipe: the settings of CraFT, by name.
        seed: of everything random.
        max_cost: USD that may be spent.
        on_lost: what to do about a query whose answer was lost: "stop", or "resend" and pay again.
    """

    budget: int
    method: str | None = None
    recipe: str = "craft"
    seed: int = 0
    max_cost: float | None = None
    on_lost: Lost = "stop"


@dataclass(frozen=True)
class TuneResult:
    """What a run came to. Accuracies are fractions, on the training images.

    Attributes:
        zero_shot_accuracy: of the endpoint's own predictions.
        tuned_accuracy: out-of-fold, of the strategy that was chosen; None without a guard.
        strategy: what the adapter deploys.
        queries_spent: of `budget`; `queries_planned` of them were foreseen.
        cost_usd: None where the endpoint declares no price.
        noise: the largest difference between two answers to one question; None if not asked.
        adapter: its folder.
    """

    budget: int
    queries_planned: int
    queries_spent: int
    images_shown: int
    cost_usd: float | None
    method: str
    recipe: str
    seed: int
    strategy: str
    reason: str
    zero_shot_accuracy: float
    tuned_accuracy: float | None
    noise: float | None
    spent_by_purpose: dict[str, int]
    n_images: int
    n_classes: int
    adapter: str


def dry_run(task: Task, capabilities: Capabilities, options: Options) -> Plan:
    """What `tune` would ask and what that would cost. Spends nothing.

    Raises:
        InputError: the data, the access level or the budget does not allow it.
    """
    _check_options(options)
    check_max_cost(options.max_cost, capabilities)
    recipe = recipe_named(options.recipe)
    method = _method(options.method) or default_method(capabilities.access)
    made = make_plan(
        task, capabilities, recipe, budget=options.budget, method=method, seed=options.seed
    )
    if options.max_cost is not None and made.usd is not None and made.usd > options.max_cost:
        raise InputError(
            f"the plan costs {made.usd:g} USD and the limit is {options.max_cost:g}; "
            "give a smaller --budget, fewer --shots, or a higher --max-cost"
        )
    return made


def tune(
    task: Task,
    backend: Backend,
    out: Path | str,
    options: Options,
    *,
    resume: bool = False,
    budget: int | None = None,
    max_cost: float | None = None,
    description: dict[str, Any] | None = None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_spent: Callable[[int], None] = lambda spent: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TuneResult:
    """Tune `backend` on `task` and leave an adapter under `out`.

    Args:
        task: labelled images; sample them first if only a few per class are meant.
        backend: the endpoint.
        out: the run's folder; it must not hold a run yet unless `resume`.
        options: the budget, and how to spend it.
        resume: go on with the run in `out`, or find it finished; nothing settled is paid again.
        budget, max_cost: other limits from here on, for a run that is resumed and whose own cannot
            pay for the rest of its plan, since answers were lost or refusals billed. The plan stays
            as it was made.
        description: kept in `run.json`, for whoever resumes it.
        on_plan, on_spent, on_progress: told the plan, every change of the queries spent, and every
            generation.
        should_stop: asked before every reservation; True ends the run with `Interrupted`.

    Raises:
        InputError: the data, a setting or the folder is not what is wanted; nothing was spent.
        RunMismatch: `resume`, and the run there is another one.
        BudgetError: answers were lost or refusals billed, and the rest of the plan exceeds the
            budget; the run can be resumed with a higher one.
        Interrupted: a stop was asked for; the run can be resumed.
        BackendError, StorageError: the endpoint or the disk failed; the run can be resumed.
    """
    limited = options if max_cost is None else replace(options, max_cost=max_cost)
    made = dry_run(task, backend.capabilities, limited)
    check_texts(backend, task.template, task.class_names)
    run = RunDirectory(Path(out))
    with ExitStack() as stack:
        _claim(run, stack, description or {}, resume=resume)
        ledger = stack.enter_context(_account(run.ledger, options, budget, max_cost))
        ledger.bind(_fingerprint(task, backend.capabilities, options, made))
        run.mark_started()
        on_plan(replace(made, budget=ledger.totals().budget))
        on_spent(ledger.spent())
        meter = Meter(
            backend,
            ledger,
            on_lost=options.on_lost,
            should_stop=should_stop,
            on_spent=on_spent,
        )
        work = _tune(task, made, options, meter, ledger, on_progress)
        tuned, plain, noise = run_sync(work)
        result = _result(task, made, options, tuned, plain, noise, ledger, run)
        adapter = _adapter(task, backend.capabilities, options, tuned, result, ledger.totals())
        adapter.save_pretrained(run.adapter)
        run.write_result(asdict(result))
    return result


def _claim(
    run: RunDirectory, stack: ExitStack, description: dict[str, Any], *, resume: bool
) -> None:
    """Lock the folder for this process, and start or take up its run."""
    if resume:
        run.describe()
    else:
        run.check_free()
        run.make()
    stack.enter_context(run.locked())
    if resume:
        run.check_ledger()
    else:
        run.check_free()  # another process may have been faster
        run.create(description)


def _account(path: Path, options: Options, budget: int | None, max_cost: float | None) -> Ledger:
    """The run's ledger, under new limits if some are given. Those that it has stay otherwise."""
    has: Options | Totals = options
    if path.exists() and path.stat().st_size:
        with Ledger(path) as ledger:
            has = ledger.totals()
    most = has.budget if budget is None else budget
    limit = has.max_cost if max_cost is None else max_cost
    return Ledger(path, most, max_cost=limit, extend=True)


async def _tune(
    task: Task,
    made: Plan,
    options: Options,
    meter: Meter,
    ledger: Ledger,
    on_progress: Callable[[Progress], None],
) -> tuple[Tuned, Logits, float | None]:
    recipe = recipe_named(options.recipe)
    plain = await plain_logits(meter, task.images, task.classes, "zero-shot")
    noise = None
    if needs_canary(meter.capabilities):
        first = plain_requests(meter.capabilities, task.images, task.classes)[0]
        noise = await meter.canary(first)
    if made.method is Method.REFINE:
        return _refine(task, recipe, options.seed, plain), plain, noise
    run = CraftRun(task, made, recipe, options.seed, meter, ledger, on_progress)
    return await run.run(plain), plain, noise


def _refine(task: Task, recipe: Recipe, seed: int, plain: Logits) -> Tuned:
    """The refiner alone, if it beats zero-shot out-of-fold."""
    labels = _labels(task)
    folds = fold_members(task, REFINE_FOLDS, seed)
    verdict = judge(recipe, seed, labels, plain, folds)
    refiners = {Strategy.REFINER: fit_refiner(recipe, plain, labels, seed)}
    return Tuned(verdict.chosen, verdict, offset=None, refiners=refiners)


def _result(
    task: Task,
    made: Plan,
    options: Options,
    tuned: Tuned,
    plain: Logits,
    noise: float | None,
    ledger: Ledger,
    run: RunDirectory,
) -> TuneResult:
    totals, verdict = ledger.totals(), tuned.verdict
    return TuneResult(
        budget=totals.budget,
        queries_planned=made.queries,
        queries_spent=totals.queries,
        images_shown=totals.images,
        cost_usd=totals.cost if totals.cost or made.usd is not None else None,
        method=made.method.value,
        recipe=options.recipe,
        seed=options.seed,
        strategy=tuned.strategy.value,
        reason=_reason(options.recipe, verdict),
        zero_shot_accuracy=float((predicted(plain) == _labels(task)).mean()),
        tuned_accuracy=verdict.accuracy[verdict.chosen] if verdict else None,
        noise=noise,
        spent_by_purpose=ledger.by_purpose(),
        n_images=len(task),
        n_classes=len(task.class_names),
        adapter=str(run.adapter),
    )


def _reason(recipe: str, verdict: Verdict | None) -> str:
    return verdict.reason if verdict else f"recipe {recipe} deploys both modules without a guard"


def _adapter(
    task: Task,
    capabilities: Capabilities,
    options: Options,
    tuned: Tuned,
    result: TuneResult,
    totals: Totals,
) -> Adapter:
    verdict, strategy = tuned.verdict, tuned.strategy
    refiner = tuned.refiners[strategy]._asdict() if strategy.uses_refiner else {}
    return Adapter(
        strategy=strategy,
        classes=task.classes,
        model_id=capabilities.model_id,
        access=capabilities.access,
        offset=tuned.offset if strategy.uses_prompt else None,
        refiner={name: tensor.numpy() for name, tensor in refiner.items()} or None,
        recipe={
            "version": __version__,
            "method": result.method,
            "seed": options.seed,
            "settings": asdict(recipe_named(options.recipe)),
            "data": task.fingerprint(),
            "n_images": len(task),
            "zero_shot_accuracy": result.zero_shot_accuracy,
            "out_of_fold_accuracy": verdict and {s.value: a for s, a in verdict.accuracy.items()},
            "out_of_fold_log_loss": verdict and {s.value: a for s, a in verdict.log_loss.items()},
        },
        cost={
            "queries": totals.queries,
            "images": totals.images,
            "texts": totals.texts,
            "usd": totals.cost,
        },
    )


def _fingerprint(
    task: Task, capabilities: Capabilities, options: Options, made: Plan
) -> dict[str, Any]:
    """Everything that must stay the same for a run to go on."""
    declared = asdict(capabilities)
    for name in ("concurrency", "requests_per_batch", "price", "refusals_free"):
        del declared[name]  # how fast and at what cost, not what is answered or asked
    return {
        "version": __version__,
        "seed": options.seed,
        "budget": options.budget,
        "max_cost": options.max_cost,
        "method": made.method.value,
        "recipe": asdict(recipe_named(options.recipe)),
        "images": len(task),
        "classes": list(task.class_names),
        "template": task.template,
        "data": task.fingerprint(),
        "model": declared.pop("model_id"),
        "endpoint": declared,
    }


def _check_options(options: Options) -> None:
    if not 1 <= options.budget < 2**63:
        raise InputError(f"the budget is {options.budget} queries; give at least 1, below 2**63")
    if not 0 <= options.seed < 2**63:
        raise InputError(f"the seed is {options.seed}; wanted 0 to 2**63 - 1")
    if options.on_lost not in ("stop", "resend"):
        raise InputError(f"unknown on_lost {options.on_lost!r}; wanted stop or resend")


def _method(name: str | None) -> Method | None:
    try:
        return None if name is None else Method(name)
    except ValueError:
        known = ", ".join(Method)
        raise InputError(f"unknown method {name!r}; wanted one of {known}") from None


def _labels(task: Task) -> NDArray[np.int64]:
    assert task.labels is not None  # make_plan has refused unlabelled tasks
    return task.labels
