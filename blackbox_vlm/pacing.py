"""How fast an endpoint may be asked: requests in flight, requests per second, and time off.

One `Pacer` listens to everything that an endpoint says about its limits. A refusal (429) halves
what may be in flight, closes the gate for as long as the endpoint asks, and measures the rate that
the endpoint really grants: what it answered between two refusals, over the time, is its quota, be
it a fixed window or a bucket of tokens. Answers then let both grow again, slowly.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Protocol

from blackbox_vlm.backend import Quota
from blackbox_vlm.errors import Interrupted

LONGEST_WAIT = 60.0  # seconds; who asks for more is asked again when the run is resumed
PAUSE = 1.0  # seconds off after a refusal that names no time; the second time the longest wait
SLICE = 0.5  # seconds between two looks at whether to stop
RESOLUTION = 1e-6  # seconds; no clock can be waited for more exactly
GROWTH = 0.002  # of the rate, per second without a refusal: 12 % in a minute


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
        self._grown = 0.0  # when the rate last grew
        self.begin()

    def begin(self) -> None:
        """Start in a new event loop. What was learned stays."""
        self._line = asyncio.Lock()
        self._freed = asyncio.Event()
        self._flying = []

    async def enter(self) -> float:
        """Wait until a request may leave; returns when that is, for `leave` and what it brings.

        Raises:
            Interrupted: a stop was asked for.
        """
        async with self._line:  # one after the other, in the order of asking
            await self._wait()
            now = self._clock.now()
            if self._since == math.inf:
                self._since = self._grown = now
            self._next = max(now, self._next) + 1 / self._rate
            self._flying.append(now)
            return now

    def leave(self, entered: float) -> None:
        """A request has ended, however it did."""
        self._flying.remove(entered)
        self._freed.set()

    def answered(self, entered: float, quota: Quota | None) -> None:
        """The endpoint did its work, and perhaps said what it will still do."""
        now = self._clock.now()
        self._answered += self._refused_at is None or entered > self._refused_at
        self._window = min(self._most, self._window + 1 / self._window)
        self._rate *= math.exp(GROWTH * min(now - self._grown, LONGEST_WAIT))
        self._grown = now
        if quota is not None:  # what left later is not counted in it yet
            later = sum(other > entered for other in self._flying)
            if quota.remaining <= later:
                self._close(now + quota.resets_in)

    def refused(self, entered: float, retry_after: float | None) -> None:
        """The endpoint would not work now on what left at `entered`."""
        now = self._clock.now()
        news = self._refused_at is None or entered > self._refused_at  # nobody knew when it left
        self._close(now + (self._pause(news) if retry_after is None else retry_after))
        if news:
            self._measure(now + (retry_after or 0.0))
            self._window = max(1.0, self._window / 2)
            self._refused_at = self._grown = now

    async def sleep(self, seconds: float) -> None:
        """Wait; a stop ends it.

        Raises:
            Interrupted: a stop was asked for.
        """
        until = self._clock.now() + seconds
        while (left := until - self._clock.now()) > RESOLUTION:
            self._check_stop()
            await self._clock.sleep(min(left, SLICE))

    def _measure(self, until: float) -> None:
        """Set the rate to what is granted from the end of the last refusal to the end of this one.

        In that time a window grants all that it has, and a bucket fills once for every answer.
        """
        if self._answered and until > self._since:
            self._rate = self._answered / (until - self._since)
        self._since, self._answered = until, 0

    def _pause(self, news: bool) -> float:
        """Seconds off where the endpoint names none."""
        in_vain = news and self._refused_at is not None and not self._answered
        return LONGEST_WAIT if in_vain else PAUSE

    async def _wait(self) -> None:
        while True:
            self._check_stop()
            if len(self._flying) >= int(self._window):
                self._freed.clear()
                await self._freed.wait()
                continue
            wait = max(self._gate, self._next) - self._clock.now()
            if wait <= RESOLUTION:
                return
            await self.sleep(wait)

    def _close(self, until: float) -> None:
        longest = self._clock.now() + LONGEST_WAIT
        self._gate = max(self._gate, min(until, longest))

    def _check_stop(self) -> None:
        if self._should_stop():
            raise Interrupted("stopped on request; everything settled is kept")
