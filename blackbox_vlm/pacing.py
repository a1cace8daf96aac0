"""How fast an endpoint may be asked: requests in flight, requests per second, and time off.

One `Pacer` listens to everything that an endpoint says about its limits. A refusal (429) halves
what may be in flight, closes the gate for as long as the endpoint asks, and measures the rate that
the endpoint really grants: what it answered between two refusals, over the time, is its quota, be
it a fixed window or a bucket of tokens. Answers then let both grow again. Refusals that come from
no quota must not slow a run down for ever: few of them let the rate fall a little only, and where
it falls and falls without making them rarer, it is forgotten.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from blackbox_vlm.backend import Quota
from blackbox_vlm.errors import Interrupted

LONGEST_WAIT = 60.0  # seconds; who asks for more is asked again when the run is resumed
PAUSE = 1.0  # seconds off after a refusal that names no time
SLICE = 0.5  # seconds between two looks at whether to stop
RESOLUTION = 1e-6  # seconds; no clock can be waited for more exactly
GROWTH = 0.004  # of the rate, per answer: where a quota is met, one request in 22 is refused
WORK = 0.002  # seconds; what we compute for one answer, amply
SMOOTHING = 0.1  # the weight of the last trip in the average
GENTLE = 0.9  # what is left of a rate at least, where few are refused
STEEP = 0.7  # and where fewer than so many outcomes tell:
FEW = 5
IN_VAIN = 3  # refusals in a row; if the last came after a pause, a minute's quota is used up
TREND = 5  # refusals over which a falling rate must have made them rarer
FALLEN = 0.7  # of the rate at the first of these
MANY = 0.15  # a share of refusals that only a quota explains


class Clock(Protocol):
    """Time that never jumps; `blackbox_vlm.testing.FakeClock` is one for tests."""

    def now(self) -> float:
        """Seconds since some moment."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let others work for so long."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Let others work for so long."""
        await asyncio.sleep(seconds)


class _Interval(NamedTuple):
    """What happened between two refusals, and the rate that followed from it."""

    rate: float
    answered: int
    refused: int


class Pacer:
    """Lets requests leave when the endpoint will take them.

    Args:
        most: requests in flight, at most.
        clock: tells the time.
        should_stop: asked while waiting; True ends the wait with `Interrupted`.
    """

    def __init__(
        self, most: int, clock: Clock, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._most = most
        self._clock = clock
        self._should_stop = should_stop
        self._window = float(most)
        self._flying: list[float] = []  # when what is in flight entered
        self._rate = math.inf  # requests per second
        self._next = -math.inf  # when the rate allows another one
        self._gate = -math.inf  # nothing leaves before
        self._refused_at: float | None = None  # last, as far as it was news
        self._since = math.inf  # the end of that refusal, or the first request
        self._answered = 0  # of what left after that refusal
        self._turned_away = 0  # since then
        self._since_before = math.inf  # the end of the refusal before that
        self._answered_before = 0  # of what left between the two
        self._in_a_row = 0  # refusals, without an answer between them
        self._trip = 0.0  # seconds from entering to leaving, on average
        self._history: deque[_Interval] = deque(maxlen=TREND)
        self._line = asyncio.Lock()
        self._freed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self) -> None:
        """Start, perhaps in a new event loop: then what flew in an older one is gone."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what was learned stays
            self._line, self._freed, self._flying = asyncio.Lock(), asyncio.Event(), []
            self._loop = loop

    async def enter(self, *, again: bool = False) -> float:
        """Wait until a request may leave; returns when that is, for `leave` and what it brings.

        Args:
            again: it has left before, and has fewer attempts to lose: it waits a turn longer.

        Raises:
            Interrupted: a stop was asked for.
        """
        async with self._line:  # one after the other, in the order of asking
            await self._wait(1 / self._rate if again else 0.0)
            now = self._clock.now()
            if self._since == math.inf:
                self._since = now
            self._next = max(now, self._next) + max(1 / self._rate, self._apart())
            self._flying.append(now)
            return now

    def leave(self, entered: float) -> None:
        """A request has ended, however it did."""
        self._flying.remove(entered)
        self._trip += SMOOTHING * (self._clock.now() - entered - self._trip)
        self._freed.set()

    def answered(self, entered: float, quota: Quota | None) -> None:
        """The endpoint did its work, and perhaps said what it will still do."""
        if self._refused_at is None or entered > self._refused_at:
            self._answered += 1
        else:
            self._answered_before += 1
        self._in_a_row = 0
        self._window = min(self._most, self._window + 1 / self._window)
        self._rate *= 1 + GROWTH
        if quota is not None:  # what left later is not counted in it yet
            later = sum(other > entered for other in self._flying)
            if quota.remaining <= later:
                self._close(self._clock.now() + quota.resets_in)

    def refused(self, entered: float, retry_after: float | None) -> None:
        """The endpoint would not work now on what left at `entered`."""
        now = self._clock.now()
        news = self._refused_at is None or entered > self._refused_at  # nobody knew when it left
        self._turned_away += 1
        self._in_a_row += 1
        in_vain = news and retry_after is None and self._in_a_row >= IN_VAIN
        pause = LONGEST_WAIT if in_vain else PAUSE if retry_after is None else retry_after
        self._close(now + pause)
        if in_vain:
            self._measure_both(now + pause)
        elif news:
            self._measure(now + (retry_after or 0.0))
        if news:
            self._refused_at = now

    async def sleep(self, seconds: float) -> None:
        """Wait; a stop ends it.

        Raises:
            Interrupted: a stop was asked for.
        """
        until = self._clock.now() + seconds
        while (left := until - self._clock.now()) > RESOLUTION:
            self._check_stop()
            await self._clock.sleep(min(left, SLICE))

    def _apart(self) -> float:
        """Seconds that keep answers from coming all at once, to wait for each other's work.

        Half of what they are apart anyway when all places are taken: it costs no throughput.
        """
        apart = self._trip / self._most / 2
        return min(apart, WORK) if apart > WORK / 2 else 0.0  # below, the timers cost more

    def _measure(self, until: float) -> None:
        """Set the rate to what is granted from the end of the last refusal to the end of this one.

        In that time a window grants all that it has, and a bucket fills once for every answer. But
        the time holds pauses of our own, too, so that `_least` bounds the fall. Of what was granted
        before the first refusal nothing is learned: it may have been saved up. From then on, a few
        at a time find out.
        """
        first = self._refused_at is None
        self._window = max(1.0, self._window / (8 if first else 2))
        if not first and self._answered and until > self._since:
            granted = self._answered / (until - self._since)
            self._rate = max(granted, self._least()) if self._rate < math.inf else granted
            self._history.append(_Interval(self._rate, self._answered, self._turned_away))
            self._doubt()
        self._next_interval(until)

    def _measure_both(self, until: float) -> None:
        """The same over the last two intervals, with both pauses: the first was in vain."""
        answered = self._answered_before + self._answered
        if answered:
            self._rate = answered / (until - self._since_before)
        self._next_interval(until)

    def _next_interval(self, since: float) -> None:
        self._since_before, self._answered_before = self._since, self._answered
        self._since, self._answered, self._turned_away = since, 0, 0

    def _least(self) -> float:
        """How far the rate may fall: all the way only where many refusals tell a quota."""
        outcomes = self._answered + self._turned_away
        if self._turned_away < MANY * outcomes:
            return self._rate * GENTLE
        return self._rate * STEEP if outcomes < FEW else 0.0

    def _doubt(self) -> None:
        """Forget the rate if it fell and fell, and refusals are as rare as before."""
        first, last = self._history[0], self._history[-1]
        if len(self._history) < TREND or last.rate > FALLEN * first.rate:
            return
        refused = sum(interval.refused for interval in self._history)
        if refused < MANY * sum(i.answered + i.refused for i in self._history):
            self._rate = math.inf
            self._history.clear()

    async def _wait(self, longer: float) -> None:
        while True:
            self._check_stop()
            if len(self._flying) >= int(self._window):
                self._freed.clear()
                await self._freed.wait()
                continue
            wait = max(self._gate, self._next + longer) - self._clock.now()
            if wait <= RESOLUTION:
                return
            await self.sleep(wait)

    def _close(self, until: float) -> None:
        longest = self._clock.now() + LONGEST_WAIT
        self._gate = max(self._gate, min(until, longest))

    def _check_stop(self) -> None:
        if self._should_stop():
            raise Interrupted("stopped on request; everything settled is kept")
