"""A clock that tests turn by hand."""

from __future__ import annotations

import asyncio


class FakeClock:
    """A `blackbox_vlm.pacing.Clock` on which waiting takes no time.

    Attributes:
        sleeps: every wait that was asked for, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self.sleeps: list[float] = []

    def now(self) -> float:
        """Seconds since some moment."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds

    async def sleep(self, seconds: float) -> None:
        """Let time pass at once, and the other tasks have their turn."""
        self.sleeps.append(seconds)
        self.advance(seconds)
        await asyncio.sleep(0)
