"""Evaluation and prediction under a budget of their own: they cost queries like everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.adapter import Adapter, Predictions, to_predictions
from blackbox_vlm.backend import Backend
from blackbox_vlm.batching import split
from blackbox_vlm.errors import BudgetError, InputError
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import plain_logits, plain_requests
from blackbox_vlm.running import run_sync
from blackbox_vlm.task import Task


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
    plain = plain_requests(capabilities, task.images, adapter.classes)
    if not adapter.strategy.uses_prompt:  # the refiner works on the plain predictions
        return sum(len(split(request, capabilities)) for request in plain)
    tuned = adapter.queries(task.images, capabilities)
    return tuned + sum(len(split(request, capabilities)) for request in plain)


def evaluate(
    adapter: Adapter, task: Task, backend: Backend, ledger: Path, *, budget: int | None = None
) -> Evaluation:
    """Compare the adapter with the endpoint's own predictions on labelled images.

    Args:
        adapter: tuned on other images of the same classes.
        task: labelled images; its classes must be the adapter's, in any order.
        backend: the endpoint.
        ledger: the file that counts; what it holds already is not paid again.
        budget: queries that may be spent; None allows exactly `evaluation_cost`.

    Raises:
        InputError: no labels, other classes, another model or access level.
        BudgetError: it would cost more than `budget`; nothing was sent.
    """
    labels = match_labels(adapter, task)
    adapter.check(backend.capabilities)
    cost = evaluation_cost(adapter, task, backend)
    allowed = _allowed(budget, cost, "this evaluation")
    with Ledger(ledger, allowed, extend=True) as book:
        before = book.spent()
        meter = Meter(backend, book)
        plain = run_sync(plain_logits(meter, task.images, adapter.classes, "zero-shot"))
        if adapter.strategy.uses_prompt:
            tuned = run_sync(adapter.logits(meter, task.images, "tuned"))
        else:
            tuned = adapter.refined(plain)
        spent = book.spent() - before
    return Evaluation(
        accuracy=float((tuned.argmax(1) == labels).mean()),
        zero_shot_accuracy=float((plain.argmax(1) == labels).mean()),
        n_images=len(task),
        queries_spent=spent,
        budget=allowed,
        strategy=adapter.strategy.value,
    )


def predict(
    adapter: Adapter,
    images: Sequence[Image],
    backend: Backend,
    ledger: Path,
    *,
    budget: int | None = None,
) -> tuple[Predictions, int]:
    """Predict images under a ledger that remembers: the same images again cost nothing.

    Returns:
        the predictions, and the queries that they cost now.

    Raises:
        InputError: another model or access level.
        BudgetError: it would cost more than `budget`; nothing was sent.
    """
    adapter.check(backend.capabilities)
    cost = adapter.queries(images, backend.capabilities)
    with Ledger(ledger, _allowed(budget, cost, "this prediction"), extend=True) as book:
        before = book.spent()
        logits = run_sync(adapter.logits(Meter(backend, book), images, "predict"))
        return to_predictions(logits), book.spent() - before


def match_labels(adapter: Adapter, task: Task) -> NDArray[np.int64]:
    """The task's labels as indices of the adapter's classes, `(n,)`.

    Raises:
        InputError: the task has no labels, or classes that the adapter does not have.
    """
    if task.labels is None:
        raise InputError("evaluation needs labelled images; use `predict` for unlabelled ones")
    index = {name: i for i, name in enumerate(adapter.classes.names)}
    unknown = [name for name in task.class_names if name not in index]
    if unknown:
        raise InputError(
            f"the images have the class {unknown[0]!r} ({len(unknown)} such), which the adapter "
            f"was not tuned for; its classes are {', '.join(map(repr, adapter.classes.names[:5]))}"
            "..."
        )
    return np.array([index[name] for name in task.class_names])[task.labels]


def _allowed(budget: int | None, cost: int, what: str) -> int:
    if budget is not None and budget < cost:
        raise BudgetError(
            f"{what} takes {cost} queries and its budget is {budget}; nothing was sent. "
            f"Give --budget {cost}"
        )
    return cost if budget is None else budget
