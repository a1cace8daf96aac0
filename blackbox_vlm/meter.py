"""The only way to a backend: reserve in the ledger, send, settle.

Whoever needs numbers from the endpoint (a search, a guard, an evaluation, a prediction) gives the
meter observations and a purpose, and receives arrays. What the ledger already holds is replayed
for nothing; everything else is charged before it leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence

import numpy as np

from blackbox_vlm.backend import (
    Answer,
    Array,
    Backend,
    Capabilities,
    Labels,
    PromptScores,
    Request,
    ScoreKind,
    TextScores,
    query_key,
)
from blackbox_vlm.batching import join, split
from blackbox_vlm.errors import (
    ContractError,
    InputError,
    Interrupted,
    NotSent,
    Refused,
    StorageError,
)
from blackbox_vlm.ledger import Entry, Ledger, Lost

_PROBABILITIES = (ScoreKind.SOFTMAX, ScoreKind.SIGMOID)
_ROUNDING = 1e-3  # how far a rounded probability may lie outside 0..1


class Meter:
    """Puts a budget between a run and a backend.

    Args:
        backend: who answers.
        ledger: who counts.
        on_lost: what to do about a query that was sent and whose answer was lost, where the
            backend is not idempotent: "stop", or "resend" and pay again.
        should_stop: asked before every reservation; True ends the run with `Interrupted` after
            what is in flight has been settled.
        on_spent: told the number of queries charged so far, after every batch.
    """

    def __init__(
        self,
        backend: Backend,
        ledger: Ledger,
        *,
        on_lost: Lost = "stop",
        should_stop: Callable[[], bool] = lambda: False,
        on_spent: Callable[[int], None] = lambda spent: None,
    ) -> None:
        self._backend = backend
        self._ledger = ledger
        self._on_lost: Lost = on_lost
        self._should_stop = should_stop
        self._on_spent = on_spent
        self.capabilities: Capabilities = backend.capabilities

    async def observe(self, observations: Sequence[Request], purpose: str) -> list[Array]:
        """Ask observations of any size, as one unit of work; each becomes one array.

        Returns:
            per observation: logits `(n_images, n_texts)`, vectors `(n, dim)` or indices
            `(n_images,)`, as `batching.join` says.

        Raises:
            BudgetError: the budget cannot pay for a batch of them; that batch was not sent.
            Interrupted: a stop was asked for.
            BackendError: the endpoint failed; what was settled before is kept.
        """
        parts = [split(observation, self.capabilities) for observation in observations]
        answers = iter(await self._ask([part for row in parts for part in row], purpose))
        return [
            join(observation, [next(answers) for _ in row], self.capabilities)
            for observation, row in zip(observations, parts, strict=True)
        ]

    async def _ask(self, requests: Sequence[Request], purpose: str) -> list[Array]:
        identity = self.capabilities.identity
        keys = [query_key(request, identity) for request in requests]
        known: dict[str, Array] = {}
        missing: dict[str, Request] = {}
        for key, request in zip(keys, requests, strict=True):
            stored = self._replay(key, request) if key not in known else None
            if stored is not None:
                known[key] = stored
            elif key not in known:
                missing[key] = request
        await self._send_all(missing, known, purpose)
        return [known[key] for key in keys]

    def _replay(self, key: str, request: Request) -> Array | None:
        stored = self._ledger.answer(key)
        if stored is None:
            return None
        try:
            check_answer(request, stored, self.capabilities)
        except ContractError as error:
            raise StorageError(
                f"{self._ledger.path} holds an answer that was not given ({error}); nothing was "
                "sent. Restore it from a backup"
            ) from None
        return stored.values

    async def _send_all(
        self, missing: dict[str, Request], known: dict[str, Array], purpose: str
    ) -> None:
        batches = _batches(list(missing.items()), self.capabilities.requests_per_batch)

        async def worker() -> None:
            try:
                for batch in batches:  # one shared iterator: each batch goes to one worker
                    known.update(await self._send(batch, purpose))
            finally:
                batches.close()  # after an error nobody takes another batch

        workers = [worker() for _ in range(self.capabilities.concurrency)]
        results = await asyncio.gather(*workers, return_exceptions=True)
        for result in results:  # what was in flight is settled; now the first error may leave
            if isinstance(result, BaseException):
                raise result

    async def _send(self, batch: list[tuple[str, Request]], purpose: str) -> dict[str, Array]:
        if self._should_stop():
            raise Interrupted("stopped on request; everything settled is kept")
        attempts = self._reserve(batch, purpose)
        requests = [request for _, request in batch]
        try:
            answers = await self._backend.answer(requests)
            self._check(requests, answers)
        except (NotSent, InputError):
            self._ledger.refund(attempts)
            raise
        except Refused:
            free = self.capabilities.refusals_free
            close = self._ledger.refund if free else self._ledger.forfeit
            close(attempts)
            raise
        except BaseException:
            self._ledger.lose(attempts)
            raise
        self._ledger.settle(attempts, answers)
        self._on_spent(self._ledger.spent())
        return {key: answer.values for (key, _), answer in zip(batch, answers, strict=True)}

    def _reserve(self, batch: list[tuple[str, Request]], purpose: str) -> list[int]:
        price = self.capabilities.price
        entries = [
            Entry(key, purpose, request.n_images, request.n_texts, price.of(request))
            for key, request in batch
        ]
        return self._ledger.reserve(
            entries, idempotent=self.capabilities.idempotent, on_lost=self._on_lost
        )

    def _check(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        if len(answers) != len(requests):
            raise ContractError(f"asked {len(requests)} requests, got {len(answers)} answers")
        for request, answer in zip(requests, answers, strict=True):
            check_answer(request, answer, self.capabilities)


def check_answer(request: Request, answer: Answer, capabilities: Capabilities) -> None:
    """Refuse an answer that is not what the endpoint declares, before anything learns from it.

    Raises:
        ContractError: another model, another shape or type, NaN or infinity, a label out of range,
            a probability outside 0..1, fewer scores than top-k promises.
    """
    if answer.model_id != capabilities.model_id:
        raise ContractError(
            f"asked model {capabilities.model_id!r}, {answer.model_id!r} answered; their scores "
            "are not comparable. Fix the endpoint or start another run"
        )
    wanted, got = request.answer_shape, answer.values.shape
    if len(got) != len(wanted) or any(w not in (None, g) for w, g in zip(wanted, got, strict=True)):
        raise ContractError(f"wanted an answer of shape {wanted}, got {got}")
    if answer.values.dtype.kind not in ("iu" if isinstance(request, Labels) else "f"):
        kind = "whole numbers" if isinstance(request, Labels) else "floating-point numbers"
        raise ContractError(f"wanted {kind}, got {answer.values.dtype}")
    if isinstance(request, Labels):
        if answer.values.size and not (
            answer.values.min() >= 0 and answer.values.max() < request.n_texts
        ):
            raise ContractError(f"wanted labels in 0..{request.n_texts - 1}, got others")
        return
    scores = isinstance(request, TextScores | PromptScores)
    if scores and capabilities.top_k is not None:
        _check_censored(answer.values, capabilities.top_k)
    elif not np.all(np.isfinite(answer.values)):
        raise ContractError("wanted finite numbers, got NaN or infinity")
    if scores and capabilities.score_kind in _PROBABILITIES:
        _check_probabilities(answer.values)


def _check_censored(values: Array, top_k: int) -> None:
    given = np.isfinite(values).sum(axis=1)
    if np.isinf(values).any() or np.any(given < min(top_k, values.shape[1])):
        raise ContractError(f"wanted {top_k} finite scores per image, got NaN or infinity instead")


def _check_probabilities(values: Array) -> None:
    if np.any((values < -_ROUNDING) | (values > 1 + _ROUNDING)):
        raise ContractError(
            f"wanted probabilities in 0..1, got {np.nanmin(values):g} to {np.nanmax(values):g}; "
            "declare another kind of scores"
        )


def _batches(
    items: list[tuple[str, Request]], size: int
) -> Generator[list[tuple[str, Request]], None, None]:
    return (items[at : at + size] for at in range(0, len(items), size))
