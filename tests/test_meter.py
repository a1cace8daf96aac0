"""The meter: what a backend does decides what is charged, kept, sent again and learned from."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import (
    BillingBackend,
    LinearWorld,
    ScriptedBackend,
    billed,
    declare,
    first_is,
    images,
    other_model,
    scores,
    too_few,
    with_values,
)

from blackbox_vlm.backend import (
    Access,
    Answer,
    Array,
    ImageEmbeddings,
    Labels,
    Price,
    Request,
    ScoreKind,
    TextScores,
    query_key,
)
from blackbox_vlm.contract import MOST_CONSTANT
from blackbox_vlm.errors import (
    AuthError,
    BackendError,
    BudgetError,
    ContractError,
    InputError,
    Interrupted,
    ModelChanged,
    NotSent,
    QuotaError,
    RateLimited,
    Refused,
    StorageError,
    UnknownOutcome,
)
from blackbox_vlm.ledger import Entry, Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.running import run_sync
from blackbox_vlm.testing import FakeClock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, 500) as ledger:
        yield ledger


def ask(meter: Meter, *observations: Request, purpose: str = "search") -> list[Array]:
    return run_sync(meter.observe(observations, purpose))


def counts(ledger: Ledger) -> tuple[int, int, int]:
    """Charged, of them unknown, of them open."""
    totals = ledger.totals()
    return totals.queries, totals.unknown, totals.open


# -- the good case --------------------------------------------------------------------------


def test_answers_arrive_in_the_order_of_the_questions(ledger: Ledger) -> None:
    world = LinearWorld(declare(requests_per_batch=3, concurrency=2))
    questions = [scores(index, texts=2 + index) for index in range(8)]
    results = ask(Meter(world, ledger), *questions)
    for question, result in zip(questions, results, strict=True):
        np.testing.assert_array_equal(result, world.values(question))
    assert sorted(world.requests, key=str) == sorted(questions, key=str)
    assert world.asked == 3
    assert counts(ledger) == (8, 0, 0)


def test_what_is_known_is_replayed_to_the_bit_without_the_backend(
    ledger: Ledger, path: Path
) -> None:
    world = LinearWorld()
    first = ask(Meter(world, ledger), scores(1), scores(2))
    with Ledger(path) as again:
        meter = Meter(ScriptedBackend(world, [AssertionError("asked")]), again)
        second = ask(meter, scores(2), scores(1), purpose="anything")
    assert [a.tobytes() for a in first] == [a.tobytes() for a in reversed(second)]
    assert (world.asked, ledger.spent()) == (2, 2)


def test_labels_are_replayed_as_integers(ledger: Ledger) -> None:
    world = LinearWorld(declare(Access.LABEL))
    question = Labels(images(5), ("a", "b", "c"))
    [first], [second] = ask(Meter(world, ledger), question), ask(Meter(world, ledger), question)
    assert first.dtype == second.dtype == np.int64
    np.testing.assert_array_equal(first, second)
    assert world.asked == 1


def test_the_same_question_is_paid_once(ledger: Ledger) -> None:
    world = LinearWorld(declare(concurrency=4))
    results = ask(Meter(world, ledger), scores(1), scores(2), scores(1))
    np.testing.assert_array_equal(results[0], results[2])
    assert (len(world.requests), ledger.spent()) == (2, 2)


def test_every_part_of_an_observation_is_one_query(ledger: Ledger) -> None:
    price = Price(per_request=0.01, per_image=0.001, per_text=0.0001)
    capabilities = declare(images_per_request=2, texts_per_request=4, price=price)
    question = TextScores(images(3), tuple("abcdef"))
    spent: list[int] = []
    meter = Meter(LinearWorld(capabilities), ledger, on_spent=spent.append)
    assert ask(meter, question)[0].shape == (3, 6)
    totals = ledger.totals()
    assert (totals.queries, totals.images, totals.texts) == (4, 6, 12)
    assert totals.cost == pytest.approx(4 * 0.01 + 6 * 0.001 + 12 * 0.0001, abs=1e-12)
    assert spent == [1, 2, 3, 4]


def test_nothing_asked_is_nothing_spent(ledger: Ledger) -> None:
    world = LinearWorld()
    assert ask(Meter(world, ledger)) == []
    assert (world.asked, ledger.spent()) == (0, 0)


def test_two_models_share_no_answer(ledger: Ledger) -> None:
    """Row 47: one cache, two models."""
    other = LinearWorld(declare(model_id="another"))
    ask(Meter(LinearWorld(), ledger), scores(1))
    ask(Meter(other, ledger), scores(1))
    assert (other.asked, ledger.spent()) == (1, 2)


# -- what the backend does, and what it costs -----------------------------------------------

LOST = UnknownOutcome("the connection was reset")
FAULTS: list[Any] = [
    # fault, capabilities, error, charged, unknown
    (NotSent("no certificate", final=True), {}, NotSent, 0, 0),
    (InputError("too many texts"), {}, InputError, 0, 0),
    (Refused("422"), {}, Refused, 1, 0),
    (Refused("422"), {"refusals_free": True}, Refused, 0, 0),
    (AuthError("401"), {}, AuthError, 1, 0),
    (AuthError("401"), {"refusals_free": True}, AuthError, 0, 0),
    (LOST, {}, UnknownOutcome, 1, 1),
    (LOST, {"refusals_free": True}, UnknownOutcome, 1, 1),
    (ContractError("not JSON"), {}, ContractError, 1, 1),
    (RuntimeError("a bug in a plugin"), {}, RuntimeError, 1, 1),
    (asyncio.CancelledError(), {}, asyncio.CancelledError, 1, 1),
    (too_few, {}, ContractError, 1, 1),
    (other_model, {}, ContractError, 1, 1),
    (with_values(lambda v: v[:, :-1]), {}, ContractError, 1, 1),
    (with_values(lambda v: v.T), {}, ContractError, 1, 1),
    (with_values(lambda v: v[0]), {}, ContractError, 1, 1),
    (with_values(lambda v: v.astype(str)), {}, ContractError, 1, 1),
    (with_values(lambda v: v > 0), {}, ContractError, 1, 1),
    (with_values(lambda v: v.astype(object)), {}, ContractError, 1, 1),
    (with_values(lambda v: v.tolist()), {}, AttributeError, 1, 1),
    (first_is(np.nan), {}, ContractError, 1, 1),
    (first_is(np.inf), {}, ContractError, 1, 1),
    (first_is(np.inf), {"top_k": 2}, ContractError, 1, 1),
    (with_values(lambda v: v * np.nan), {"top_k": 2}, ContractError, 1, 1),
    (first_is(1.5), {"score_kind": ScoreKind.SOFTMAX}, ContractError, 1, 1),
    (first_is(-0.5), {"score_kind": ScoreKind.SIGMOID}, ContractError, 1, 1),
]


@pytest.mark.parametrize(("fault", "changes", "error", "charged", "unknown"), FAULTS)
def test_what_a_fault_costs(
    ledger: Ledger,
    fault: Any,
    changes: dict[str, Any],
    error: type[BaseException],
    charged: int,
    unknown: int,
) -> None:
    world = LinearWorld(declare(**changes))
    backend = ScriptedBackend(world, [None, fault])
    meter = Meter(backend, ledger)
    ask(meter, scores(1))
    with pytest.raises(error):
        ask(meter, scores(2))
    assert backend.asked == 2  # never sent again by the meter
    assert counts(ledger) == (1 + charged, unknown, 0)
    key = query_key(scores(2), world.capabilities.identity)
    assert ledger.answer(key) is None  # an error is never stored (row 46)


@pytest.mark.parametrize(
    "fault", [first_is(3), first_is(-2), with_values(lambda v: v + 0.5)], ids=["3", "-2", "0.5"]
)
def test_labels_that_name_nothing(ledger: Ledger, fault: Any) -> None:
    backend = ScriptedBackend(LinearWorld(declare(Access.LABEL)), [fault])
    with pytest.raises(ContractError):
        ask(Meter(backend, ledger), Labels(images(2), ("a", "b", "c")))
    assert counts(ledger) == (1, 1, 0)


def test_top_k_declares_gaps_in_scores_only(ledger: Ledger) -> None:
    world = LinearWorld(declare(top_k=2))
    [result] = ask(Meter(world, ledger), scores(1, texts=5))
    assert np.isfinite(result).all()
    backend = ScriptedBackend(LinearWorld(declare(Access.EMBEDDINGS, top_k=2)), [first_is(np.nan)])
    with pytest.raises(ContractError, match="finite"):
        ask(Meter(backend, ledger), ImageEmbeddings(images(2)))


def test_rounding_may_lift_a_probability_over_one(ledger: Ledger) -> None:
    capabilities = declare(score_kind=ScoreKind.SOFTMAX)
    certain = np.array([[1.0000001, 0.0, 0.0]], dtype=np.float32)
    backend = ScriptedBackend(LinearWorld(capabilities), [with_values(lambda v: certain)])
    ask(Meter(backend, ledger), scores(1))
    assert counts(ledger) == (1, 0, 0)


def test_a_fault_in_a_batch_is_charged_for_the_batch(ledger: Ledger) -> None:
    world = LinearWorld(declare(requests_per_batch=4))
    backend = ScriptedBackend(world, [None, LOST])
    with pytest.raises(UnknownOutcome):
        ask(Meter(backend, ledger), *map(scores, range(12)))
    assert counts(ledger) == (8, 4, 0)  # the third batch did not leave
    assert backend.asked == 2


def test_after_a_refused_key_the_run_goes_on(ledger: Ledger) -> None:
    meter = Meter(ScriptedBackend(LinearWorld(), [AuthError("401")]), ledger)
    with pytest.raises(AuthError):
        ask(meter, scores(1))
    ask(meter, scores(1))
    assert counts(ledger) == (2, 0, 0)


def test_a_lost_answer_stops_the_next_run_too(ledger: Ledger) -> None:
    backend = ScriptedBackend(LinearWorld(), [LOST])
    meter = Meter(backend, ledger)
    with pytest.raises(UnknownOutcome):
        ask(meter, scores(1))
    with pytest.raises(UnknownOutcome, match="on-lost resend"):
        ask(meter, scores(1))
    assert (backend.asked, ledger.spent()) == (1, 1)


def test_resending_is_paid(ledger: Ledger) -> None:
    backend = ScriptedBackend(LinearWorld(), [LOST])
    meter = Meter(backend, ledger, on_lost="resend", clock=FakeClock())
    ask(meter, scores(1))
    assert backend.asked == 2
    assert counts(ledger) == (2, 1, 0)


def test_an_idempotent_endpoint_bills_a_lost_answer_once(ledger: Ledger, tmp_path: Path) -> None:
    world = BillingBackend(LinearWorld(), tmp_path / "bill", honours_keys=True)
    backend = ScriptedBackend(world, [with_values(_lose)] * 4)
    meter = Meter(backend, ledger, clock=FakeClock())
    with pytest.raises(UnknownOutcome):
        ask(meter, scores(1))
    assert backend.asked == 3
    assert counts(ledger) == (1, 1, 0)
    ask(meter, scores(1))
    assert counts(ledger) == (1, 0, 0)
    assert len(billed(tmp_path / "bill")) == 1


@pytest.mark.parametrize("second", [NotSent("no route", final=True), Refused("422")])
def test_a_resend_that_fails_does_not_refund_the_first(
    ledger: Ledger, tmp_path: Path, second: Exception
) -> None:
    """Billed once, lost, sent again and refused: the bill is still there."""
    inner = LinearWorld(declare(refusals_free=True))
    world = BillingBackend(inner, tmp_path / "bill", honours_keys=True)
    backend = ScriptedBackend(world, [with_values(_lose), second])
    with pytest.raises(type(second)):
        ask(Meter(backend, ledger, clock=FakeClock()), scores(1))
    assert len(billed(tmp_path / "bill")) == 1 == ledger.spent()


# -- sent again ------------------------------------------------------------------------------

NO_ROUTE = NotSent("no route")
LATER = RateLimited("429", retry_after=2.0)
AGAIN: list[Any] = [
    # faults, capabilities, on_lost, asked, charged, seconds; None: it is answered in the end
    ([NO_ROUTE, NO_ROUTE], {}, "stop", 3, 1, (1.5, 2.1), None),
    ([NO_ROUTE] * 3, {}, "stop", 3, 0, (1.5, 2.1), NotSent),
    ([LATER, LATER], {}, "stop", 3, 3, (4.0, 4.0), None),
    ([LATER, LATER], {"refusals_free": True}, "stop", 3, 1, (4.0, 4.0), None),
    ([LATER] * 3, {}, "stop", 3, 3, (4.0, 4.0), RateLimited),
    ([RateLimited("429", final=True)], {}, "stop", 1, 1, (0, 0), RateLimited),
    ([RateLimited("429", retry_after=3600.0)], {}, "stop", 1, 1, (0, 0), RateLimited),
    ([QuotaError("402")], {}, "resend", 1, 1, (0, 0), QuotaError),
    ([LOST], {"idempotent": True}, "stop", 2, 1, (0.5, 0.8), None),
    ([LOST, LOST], {}, "resend", 3, 3, (1.5, 2.1), None),
    ([UnknownOutcome("503", final=True)], {}, "resend", 1, 1, (0, 0), UnknownOutcome),
    ([ContractError("no JSON")], {}, "resend", 2, 2, (0.5, 0.8), None),
    ([ContractError("no JSON")], {"idempotent": True}, "resend", 1, 1, (0, 0), ContractError),
    ([other_model], {}, "resend", 1, 1, (0, 0), ModelChanged),
]


@pytest.mark.parametrize(
    ("faults", "changes", "on_lost", "asked", "charged", "seconds", "error"), AGAIN
)
def test_sending_again(
    ledger: Ledger,
    faults: list[Any],
    changes: dict[str, Any],
    on_lost: Any,
    asked: int,
    charged: int,
    seconds: tuple[float, float],
    error: type[BaseException] | None,
) -> None:
    world, clock = LinearWorld(declare(**changes)), FakeClock()
    backend, started = ScriptedBackend(world, faults), clock.now()
    meter = Meter(backend, ledger, on_lost=on_lost, clock=clock)
    if error is None:
        np.testing.assert_array_equal(ask(meter, scores(1))[0], world.values(scores(1)))
    else:
        with pytest.raises(error):
            ask(meter, scores(1))
    assert (backend.asked, ledger.spent()) == (asked, charged)
    assert seconds[0] <= clock.now() - started <= seconds[1] + 1e-9


def test_a_storm_empties_the_allowance_for_retries(ledger: Ledger) -> None:
    """Row 19: every other request fails; retries stop at the allowance, not at the budget."""
    backend = ScriptedBackend(LinearWorld(), [LOST, None] * 400)
    meter = Meter(backend, ledger, on_lost="resend", clock=FakeClock())
    with pytest.raises(UnknownOutcome):
        ask(meter, *map(scores, range(300)))
    answered = ledger.totals().queries - ledger.totals().unknown
    retries = backend.asked - answered - 1
    assert 11 <= retries <= 11 + 0.1 * answered


def test_one_bad_answer_of_a_batch_loses_no_other(ledger: Ledger) -> None:
    """Row 33: 31 are kept and charged, one is classed alone."""
    spoil_one: Any = lambda answers: [*answers[:3], ContractError("a bad item"), *answers[4:]]  # noqa: E731
    backend = ScriptedBackend(LinearWorld(declare(requests_per_batch=32)), [spoil_one])
    questions = [*map(scores, range(40))]
    with pytest.raises(ContractError, match="a bad item"):
        ask(Meter(backend, ledger), *questions)
    assert counts(ledger) == (40, 1, 0)  # the second batch was asked all the same
    identity = backend.capabilities.identity
    missing = [i for i, q in enumerate(questions) if ledger.answer(query_key(q, identity)) is None]
    assert missing == [3]


def test_only_what_failed_is_sent_again(ledger: Ledger) -> None:
    lose_one: Any = lambda answers: [answers[0], LOST, *answers[2:]]  # noqa: E731
    world = LinearWorld(declare(requests_per_batch=4, idempotent=True))
    ask(
        Meter(ScriptedBackend(world, [lose_one]), ledger, clock=FakeClock()), *map(scores, range(4))
    )
    assert [len(world.requests), ledger.spent()] == [5, 4]


def test_a_batch_that_is_sent_again_takes_its_size_from_the_allowance(ledger: Ledger) -> None:
    """Retries are at most a tenth of the queries, however many of them travel together."""
    world = LinearWorld(declare(requests_per_batch=20, refusals_free=True))
    busy: Any = lambda answers: [RateLimited("429", retry_after=1.0)] * len(answers)  # noqa: E731
    backend = ScriptedBackend(world, [busy, None] * 100)
    with pytest.raises(RateLimited):
        ask(Meter(backend, ledger, clock=FakeClock()), *map(scores, range(480)))
    retries = backend.asked - 1 - ledger.spent() // 20  # the last one was not sent again
    assert 11 <= retries <= 11 + 0.1 * ledger.spent() / 20


def test_a_query_is_not_sent_again_after_its_deadline(ledger: Ledger) -> None:
    clock = FakeClock()

    class Slow(LinearWorld):
        async def answer(self, requests: Sequence[Request]) -> list[Any]:
            self.asked += 1
            clock.advance(400.0)
            return [LOST]

    world = Slow(declare(idempotent=True))
    meter = Meter(world, ledger, clock=clock)
    with pytest.raises(UnknownOutcome):
        ask(meter, scores(1))
    assert world.asked == 2  # the third would have left after 800 s
    clock.advance(4000.0)
    with pytest.raises(UnknownOutcome):
        ask(meter, scores(1))
    assert world.asked == 4  # another run, another 600 s


@pytest.mark.parametrize("other", [AuthError("401"), LOST], ids=["refused", "lost"])
def test_what_ends_the_run_is_not_hidden_by_a_broken_answer(
    ledger: Ledger, other: BackendError
) -> None:
    """Of a batch with both, the error that stops everything counts."""
    both: Any = lambda answers: [ContractError("a bad item"), other, *answers[2:]]  # noqa: E731
    backend = ScriptedBackend(LinearWorld(declare(requests_per_batch=4)), [both])
    with pytest.raises(type(other)):
        ask(Meter(backend, ledger), *map(scores, range(8)))
    assert backend.asked == 1


def test_three_broken_answers_in_a_row_stop_the_run(ledger: Ledger) -> None:
    broken = ContractError("an error page")
    backend = ScriptedBackend(LinearWorld(), [broken, broken, None] * 3 + [broken] * 9)
    with pytest.raises(ContractError):
        ask(Meter(backend, ledger), *map(scores, range(40)))
    assert backend.asked == 12


def test_answers_without_a_signal_stop_the_run(ledger: Ledger) -> None:
    backend = ScriptedBackend(LinearWorld(), [with_values(np.ones_like)] * 50)
    with pytest.raises(ContractError, match="same score"):
        ask(Meter(backend, ledger), *map(scores, range(40)))
    assert backend.asked == MOST_CONSTANT


@pytest.mark.parametrize(
    ("total", "changes", "fine"),
    [
        (0.7, {}, False),
        (1.3, {}, False),
        (0.7, {"top_k": 3}, True),
        (1.3, {"top_k": 3}, False),
        (0.99, {}, True),
        (0.9, {"decimals": 1}, True),
    ],
)
def test_softmax_sums_to_one(
    ledger: Ledger, total: float, changes: dict[str, Any], fine: bool
) -> None:
    world = LinearWorld(declare(score_kind=ScoreKind.SOFTMAX, **changes))
    values = np.array([[total - 0.3, 0.2, 0.1]], dtype=np.float32)
    meter = Meter(ScriptedBackend(world, [with_values(lambda v: values)]), ledger)
    if fine:
        ask(meter, scores(1))
    else:
        with pytest.raises(ContractError, match="sum"):
            ask(meter, scores(1))


def test_the_canary_measures_noise_for_one_query(ledger: Ledger) -> None:
    """Row 32: the same question, another answer."""
    world = LinearWorld(declare(images_per_request=1))
    backend = ScriptedBackend(world, [None, None, with_values(lambda v: v + 0.25)])
    meter, question = Meter(backend, ledger), scores(1, pictures=2)
    ask(meter, question)
    assert run_sync(meter.canary(question)) == pytest.approx(0.25, rel=1e-5)
    assert run_sync(meter.canary(question)) == pytest.approx(0.25, rel=1e-5)
    assert ledger.spent() == 3
    assert ledger.by_purpose() == {"search": 2, "canary": 1}


def test_a_reported_cost_replaces_the_reserved_one(path: Path) -> None:
    price = Price(per_million_tokens=10.0, most_tokens=50_000)
    report: Any = lambda answers: [replace(answer, cost=0.1) for answer in answers]  # noqa: E731
    backend = ScriptedBackend(LinearWorld(declare(price=price)), [report] * 50)
    with Ledger(path, 50, max_cost=1.0) as ledger:
        with pytest.raises(BudgetError, match="USD"):
            ask(Meter(backend, ledger), *map(scores, range(50)))
        # 0.5 is reserved for each: the sixth may leave with 0.5 spent, the seventh may not
        assert (backend.asked, ledger.totals().cost) == (6, pytest.approx(0.6))


def test_a_cost_that_is_none_is_no_cost(ledger: Ledger) -> None:
    """Less than nothing would be a refund, and NaN could not be written."""
    report: Any = lambda answers: [replace(answer, cost=-1.0) for answer in answers]  # noqa: E731
    backend = ScriptedBackend(LinearWorld(declare(price=Price(per_request=0.5))), [report])
    with pytest.raises(ContractError, match="cost"):
        ask(Meter(backend, ledger), scores(1))
    assert (counts(ledger), ledger.totals().cost) == ((1, 1, 0), 0.5)


def _lose(values: Array) -> Array:
    raise LOST


# -- the budget -----------------------------------------------------------------------------


def test_the_budget_is_spent_to_the_last_query_and_no_further(path: Path) -> None:
    world = LinearWorld(declare(concurrency=8))
    with Ledger(path, 10) as ledger:
        with pytest.raises(BudgetError):
            ask(Meter(world, ledger), *map(scores, range(50)))
        assert len(world.requests) == 10
        assert counts(ledger) == (10, 0, 0)


def test_a_batch_that_the_budget_cannot_pay_does_not_leave(path: Path) -> None:
    world = LinearWorld(declare(requests_per_batch=4))
    with Ledger(path, 10) as ledger:
        with pytest.raises(BudgetError, match="4 more are wanted"):
            ask(Meter(world, ledger), *map(scores, range(12)))
        assert (len(world.requests), ledger.spent()) == (8, 8)


def test_money_stops_the_meter(path: Path) -> None:
    world = LinearWorld(declare(price=Price(per_request=0.3)))
    with Ledger(path, 10, max_cost=1.0) as ledger:
        with pytest.raises(BudgetError, match="USD"):
            ask(Meter(world, ledger), *map(scores, range(5)))
        assert (world.asked, ledger.totals().cost) == (3, 0.9)


# -- in parallel ----------------------------------------------------------------------------


class Gate(LinearWorld):
    """A world that answers only when all its places are taken, and does something then."""

    def __init__(self, places: int, then: Callable[[int], Awaitable[None]]) -> None:
        super().__init__(declare(concurrency=places))
        self._full, self._then, self._places = asyncio.Event(), then, places

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        place = self.asked
        answers = await super().answer(requests)
        if self.asked >= self._places:
            self._full.set()
        await self._full.wait()
        await self._then(place)
        return answers


def test_an_error_lets_the_others_finish_and_nobody_start(ledger: Ledger) -> None:
    async def then(place: int) -> None:
        if place == 1:
            raise AuthError("401")
        await asyncio.sleep(0)  # the refusal is first

    world = Gate(4, then)
    with pytest.raises(AuthError):
        ask(Meter(world, ledger), *map(scores, range(40)))
    assert world.asked == 4
    assert counts(ledger) == (4, 0, 0)
    keys = [query_key(scores(index), world.capabilities.identity) for index in range(4)]
    assert [ledger.answer(key) is not None for key in keys] == [True, False, True, True]


def test_an_error_stops_those_who_wait(ledger: Ledger) -> None:
    """The key is revoked while others wait for their turn: none of them leaves."""

    class Revoked(LinearWorld):
        async def answer(self, requests: Sequence[Request]) -> list[Any]:
            self.asked += 1
            asked = self.asked
            await asyncio.sleep(0.001 * asked)
            return [RateLimited("429", retry_after=5.0) if asked <= 8 else AuthError("401")]

    world, clock = Revoked(declare(concurrency=8)), FakeClock()
    with pytest.raises(AuthError):
        ask(Meter(world, ledger, clock=clock), *map(scores, range(40)))
    assert world.asked <= 8 + 4  # what the halved window let leave before the answer came


def test_the_error_that_is_raised_is_the_first(ledger: Ledger) -> None:
    """Not the first worker's, which stopped because of another one."""

    async def then(place: int) -> None:
        await asyncio.sleep(0.01 * (3 - place))
        raise (Refused("422"), QuotaError("402"), AuthError("401"))[place]

    with pytest.raises(AuthError):
        ask(Meter(Gate(3, then), ledger), *map(scores, range(3)))


def test_an_error_of_the_caller_stops_the_run_and_loses_no_answer(ledger: Ledger) -> None:
    def on_spent(spent: int) -> None:
        if spent >= 8:
            raise BrokenPipeError("nobody reads the progress")

    world = LinearWorld(declare(concurrency=4))
    with pytest.raises(BrokenPipeError):
        ask(Meter(world, ledger, on_spent=on_spent), *map(scores, range(40)))
    assert world.asked == 8
    assert counts(ledger) == (8, 0, 0)
    with pytest.raises(BrokenPipeError):  # also where the last commit tells it
        ask(Meter(world, ledger, on_spent=on_spent), scores(1), scores(50))


def test_two_observations_at_a_time(ledger: Ledger) -> None:
    async def then(place: int) -> None:
        await asyncio.sleep(0.001 * place)

    async def work() -> list[list[Array]]:
        meter = Meter(Gate(2, then), ledger)
        first = asyncio.ensure_future(meter.observe([scores(1), scores(2)], "search"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return [await meter.observe([scores(3)], "search"), await first]

    assert [len(answers) for answers in run_sync(work())] == [1, 2]
    assert counts(ledger) == (3, 0, 0)


def test_a_stop_settles_what_is_in_flight_and_the_next_run_goes_on(
    ledger: Ledger, path: Path
) -> None:
    """Row 39: Ctrl-C once."""
    stop = False

    async def then(place: int) -> None:
        nonlocal stop
        stop = True

    world = Gate(4, then)
    with pytest.raises(Interrupted, match="everything settled is kept"):
        ask(Meter(world, ledger, should_stop=lambda: stop), *map(scores, range(10)))
    assert world.asked == 4
    assert counts(ledger) == (4, 0, 0)
    rest = LinearWorld()
    with Ledger(path) as again:
        results = ask(Meter(rest, again), *map(scores, range(10)))
        assert (len(results), rest.asked, again.spent()) == (10, 6, 10)


def test_a_second_interrupt_leaves_what_is_in_flight_charged(ledger: Ledger) -> None:
    """Row 39: Ctrl-C twice cancels the run; nothing is sent again and the books add up."""

    async def main() -> None:
        async def then(place: int) -> None:
            task.cancel()
            await asyncio.Event().wait()

        world = Gate(3, then)
        task = asyncio.ensure_future(
            Meter(world, ledger).observe([scores(i) for i in range(9)], "search")
        )
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.asked == 3

    asyncio.run(main())
    assert counts(ledger) == (3, 3, 0)


def test_no_more_batches_in_flight_than_declared(ledger: Ledger) -> None:
    flying, most = 0, 0

    class Counting(LinearWorld):
        async def answer(self, requests: Sequence[Request]) -> list[Answer]:
            nonlocal flying, most
            flying += 1
            most = max(most, flying)
            await asyncio.sleep(0)
            flying -= 1
            return await super().answer(requests)

    ask(Meter(Counting(declare(concurrency=3)), ledger), *map(scores, range(20)))
    assert most == 3


def test_it_works_inside_a_running_loop(ledger: Ledger) -> None:
    async def notebook() -> list[Array]:
        return ask(Meter(LinearWorld(), ledger), scores(1))

    assert len(asyncio.run(notebook())) == 1

    async def failing() -> None:
        ask(Meter(ScriptedBackend(LinearWorld(), [LOST]), ledger), scores(2))

    with pytest.raises(UnknownOutcome):
        asyncio.run(failing())


# -- storage --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["query_only = ON", "max_page_count = 1"])
def test_no_request_leaves_when_it_cannot_be_reserved(ledger: Ledger, fault: str) -> None:
    """Row 41: read-only, disk full."""
    world = LinearWorld(declare(requests_per_batch=40))
    meter = Meter(world, ledger)
    ask(meter, scores(0))
    ledger._db.execute(f"PRAGMA {fault}")
    with pytest.raises(StorageError):
        ask(meter, *map(scores, range(1, 400)))
    assert len(world.requests) == ledger.spent() <= 81


class FailingWrites:
    """A connection whose n-th write and all later ones fail, as a dying disk."""

    def __init__(self, db: sqlite3.Connection, nth: int) -> None:
        self._db, self._left = db, nth

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if sql.split()[0] in {"BEGIN", "UPDATE", "INSERT", "COMMIT", "DELETE"}:
            self._left -= 1
            if self._left < 0:
                raise sqlite3.OperationalError("disk I/O error")
        return self._db.execute(sql, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


@pytest.mark.parametrize("nth", range(24))
def test_the_nth_write_fails(path: Path, nth: int) -> None:
    """Row 41: wherever the disk fails, every request that left is charged on disk."""
    world = LinearWorld()
    with Ledger(path, 100) as ledger:
        db = ledger._db
        ledger._db = FailingWrites(db, nth)  # type: ignore[assignment]
        with pytest.raises(StorageError, match="disk I/O error"):
            ask(Meter(world, ledger), *map(scores, range(10)))
        ledger._db = db
    with Ledger(path) as again:
        charged, unknown, still_open = counts(again)
        assert world.asked == charged
        assert (unknown, still_open) in {(0, 0), (0, 1)}


def test_a_poisoned_answer_is_not_replayed(ledger: Ledger) -> None:
    """Row 46: what the ledger holds is checked as if it came from the endpoint."""
    world = LinearWorld()
    meter = Meter(world, ledger)
    ask(meter, scores(1))
    poison = np.full((1, 3), np.nan, np.float32).tobytes()
    ledger._db.execute("UPDATE answer SET data = ?", (poison,))
    with pytest.raises(StorageError, match="backup"):
        ask(meter, scores(1))
    assert world.asked == 1


def test_an_open_attempt_of_another_process_is_not_asked_twice(ledger: Ledger) -> None:
    world = LinearWorld()
    ledger.reserve([Entry(query_key(scores(1), world.capabilities.identity), "search", 1, 3)])
    with pytest.raises(UnknownOutcome):
        ask(Meter(world, ledger), scores(1))
    assert (world.asked, ledger.spent()) == (0, 1)
