"""What people see while a run works, where there is no terminal."""

from __future__ import annotations

import io

import pytest

from blackbox_vlm import progress
from blackbox_vlm.plan import Method, Plan, Step
from blackbox_vlm.progress import Reporter
from blackbox_vlm.search import Progress


def test_lines_say_spent_left_best_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 20))  # seconds; every line is due
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    plan = Plan(Method.CRAFT, 100, (Step("search", 80, 0, 0, 0.0, ""),))
    with Reporter(stream) as reporter:
        reporter.plan(plan)
        reporter.spent(40)
        reporter.progress(Progress("search", 1, 2, 1.5))
        reporter.progress(Progress("search", 2, 2, 1.7))
        reporter.spent(80)
    first, *rest = stream.getvalue().splitlines()
    assert first == "plan: 80 of 100 queries, method craft"
    assert rest[0] == "40 spent, 60 left"
    assert "search 2/2, best fitness so far 1.5000" in rest[2]
    assert rest[-1].startswith("80 spent, 20 left; search 2/2")
    assert rest[-1].endswith("about 0 s to go")
