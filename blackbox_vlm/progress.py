"""What a person sees while a run works: spent and left, best so far, time left.

A moving bar on a terminal; a plain line now and then elsewhere.
"""

from __future__ import annotations

import time
from typing import Self, TextIO

from blackbox_vlm.plan import Plan
from blackbox_vlm.search import Progress

LINE_EVERY = 10.0  # seconds between plain lines
ENOUGH = 20  # queries that a guess of the time left is based on


class Reporter:
    """Reports a run to a stream; use it as a context manager."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._total = 0
        self._budget = 0
        self._spent = 0
        self._first: tuple[float, int] | None = None
        self._last_line = -LINE_EVERY
        self._best: dict[str, float] = {}  # lowest fitness so far, by stage
        self._note = ""
        self._bar = _Bar(stream) if stream.isatty() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def plan(self, plan: Plan) -> None:
        """The run is about to start."""
        self._total, self._budget = plan.queries, plan.budget
        if self._bar:
            self._bar.start(plan.queries)
        else:
            self._line(f"plan: {plan.queries} of {plan.budget} queries, method {plan.method.value}")

    def spent(self, queries: int) -> None:
        """So many queries are charged by now."""
        self._spent = queries
        self._first = self._first or (time.monotonic(), queries)
        self._show()

    def progress(self, progress: Progress) -> None:
        """A generation is done."""
        best = min(progress.best, self._best.get(progress.stage, progress.best))
        self._best[progress.stage] = best
        self._note = (
            f"{progress.stage} {progress.generation}/{progress.generations}, "
            f"best fitness so far {best:.4f}"
        )
        self._show()

    def _show(self) -> None:
        if self._bar:
            self._bar.update(self._spent, self._note)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY or self._spent >= self._total:
            self._last_line = now
            spent = f"{self._spent} spent, {self._budget - self._spent} left"
            self._line("; ".join(filter(None, (spent, self._note, self._time_left(now)))))

    def _time_left(self, now: float) -> str:
        if self._first is None or self._spent - self._first[1] < ENOUGH:
            return ""
        pace = (now - self._first[0]) / (self._spent - self._first[1])
        return f"about {pace * max(0, self._total - self._spent):.0f} s to go"

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class _Bar:
    """The moving bar of a terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("queries"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(file=stream, markup=False),
        )
        self._task = self._progress.add_task("", total=None, note="")

    def start(self, total: int) -> None:
        self._progress.update(self._task, total=total)
        self._progress.start()

    def update(self, spent: int, note: str) -> None:
        self._progress.update(self._task, completed=spent, note=note)

    def stop(self) -> None:
        self._progress.stop()
