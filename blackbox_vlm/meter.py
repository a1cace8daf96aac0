"""The only way to a backend: reserve in the ledger, send, settle.

Whoever needs numbers from the endpoint (a search, a guard, an evaluation, a prediction) gives the
meter observations and a purpose, and receives arrays. What the ledger already holds is replayed
for nothing; everything else is charged before it leaves. Sending again is decided here and nowhere
else, because every sending may have to be paid:

| what became of a query | charged | sent again |
|---|---|---|
| it never left | no | yes |
| refused for now (429) | unless refusals are free | when the endpoint wants it |
| refused otherwise | unless refusals are free | no, the run stops |
| its answer was lost | yes | if the endpoint is idempotent, or paying again is allowed |
| its answer is broken | yes | if paying again is allowed |
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tenacity

from blackbox_vlm.backend import (
    Answer,
    Array,
    Backend,
    Capabilities,
    Outcome,
    Price,
    Request,
    query_key,
)
from blackbox_vlm.batching import join, split
from blackbox_vlm.commits import GroupCommit
from blackbox_vlm.contract import Watch, check_answer
from blackbox_vlm.errors import (
    BackendError,
    ContractError,
    InputError,
    Interrupted,
    NotSent,
    RateLimited,
    Refused,
    StorageError,
    UnknownOutcome,
)
from blackbox_vlm.ledger import Entry, Ledger, Lost
from blackbox_vlm.pacing import LONGEST_WAIT, Clock, Pacer, SystemClock

ATTEMPTS = 3  # at one query
DEADLINE = 600.0  # seconds since a query first left, after which it is not sent again
RETRIES_AT_FIRST = 10  # a few hiccups are no storm, however short the run
RETRIES_PER_ANSWER = 0.1  # of a query

Batch = dict[str, Request]  # by query key


@dataclass(slots=True)
class _Delivery:
    """A batch on its way: what of it is not answered, why it is asked, and when it first left."""

    left: Batch
    purpose: str
    since: float = math.inf


class Meter:
    """Puts a budget between a run and a backend.

    Args:
        backend: who answers.
        ledger: who counts.
        on_lost: what to do about a query that was sent and whose answer was lost, where the
            backend is not idempotent: "stop", or "resend" and pay again.
        should_stop: asked before every reservation; True ends the run with `Interrupted` after
            what is in flight has been settled.
        on_spent: told the number of queries charged so far, after every commit.
        clock: for waiting; tests have one of their own.
    """

    def __init__(
        self,
        backend: Backend,
        ledger: Ledger,
        *,
        on_lost: Lost = "stop",
        should_stop: Callable[[], bool] = lambda: False,
        on_spent: Callable[[int], None] = lambda spent: None,
        clock: Clock | None = None,
    ) -> None:
        self._backend = backend
        self._ledger = ledger
        self._on_lost: Lost = on_lost
        self._should_stop = should_stop
        self._clock = clock or SystemClock()
        self.capabilities: Capabilities = backend.capabilities
        self._failures: list[BaseException] = []  # the first is why, the others follow from it
        self._pacer = Pacer(self.capabilities.concurrency, self._clock, self._stops)
        self._watch = Watch(self.capabilities)
        batches = RETRIES_AT_FIRST + self.capabilities.concurrency
        self._retries = float(batches * self.capabilities.requests_per_batch)  # queries
        self._commits = GroupCommit(ledger, self._tell)
        self._on_spent, self._told = on_spent, -1

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

    async def canary(self, observation: Request, purpose: str = "canary") -> float:
        """Ask the first request of an answered observation once more, for one query.

        Returns:
            the largest difference of a number from its first answer: the endpoint's noise.

        Raises:
            as `observe`.
        """
        first = split(observation, self.capabilities)[0]
        [before] = await self._ask([first], purpose)
        [after] = await self._ask([first], purpose, identity=f"{self.capabilities.identity} again")
        return float(np.nanmax(np.abs(np.subtract(after, before, dtype=np.float64)), initial=0.0))

    # -- known or asked -----------------------------------------------------------------------

    async def _ask(
        self, requests: Sequence[Request], purpose: str, *, identity: str | None = None
    ) -> list[Array]:
        identity = identity or self.capabilities.identity
        keys = [query_key(request, identity) for request in requests]
        known: dict[str, Array] = {}
        missing: Batch = {}
        for key, request in zip(keys, requests, strict=True):
            stored = self._replay(key, request) if key not in known else None
            if stored is not None:
                known[key] = stored
            elif key not in known:
                missing[key] = request
        if missing:
            known.update(await self._send_all(missing, purpose))
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

    async def _send_all(self, missing: Batch, purpose: str) -> dict[str, Array]:
        """Send batches by several workers; what is in flight when one fails is settled first."""
        self._pacer.begin()
        self._failures.clear()
        batches = _batches(missing, self.capabilities.requests_per_batch)
        answered: dict[str, Array] = {}
        broken: list[ContractError] = []

        async def worker() -> None:
            try:
                for batch in batches:  # one shared iterator: each batch goes to one worker
                    await self._deliver(_Delivery(batch, purpose), answered, broken)
            except BaseException as error:
                self._failures.append(error)  # nothing leaves any more
                raise

        workers = [worker() for _ in range(self.capabilities.concurrency)]
        await asyncio.gather(*workers, return_exceptions=True)
        await self._commits.flush()
        for failure in [*self._failures, *broken]:
            raise failure
        return answered

    def _stops(self) -> bool:
        return bool(self._failures) or self._should_stop()

    # -- one batch, sent until it is answered or given up -------------------------------------

    async def _deliver(
        self, delivery: _Delivery, answered: dict[str, Array], broken: list[ContractError]
    ) -> None:
        """A broken answer is set aside, so that the others are asked; anything else is raised."""
        retrying = tenacity.AsyncRetrying(
            retry=self._may_send_again,
            wait=_wait,
            sleep=self._pacer.sleep,
            reraise=True,
        )
        try:
            await retrying(self._attempt, delivery, answered)
        except ContractError as error:
            if error.final:
                raise
            broken.append(error)

    async def _attempt(self, delivery: _Delivery, answered: dict[str, Array]) -> None:
        """Send what is left of a batch once; what was answered leaves it.

        Raises:
            BackendError: the one that matters most to the run.
        """
        again = delivery.since < math.inf
        batch, entered = delivery.left, await self._pacer.enter(again=again)
        delivery.since = min(delivery.since, entered)
        try:
            outcomes = await self._send(batch, delivery.purpose)
        finally:
            self._pacer.leave(entered)
        failures = []
        for key, outcome in zip(list(batch), outcomes, strict=True):
            self._listen(entered, outcome)
            if isinstance(outcome, BackendError):
                failures.append(outcome)
            else:
                answered[key] = outcome.values
                del batch[key]
        if failures:
            raise min(failures, key=self._severity)

    async def _send(self, batch: Batch, purpose: str) -> list[Outcome]:
        """Reserve, send, and close the books on every request of the batch."""
        if self._stops():
            raise Interrupted("stopped on request; everything settled is kept")
        requests = list(batch.values())
        attempts = await self._commits.submit(lambda: self._reserve(batch, purpose))
        try:
            outcomes = self._checked(requests, await self._backend.answer(requests))
        except InputError:
            self._ledger.refund(attempts)
            raise
        except BackendError as error:
            outcomes = [error] * len(requests)
            self._check(requests[0], error)
        except BaseException:
            self._ledger.lose(attempts)
            raise
        self._settle(attempts, outcomes)
        return outcomes

    def _reserve(self, batch: Batch, purpose: str) -> list[int]:
        price = self.capabilities.price or Price()
        entries = [
            Entry(key, purpose, request.n_images, request.n_texts, price.of(request))
            for key, request in batch.items()
        ]
        return self._ledger.reserve(
            entries, idempotent=self.capabilities.idempotent, on_lost=self._on_lost
        )

    def _checked(self, requests: Sequence[Request], outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Outcomes in which a broken answer is replaced by its error."""
        if len(outcomes) != len(requests):
            raise ContractError(f"asked {len(requests)} requests, got {len(outcomes)} answers")
        return [self._check(*pair) for pair in zip(requests, outcomes, strict=True)]

    def _check(self, request: Request, outcome: Outcome) -> Outcome:
        if isinstance(outcome, Answer):
            try:
                self._watch.check(request, outcome)
            except ContractError as error:
                return error
        elif isinstance(outcome, ContractError):
            self._watch.broken(outcome)
        return outcome

    def _settle(self, attempts: list[int], outcomes: list[Outcome]) -> None:
        """Answers are stored with the next commit; what failed is closed at once."""
        answered = [
            (attempt, outcome)
            for attempt, outcome in zip(attempts, outcomes, strict=True)
            if isinstance(outcome, Answer)
        ]
        if answered:
            paid, answers = zip(*answered, strict=True)
            self._commits.submit(lambda: self._ledger.settle(paid, answers))
        for attempt, outcome in zip(attempts, outcomes, strict=True):
            if isinstance(outcome, NotSent):
                self._ledger.refund([attempt])
            elif isinstance(outcome, Refused):
                free = self.capabilities.refusals_free
                (self._ledger.refund if free else self._ledger.forfeit)([attempt])
            elif isinstance(outcome, BackendError):
                self._ledger.lose([attempt])

    def _tell(self) -> None:
        try:
            spent = self._ledger.spent()
            if spent != self._told:
                self._told = spent
                self._on_spent(spent)
        except Exception as error:  # `observe` raises it; here, the event loop would only log it
            self._failures.append(error)

    # -- again? -------------------------------------------------------------------------------

    def _listen(self, entered: float, outcome: Outcome) -> None:
        """Let what an outcome says about the endpoint's limits slow everybody."""
        if isinstance(outcome, Answer):
            self._retries += RETRIES_PER_ANSWER
            self._pacer.answered(entered, outcome.quota)
        elif isinstance(outcome, RateLimited) or outcome.retry_after is not None:
            self._pacer.refused(entered, outcome.retry_after)

    def _may_send_again(self, state: tenacity.RetryCallState) -> bool:
        """Whether another attempt may help, is allowed, in time, and is not one too many."""
        assert state.outcome is not None  # tenacity asks only after an attempt
        error, delivery = state.outcome.exception(), state.args[0]
        if not isinstance(error, BackendError) or not self._can_be_helped(error):
            return False
        late = self._clock.now() - delivery.since > DEADLINE
        if late or state.attempt_number == ATTEMPTS or self._retries < len(delivery.left):
            return False
        self._retries -= len(delivery.left)
        return True

    def _severity(self, error: BackendError) -> int:
        """0: it ends the run; 1: it spoils one answer; 2: another attempt may help."""
        if self._can_be_helped(error):
            return 2
        return int(isinstance(error, ContractError) and not error.final)

    def _can_be_helped(self, error: BackendError) -> bool:
        if error.final or (error.retry_after or 0.0) > LONGEST_WAIT:
            return False
        if isinstance(error, UnknownOutcome):
            return self.capabilities.idempotent or self._on_lost == "resend"
        if isinstance(error, ContractError):  # an idempotent endpoint would repeat it
            return self._on_lost == "resend" and not self.capabilities.idempotent
        return isinstance(error, NotSent | RateLimited)


_backoff = tenacity.wait_exponential(multiplier=0.5, max=8.0) + tenacity.wait_random(0.0, 0.3)


def _wait(state: tenacity.RetryCallState) -> float:
    """As long as the endpoint asks, or else a little longer every time.

    A query that was refused twice without a word waits for the next minute's quota.
    """
    assert state.outcome is not None  # tenacity waits only after an attempt
    error = state.outcome.exception()
    if isinstance(error, BackendError) and error.retry_after is not None:
        return error.retry_after
    in_vain = isinstance(error, RateLimited) and state.attempt_number > 1
    return LONGEST_WAIT if in_vain else _backoff(state)


def _batches(missing: Batch, size: int) -> Iterator[Batch]:
    items = list(missing.items())
    return (dict(items[at : at + size]) for at in range(0, len(items), size))
