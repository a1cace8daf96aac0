"""SIGKILL at any moment: billed <= spent <= budget, and nothing settled is paid again (row 38).

A fresh interpreter forks one child per run, so that a kill costs milliseconds. The bill is a file
that the backend writes, outside the client's books.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from doubles import LinearWorld, billed, declare, scores

from blackbox_vlm.backend import query_key
from blackbox_vlm.errors import UnknownOutcome
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.running import run_sync

pytestmark = pytest.mark.slow

CHILD = """
import os, resource, signal, sys
from pathlib import Path
from doubles import BillingBackend, LinearWorld, declare, scores
from blackbox_vlm.commits import GroupCommit
from blackbox_vlm.errors import BlackboxError
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.running import run_sync

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, nth):
    original, calls = getattr(owner, name), []
    def hooked(*args, **named):
        calls.append(name)
        if len(calls) == nth:
            die()
        return original(*args, **named)
    setattr(owner, name, hooked)

def after(owner, name, nth):
    original, calls = getattr(owner, name), []
    def hooked(*args, **named):
        result = original(*args, **named)
        calls.append(name)
        if len(calls) == nth:
            die()
        return result
    setattr(owner, name, hooked)

def kill_at(point, nth, ledger):
    if point == "before commit":
        before(GroupCommit, "_commit", nth)
    elif point == "inside reserve":
        after(Ledger, "reserve", nth)
    elif point == "after reserve":
        after(GroupCommit, "_commit", nth)
    elif point == "in flight":
        after(BillingBackend, "_charge", nth)
    elif point == "after answer":
        before(Ledger, "settle", nth)
    elif point == "inside settle":
        before(Ledger, "_store", nth)
    elif point == "after settle":
        after(GroupCommit, "_commit", nth + 1)
    elif point == "during checkpoint":
        ledger._db.set_trace_callback(lambda sql: sql.startswith("DELETE FROM answer") and die())

def run(folder, queries, budget, honours, on_lost, batch, concurrency, point, nth, disk):
    if disk:  # a disk that is full at so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    world = LinearWorld(declare(requests_per_batch=batch, concurrency=concurrency))
    backend = BillingBackend(world, folder / "bill", honours_keys=honours)
    with Ledger(folder / "ledger.sqlite", budget) as ledger:
        kill_at(point, nth, ledger)
        meter = Meter(backend, ledger, on_lost=on_lost)
        run_sync(meter.observe([scores(i) for i in range(queries)], "search"))
        if point == "during checkpoint":
            ledger.checkpoint("state", b"new", absorbs=["search"])

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            folder, *options = eval(line)
            run(Path(folder), *options)
        except BlackboxError as error:
            os.write(2, f"{type(error).__name__}: {error}\\n".encode())
            os._exit(error.exit_code)
        except BaseException as error:
            os.write(2, f"{error!r}\\n".encode())
            os._exit(99)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Runner:
    """Starts runs in processes of their own, one at a time."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent)])
        self._python = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            text=True,
            bufsize=1,
        )

    def start(
        self,
        folder: Path,
        *,
        queries: int,
        budget: int,
        honours: bool = False,
        on_lost: str = "stop",
        batch: int = 1,
        concurrency: int = 1,
        point: str = "",
        nth: int = 1,
        disk: int = 0,
    ) -> int:
        """Start a run and return its process id."""
        options = (queries, budget, honours, on_lost, batch, concurrency, point, nth, disk)
        assert self._python.stdin is not None
        self._python.stdin.write(f"{(str(folder), *options)!r}\n")
        return self._line()

    def over(self, seconds: float) -> bool:
        """Whether the run ends within so many seconds."""
        assert self._python.stdout is not None
        return bool(select.select([self._python.stdout], [], [], seconds)[0])

    def status(self) -> int:
        """How the run ended: its exit code, or -9 when it was killed."""
        return os.waitstatus_to_exitcode(self._line())

    def close(self) -> None:
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        self._python.stdin.close()
        self._python.wait(timeout=30)
        self._python.stdout.close()

    def _line(self) -> int:
        assert self._python.stdout is not None
        return int(self._python.stdout.readline())


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


def check_books(folder: Path, budget: int) -> int:
    """What holds after any crash; returns what was spent."""
    path = folder / "ledger.sqlite"
    if not path.exists() or path.stat().st_size == 0:
        assert billed(folder / "bill") == []
        return 0
    with Ledger(path, budget) as ledger:
        spent = ledger.spent()
        assert ledger._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        rows = ledger._db.execute("SELECT count(*) FROM attempt WHERE outcome != 'refunded'")
        assert rows.fetchone()[0] == spent
    assert len(billed(folder / "bill")) <= spent <= budget
    return spent


def check_answers(folder: Path, queries: int) -> None:
    """Every answer is there, and is the right one: a replay needs no backend."""
    world = LinearWorld()
    with Ledger(folder / "ledger.sqlite") as ledger:
        results = run_sync(Meter(world, ledger).observe([scores(i) for i in range(queries)], "x"))
        assert world.asked == 0
    for index, result in enumerate(results):
        np.testing.assert_array_equal(result, world.values(scores(index)))


@pytest.mark.parametrize("honours", [True, False], ids=["idempotent", "not idempotent"])
@pytest.mark.parametrize(("batch", "concurrency"), [(1, 1), (3, 2)])
def test_twenty_kills(
    runner: Runner, tmp_path: Path, honours: bool, batch: int, concurrency: int
) -> None:
    queries, kills = 200 if batch == 1 else 300, 0
    at_risk = batch * concurrency  # so many may be in flight at a kill
    budget = queries if honours else queries + 20 * at_risk
    rng = np.random.default_rng([batch, honours])
    while kills < 20:
        before = len(billed(tmp_path / "bill"))
        target = before + int(rng.integers(0, 6))
        pid = runner.start(
            tmp_path,
            queries=queries,
            budget=budget,
            honours=honours,
            on_lost="resend",
            batch=batch,
            concurrency=concurrency,
        )
        # the moment is the bill's length plus a little: it does not depend on the machine's speed
        while len(billed(tmp_path / "bill")) < target and not runner.over(0.0005):
            pass
        assert not runner.over(float(rng.uniform(0, 0.003))), "all was done before 20 kills"
        os.kill(pid, signal.SIGKILL)
        assert runner.status() == -signal.SIGKILL
        kills += 1
        check_books(tmp_path, budget)
    runner.start(
        tmp_path,
        queries=queries,
        budget=budget,
        honours=honours,
        on_lost="resend",
        batch=batch,
        concurrency=concurrency,
    )
    assert runner.status() == 0
    spent = check_books(tmp_path, budget)
    check_answers(tmp_path, queries)
    bill = Counter(billed(tmp_path / "bill"))
    assert len(bill) == queries
    if honours:
        assert spent == queries == bill.total()
    else:
        assert bill.total() <= spent <= queries + 20 * at_risk


POINTS = [
    # point, spent, billed, answers stored, around the third query or at the end; one commit settles
    # a query and reserves the next
    ("before commit", 2, 2, 1),
    ("inside reserve", 2, 2, 1),
    ("after reserve", 3, 2, 2),
    ("in flight", 3, 3, 2),
    ("after answer", 3, 3, 2),
    ("inside settle", 3, 3, 2),
    ("after settle", 4, 3, 3),
    ("during checkpoint", 6, 6, 6),
]


@pytest.mark.parametrize("honours", [True, False], ids=["idempotent", "not idempotent"])
@pytest.mark.parametrize(("point", "spent", "paid", "stored"), POINTS)
def test_a_kill_at_each_point(
    runner: Runner, tmp_path: Path, point: str, spent: int, paid: int, stored: int, honours: bool
) -> None:
    runner.start(tmp_path, queries=6, budget=7, honours=honours, point=point, nth=3)
    assert runner.status() == -signal.SIGKILL
    assert check_books(tmp_path, 7) == spent
    assert len(billed(tmp_path / "bill")) == paid
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        keys = [query_key(scores(i), declare().identity) for i in range(6)]
        assert sum(ledger.answer(key) is not None for key in keys) == stored
        assert ledger.totals().open == spent - stored
        assert ledger.restore("state") is None

    lost = spent - stored
    runner.start(tmp_path, queries=6, budget=7, honours=honours)
    if lost and not honours:
        assert runner.status() == UnknownOutcome.exit_code
        assert check_books(tmp_path, 7) == spent
        runner.start(tmp_path, queries=6, budget=7, on_lost="resend")
    assert runner.status() == 0
    assert check_books(tmp_path, 7) == (6 if honours else 6 + lost)
    check_answers(tmp_path, 6)
    bill = Counter(billed(tmp_path / "bill"))
    assert set(bill) == set(keys)
    settled_once = all(bill[key] == 1 for key in keys[:stored])
    assert settled_once
    assert bill.total() == (6 if honours or paid == stored else 7)


@pytest.mark.parametrize("kib", [0.5, 6, 40, 100])
def test_a_disk_that_fills_up(runner: Runner, tmp_path: Path, kib: float) -> None:
    """Row 41: no file may grow over a limit. What left is charged; with room, the run goes on."""
    runner.start(tmp_path, queries=60, budget=60, honours=True, disk=int(kib * 1024))
    status = runner.status()
    assert status == 6, "no StorageError"
    check_books(tmp_path, 60)
    runner.start(tmp_path, queries=60, budget=60, honours=True)
    assert runner.status() == 0
    assert check_books(tmp_path, 60) == len(billed(tmp_path / "bill")) == 60
    check_answers(tmp_path, 60)


def test_two_processes_share_one_budget(tmp_path: Path) -> None:
    """Row 36: both ask the same questions of one ledger; together they pay for the budget."""
    runners = [Runner() for _ in range(2)]
    try:
        for index, runner in enumerate(runners):
            (tmp_path / "bill").touch()
            runner.start(tmp_path, queries=100 + index, budget=60, on_lost="resend", concurrency=3)
        assert [runner.status() for runner in runners] == [3, 3]
    finally:
        for runner in runners:
            runner.close()
    assert check_books(tmp_path, 60) == len(billed(tmp_path / "bill")) == 60
