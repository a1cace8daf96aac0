"""Evaluation and prediction under a budget of their own: they cost queries like everything else."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm._classes import fold
from blackbox_vlm.adapter import Adapter, Predictions, to_predictions
from blackbox_vlm.backend import Backend
from blackbox_vlm.batching import distinct
from blackbox_vlm.errors import BudgetError, InputError
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger, Lost
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import Logits, plain_logits, plain_requests
from blackbox_vlm.plan import check_max_cost
from blackbox_vlm.running import run_sync
from blackbox_vlm.scores import accuracy_of
from blackbox_vlm.task import Task

Result = TypeVar("Result")


@dataclass(frozen=True)
class Evaluation:
    """Accuracies are fractions of `n_images`."""

    accuracy: float
    zero_shot_accuracy: float
    n_images: int
    queries_spent: int
    budget: int
    strategy: str


def evaluation_cost(adapter: Adapter, task: Task, backend: Backend) -> int:
    """Queries that `evaluate` spends: the tuned predictions, and the plain ones to compare with."""
    capabilities = backend.capabilities
    asked = adapter.question.requests(task.images, adapter.classes, capabilities.access)
    if adapter.zero_shot is None:
        asked = [*asked, *plain_requests(capabilities, task.images, adapter.classes)]
    return len(distinct(asked, capabilities))


def evaluate(
    adapter: Adapter,
    task: Task,
    backend: Backend,
    ledger: Path,
    *,
    budget: int | None = None,
    max_cost: float | None = None,
    on_lost: Lost = "stop",
) -> Evaluation:
    """Compare the adapter with the endpoint's own predictions on labelled images.

    Args:
        adapter: tuned on other images of the same classes.
        task: labelled images; its classes must be the adapter's, in any order.
        backend: the endpoint.
        ledger: the file that counts; what it holds already is not paid again.
        budget: queries that may be spent; None allows exactly `evaluation_cost`.
        max_cost: USD that may be spent now.
        on_lost: what to do about a query whose answer was lost: "stop", or "resend" and pay again.

    Raises:
        InputError: no images, no labels, other classes, another model or access level.
        BudgetError: it would cost more than `budget`; nothing was sent.
    """
    labels = match_labels(adapter, task)
    adapter.check(backend.capabilities)
    allowed = _allowed(budget, evaluation_cost(adapter, task, backend), "this evaluation")

    async def ask(meter: Meter) -> tuple[Logits, Logits]:
        answers = await adapter.answers(meter, task.images, "tuned")
        plain = adapter.zero_shot_logits(answers)
        if plain is None:
            plain = await plain_logits(meter, task.images, adapter.classes, "zero-shot")
        return plain, adapter.logits(answers)

    (plain, tuned), spent = _spend(ask, backend, ledger, allowed, max_cost, on_lost)
    return Evaluation(
        accuracy=accuracy_of(tuned, labels),
        zero_shot_accuracy=accuracy_of(plain, labels),
        n_images=len(task),
        queries_spent=spent,
        budget=allowed,
        strategy=adapter.strategy,
    )


def predict(
    adapter: Adapter,
    images: Sequence[Image],
    backend: Backend,
    ledger: Path,
    *,
    budget: int | None = None,
    max_cost: float | None = None,
    on_lost: Lost = "stop",
) -> tuple[Predictions, int]:
    """Predict images under a ledger that remembers: the same images again cost nothing.

    The arguments are those of `evaluate`.

    Returns:
        the predictions, and the queries that they cost now.

    Raises:
        InputError: no images, another model or access level.
        BudgetError: it would cost more than `budget`; nothing was sent.
    """
    adapter.check(backend.capabilities)
    cost = adapter.queries(images, backend.capabilities)
    allowed = _allowed(budget, cost, "this prediction")

    async def ask(meter: Meter) -> Logits:
        return adapter.logits(await adapter.answers(meter, images, "predict"))

    logits, spent = _spend(ask, backend, ledger, allowed, max_cost, on_lost)
    return to_predictions(logits), spent


def _spend(
    ask: Callable[[Meter], Coroutine[Any, Any, Result]],
    backend: Backend,
    ledger: Path,
    allowed: int,
    max_cost: float | None,
    on_lost: Lost,
) -> tuple[Result, int]:
    """Ask under a budget of its own; the result, and the queries that it cost now."""
    check_max_cost(max_cost, backend.capabilities)
    with Ledger(ledger, extend=True) if ledger.exists() else Ledger(ledger, allowed) as book:
        totals = book.totals()
        again = totals.unknown + totals.open if on_lost == "resend" else 0
    budget = max(allowed + again, totals.budget)
    limit = None if max_cost is None else totals.cost + max_cost
    with Ledger(ledger, budget, max_cost=limit, extend=True) as book:
        before = book.spent()
        result = run_sync(ask(Meter(backend, book, on_lost=on_lost)))
        return result, book.spent() - before


def match_labels(adapter: Adapter, task: Task) -> NDArray[np.int64]:
    """The task's labels as indices of the adapter's classes, `(n,)`.

    Raises:
        InputError: the task has no labels, or classes that the adapter does not have.
    """
    if task.labels is None:
        raise InputError("evaluation needs labelled images; use `predict` for unlabelled ones")
    if not len(task):
        raise InputError("there are no images to evaluate on; give some")
    index = {fold(name): i for i, name in enumerate(adapter.classes.names)}
    unknown = [name for name in task.class_names if fold(name) not in index]
    if unknown:
        raise InputError(
            f"the images have the class {unknown[0]!r} ({len(unknown)} such), which the adapter "
            f"was not tuned for; its classes are {', '.join(map(repr, adapter.classes.names[:5]))}"
            "..."
        )
    return np.array([index[fold(name)] for name in task.class_names])[task.labels]


def _allowed(budget: int | None, cost: int, what: str) -> int:
    if budget is not None and budget < cost:
        raise BudgetError(
            f"{what} takes {cost} queries and its budget is {budget}; nothing was sent. "
            f"Give --budget {cost}"
        )
    return cost if budget is None else budget
