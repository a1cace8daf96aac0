"""The pacer and the meter against rate limits, in simulated time: the quota is used, not abused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import time_travel
from doubles import LinearWorld, ScriptedBackend, declare, scores

from blackbox_vlm.backend import Outcome, Quota, Request
from blackbox_vlm.errors import Interrupted, RateLimited
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.pacing import LONGEST_WAIT, WORK, Pacer

LATENCY = 0.05  # seconds
PER_MINUTE = 300


class Window:
    """So many requests per minute on the clock, then nothing until the next."""

    def __init__(self) -> None:
        self.minute, self.taken = -1, 0

    def take(self, now: float) -> float:
        """0 if a request may pass, or seconds until one may."""
        if int(now // 60) != self.minute:
            self.minute, self.taken = int(now // 60), 0
        self.taken += 1
        return 0.0 if self.taken <= PER_MINUTE else 60 * (self.minute + 1) - now

    @property
    def left(self) -> int:
        return max(0, PER_MINUTE - self.taken)


class Bucket:
    """A bucket of tokens that fills evenly, and holds a few seconds' worth."""

    def __init__(self) -> None:
        self.tokens, self.at = 20.0, 0.0

    def take(self, now: float) -> float:
        self.tokens = min(20.0, self.tokens + (now - self.at) * PER_MINUTE / 60)
        self.at = now
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) * 60 / PER_MINUTE

    @property
    def left(self) -> int:
        return int(self.tokens)


class Limited(LinearWorld):
    """A world behind a rate limit. `told`: what it says about it: nothing, when, or everything."""

    def __init__(self, limit: Window | Bucket, told: str) -> None:
        super().__init__(declare(concurrency=16, refusals_free=True))
        self.limit, self.told, self.refused = limit, told, 0

    async def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        await asyncio.sleep(LATENCY / 2)
        now = asyncio.get_running_loop().time()
        wait = self.limit.take(now)
        await asyncio.sleep(LATENCY / 2)
        if wait:
            self.refused += 1
            return [RateLimited("429", retry_after=None if self.told == "nothing" else wait)]
        [answer] = await super().answer(requests)
        if self.told != "everything":
            return [answer]
        quota = Quota(self.limit.left, 60 - now % 60 if isinstance(self.limit, Window) else 0.1)
        return [type(answer)(answer.values, answer.model_id, quota=quota)]


@pytest.mark.parametrize("told", ["nothing", "when", "everything"])
@pytest.mark.parametrize("limit", [Window, Bucket])
def test_a_quota_is_used_and_not_abused(
    tmp_path: Path, limit: Callable[[], Window | Bucket], told: str
) -> None:
    """At least 95 % of what the endpoint grants; retries are at most 10 % of the queries."""
    minutes, queries = 3, 3 * PER_MINUTE
    world = Limited(limit(), told)

    async def work() -> float:
        with Ledger(tmp_path / "ledger.sqlite", queries) as ledger:
            ledger._db.execute("PRAGMA synchronous = OFF")  # no power is lost here
            meter = Meter(world, ledger, clock=time_travel.LoopClock())
            await meter.observe([scores(index) for index in range(queries)], "search")
            assert ledger.spent() == queries
        return asyncio.get_running_loop().time()

    took = time_travel.run(work())
    least = 60 * (minutes if limit is Window else minutes - 20 / PER_MINUTE)
    assert took <= least / 0.95
    assert world.refused <= 0.1 * queries


class Crowded(LinearWorld):
    """A world that serves eight at a time and refuses the ninth."""

    def __init__(self) -> None:
        super().__init__(declare(concurrency=64, refusals_free=True))
        self.here = self.refused = 0

    async def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        if self.here >= 8:
            self.refused += 1
            return [RateLimited("too many at once", retry_after=0.1)]
        self.here += 1
        await asyncio.sleep(LATENCY)
        self.here -= 1
        return [*await super().answer(requests)]


def test_fewer_are_in_flight_where_the_endpoint_is_crowded(tmp_path: Path) -> None:
    world, queries = Crowded(), 800

    async def work() -> None:
        with Ledger(tmp_path / "ledger.sqlite", queries) as ledger:
            ledger._db.execute("PRAGMA synchronous = OFF")
            meter = Meter(world, ledger, clock=time_travel.LoopClock())
            await meter.observe([scores(index) for index in range(queries)], "search")

    time_travel.run(work())
    assert world.asked == queries
    assert world.refused <= 0.1 * queries


def test_a_stop_ends_a_wait_at_once() -> None:
    async def work() -> float:
        loop = asyncio.get_running_loop()
        pacer = Pacer(1, time_travel.LoopClock(), lambda: loop.time() >= 10)
        entered = await pacer.enter()
        pacer.leave(entered)
        pacer.refused(entered, 50.0)
        with pytest.raises(Interrupted):
            await pacer.enter()
        return loop.time()

    assert 10 <= time_travel.run(work()) < 11


@pytest.mark.parametrize(
    ("retry_after", "quota", "seconds"),
    [
        (2.0, None, 2.0),
        (None, None, 1.0),
        (3600.0, None, LONGEST_WAIT),
        (None, Quota(0, 7.0), 7.0),
        (None, Quota(1, 7.0), 0.0),
        (None, Quota(0, 1e9), LONGEST_WAIT),
    ],
)
def test_how_long_the_gate_is_closed(
    retry_after: float | None, quota: Quota | None, seconds: float
) -> None:
    async def work() -> float:
        pacer = Pacer(2, time_travel.LoopClock())
        entered = await pacer.enter()
        pacer.leave(entered)
        if quota is None:
            pacer.refused(entered, retry_after)
        else:
            pacer.answered(entered, quota)
        return await pacer.enter()

    assert time_travel.run(work()) == pytest.approx(seconds, abs=0.01)


def test_refusals_in_vain_wait_for_the_next_minute() -> None:
    """Three in a row without an answer, the last after a pause: a minute's quota is used up."""

    async def work() -> float:
        pacer = Pacer(2, time_travel.LoopClock())
        first, second = await pacer.enter(), await pacer.enter()
        await asyncio.sleep(LATENCY)
        for entered in (first, second):
            pacer.leave(entered)
            pacer.refused(entered, None)
        third = await pacer.enter()
        await asyncio.sleep(LATENCY)
        pacer.leave(third)
        pacer.refused(third, None)
        return await pacer.enter()

    assert time_travel.run(work()) == pytest.approx(LONGEST_WAIT + 1 + 2 * LATENCY, abs=0.01)


def test_a_query_refused_twice_without_a_word_waits_for_the_next_minute(tmp_path: Path) -> None:
    refusal = RateLimited("429")
    world = ScriptedBackend(LinearWorld(declare(refusals_free=True)), [refusal, refusal])

    async def work() -> float:
        with Ledger(tmp_path / "ledger.sqlite", 1) as ledger:
            await Meter(world, ledger, clock=time_travel.LoopClock()).observe([scores(0)], "search")
        return asyncio.get_running_loop().time()

    assert LONGEST_WAIT < time_travel.run(work()) < LONGEST_WAIT + 2


class Moody(LinearWorld):
    """A world without a quota that refuses now and then, though no question three times."""

    def __init__(self, share: float) -> None:
        super().__init__(declare(concurrency=16, refusals_free=True))
        self.share, self.rng = share, np.random.default_rng(0)
        self.turned_away: Counter[Request] = Counter()

    async def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        await asyncio.sleep(LATENCY)
        [question] = requests
        if self.rng.random() < self.share and self.turned_away[question] < 2:
            self.turned_away[question] += 1
            return [RateLimited("429")]
        return [*await super().answer(requests)]


@pytest.mark.parametrize(("share", "seconds"), [(0.02, 200), (0.05, 800)])
def test_refusals_without_a_quota_do_not_slow_us_down_for_ever(
    tmp_path: Path, share: float, seconds: float
) -> None:
    """Pauses of a second would be 40 and 100 s; counting them as granted time took hours."""
    queries = 2000

    async def work() -> float:
        with Ledger(tmp_path / "ledger.sqlite", queries) as ledger:
            ledger._db.execute("PRAGMA synchronous = OFF")
            meter = Meter(Moody(share), ledger, clock=time_travel.LoopClock())
            await meter.observe([scores(index) for index in range(queries)], "search")
        return asyncio.get_running_loop().time()

    assert time_travel.run(work()) < seconds


def test_what_flew_in_a_dead_loop_is_in_nobodys_way() -> None:
    pacer = Pacer(1, time_travel.LoopClock())

    async def work() -> None:
        pacer.begin()
        await asyncio.wait_for(pacer.enter(), 1)
        waiting = asyncio.ensure_future(pacer.enter())
        await asyncio.sleep(1)
        assert not waiting.done()  # and this loop ends here, with one in flight and one waiting

    time_travel.run(work())
    time_travel.run(work())


def test_no_more_than_most_are_in_flight() -> None:
    async def work() -> None:
        pacer, flying = Pacer(3, time_travel.LoopClock()), []

        async def one() -> None:
            entered = await pacer.enter()
            flying.append(1)
            assert len(flying) <= 3
            await asyncio.sleep(1)
            flying.pop()
            pacer.leave(entered)

        await asyncio.gather(*(one() for _ in range(12)))
        assert asyncio.get_running_loop().time() == pytest.approx(4.0, abs=0.05)

    time_travel.run(work())


def test_answers_that_came_together_do_not_stay_together() -> None:
    """Eight in lockstep would wait for each other's work at every turn."""

    async def work() -> tuple[list[float], float]:
        pacer, sent = Pacer(8, time_travel.LoopClock()), []

        async def ask() -> None:
            for _ in range(10):
                entered = await pacer.enter()
                sent.append(entered)
                await asyncio.sleep(LATENCY)
                pacer.leave(entered)

        await asyncio.gather(*(ask() for _ in range(8)))
        return sorted(sent), asyncio.get_running_loop().time()

    sent, took = time_travel.run(work())
    assert np.diff(sent[:8]).max() == 0  # they start together
    assert np.diff(sent[-8:]).min() > 0.9 * WORK
    assert took < 10 * LATENCY + 10 * WORK
