"""What each kind of fault may cost, as assertions: the rows of the matrix are made of these."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from blackbox_vlm.contract import MOST_BROKEN
from blackbox_vlm.errors import (
    BlackboxError,
    ContractError,
    NotSent,
    Refused,
    UnknownOutcome,
)
from blackbox_vlm.meter import ATTEMPTS
from blackbox_vlm.testing.matrix.bench import HASTY, PATIENT, Bench, Seen
from blackbox_vlm.testing.server import Step

Faults = Mapping[str, Step]  # by name
Waited = tuple[float, float]  # seconds, at least and at most

AT_ONCE: Waited = (0.0, 0.0)
ONE_BACK_OFF: Waited = (0.5, 1.0)
TWO_BACK_OFFS: Waited = (1.5, 2.5)


def expect(
    seen: Seen,
    what: str,
    error: type[BlackboxError] | None,
    *,
    calls: int,
    charged: int,
    waited: Waited = AT_ONCE,
) -> None:
    """The error and the three numbers."""
    told = f"{what}: {seen.error!r}, waited {seen.waited:g} s"
    assert seen.error is None if error is None else isinstance(seen.error, error), told
    assert (seen.calls, seen.charged) == (calls, charged), told
    assert waited[0] - 1e-6 <= seen.waited <= waited[1] + 1e-6, told


def not_sent(bench: Bench, url: str) -> None:
    """Tried again after waiting, charged never; the error names who cannot be reached."""
    seen = bench.ask(url=url, timeout=HASTY)
    expect(seen, url, NotSent, calls=0, charged=0, waited=TWO_BACK_OFFS)
    assert seen.asked == ATTEMPTS
    assert url in str(seen.error)


def lost(bench: Bench, faults: Faults, timeout: float = PATIENT) -> list[Seen]:
    """Charged; sent again only where that is free, or where paying twice was allowed."""
    found = []
    for name, step in faults.items():
        seen = bench.ask([step], timeout=timeout)
        expect(seen, name, UnknownOutcome, calls=1, charged=1)
        assert seen.unknown == 1
        expect(bench.ask(resume=True), name, UnknownOutcome, calls=0, charged=1)
        free = bench.ask([step], timeout=timeout, idempotent=True)
        expect(free, name, None, calls=2, charged=1, waited=ONE_BACK_OFF)
        first, second = free.received
        assert (first.headers, first.body) == (second.headers, second.body), "not the same request"
        paid = bench.ask([step], timeout=timeout, on_lost="resend")
        expect(paid, name, None, calls=2, charged=2, waited=ONE_BACK_OFF)
        found.append(seen)
    return found


def refused(bench: Bench, faults: Faults, error: type[BlackboxError] = Refused) -> list[Seen]:
    """Stops at once; free where that was declared; the run can be resumed."""
    found = []
    for name, step in faults.items():
        for free in (False, True):
            seen = bench.ask([step], refusals_free=free, on_lost="resend")
            expect(seen, name, error, calls=1, charged=not free)
            found.append(seen)
            resumed = bench.ask(resume=True, refusals_free=free)
            expect(resumed, name, None, calls=1, charged=1 + (not free))
    return found


def broken(bench: Bench, faults: Faults) -> None:
    """Charged, never believed; others are asked, but not for ever."""
    for name, step in faults.items():
        seen = bench.ask([step], count=2)
        expect(seen, name, ContractError, calls=2, charged=2)
        assert seen.unknown == 1, f"{name}: the broken answer is none"
        again = bench.ask(count=2, resume=True, on_lost="resend")
        expect(again, name, None, calls=1, charged=3)
        expect(bench.ask([step], idempotent=True), name, ContractError, calls=1, charged=1)
        paid = bench.ask([step], on_lost="resend")
        expect(paid, name, None, calls=2, charged=2, waited=ONE_BACK_OFF)
        always = bench.ask(count=10, usual=step)
        expect(always, name, ContractError, calls=MOST_BROKEN, charged=MOST_BROKEN)


def spoilt(bench: Bench, *faults: str) -> dict[str, Step]:
    """Right answers with these faults, where the protocol can have them."""
    steps = {fault: bench.spoilt(fault) for fault in faults}
    possible = {fault: step for fault, step in steps.items() if step is not None}
    if not possible:
        pytest.skip(f"this protocol's answers cannot have: {', '.join(faults)}")
    return possible
