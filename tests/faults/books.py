"""Rows F35 to F47: threads, processes, crashes and disks against the budget."""

from __future__ import annotations

import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
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
    scores,
    with_values,
)
from faults.remote import HostedZeroShot, picture, question
from test_crash import POINTS, Runner, check_answers, check_books
from test_tuning import SMALL, files, make_task, options, soft_world

import blackbox_vlm.tuning
from blackbox_vlm.backend import Answer, Request, query_key
from blackbox_vlm.console import StopSignals
from blackbox_vlm.craft.recipes import CRAFT, RECIPES
from blackbox_vlm.errors import (
    BudgetError,
    ContractError,
    InputError,
    Interrupted,
    RunMismatch,
    StorageError,
    UnknownOutcome,
)
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.running import run_sync
from blackbox_vlm.testing import FakeClock, ScriptedServer
from blackbox_vlm.testing.server import replying
from blackbox_vlm.tuning import dry_run, tune

Patch = pytest.MonkeyPatch


def small_recipes(patch: Patch) -> None:
    """A recipe called "small", as `test_tuning` has it."""
    patch.setitem(RECIPES, "small", replace(CRAFT, name="small", **SMALL))


def observe(backend: Any, ledger: Ledger, count: int, **options: Any) -> list[Any]:
    """Ask the first questions of a row, one after the other in the ledger's eyes."""
    meter = Meter(backend, ledger, **options)
    return run_sync(meter.observe([scores(index) for index in range(count)], "row"))


def many_threads(folder: Path, patch: Patch) -> None:
    """F35: every thread asks what the others ask not; the server counts."""
    remote, start = HostedZeroShot(), threading.Barrier(32)
    image = picture(folder)

    def spend(thread: int) -> None:
        start.wait()
        for index in range(4):
            asked = [question(image, f"{thread}.{index}")]
            with suppress(BudgetError):
                run_sync(Meter(backend, ledger).observe(asked, "row"))

    with ScriptedServer(replying(remote.good_answer)) as server:
        backend = remote.make_remote(server.url, 30.0)
        with Ledger(folder / "ledger.sqlite", 100) as ledger:
            threads = [threading.Thread(target=spend, args=(number,)) for number in range(32)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            totals = ledger.totals()
    assert (len(server.received), totals.queries, totals.open) == (100, 100, 0)


def two_processes(folder: Path, patch: Patch) -> None:
    """F36: they share one ledger; a run's folder is one's alone."""
    runners = [Runner(), Runner()]
    try:
        for index, runner in enumerate(runners):
            runner.start(folder, queries=40 + index, budget=20, on_lost="resend")
        assert [runner.status() for runner in runners] == [BudgetError.exit_code] * 2
    finally:
        for runner in runners:
            runner.close()
    assert check_books(folder, 20) == len(billed(folder / "bill")) == 20


def too_small_a_budget(folder: Path, patch: Patch) -> None:
    """F37: no half generation, no half batch."""
    small_recipes(patch)
    world, task = soft_world(), make_task()
    with pytest.raises(InputError, match="--budget"):
        tune(task, world, folder / "run", options(budget=10))
    assert (world.asked, (folder / "run").exists()) == (0, False)
    planned = dry_run(task, world.capabilities, options(budget=61))
    searched = sum(s.queries for s in planned.steps if s.purpose.startswith("search"))
    assert searched % 6 == 0 < searched <= 61
    batches = LinearWorld(declare(requests_per_batch=4))
    with Ledger(folder / "ledger.sqlite", 6) as ledger:
        with pytest.raises(BudgetError):
            observe(batches, ledger, 8)
        assert (len(batches.requests), ledger.spent()) == (4, 4)


def killed_at_each_point(folder: Path, patch: Patch) -> None:
    """F38."""
    runner = Runner()
    try:
        for index, (point, spent, paid, _) in enumerate(POINTS):
            run = folder / str(index)
            run.mkdir()
            runner.start(run, queries=6, budget=7, honours=True, point=point, nth=3)
            assert runner.status() == -signal.SIGKILL
            assert (check_books(run, 7), len(billed(run / "bill"))) == (spent, paid), point
            runner.start(run, queries=6, budget=7, honours=True)
            assert runner.status() == 0
            assert check_books(run, 7) == len(set(billed(run / "bill"))) == 6, point
            check_answers(run, 6)
    finally:
        runner.close()


class Interrupting(LinearWorld):
    """Gets signals while it answers its second question."""

    def __init__(self, *signals: signal.Signals) -> None:
        super().__init__()
        self._signals = signals

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        answers = await super().answer(requests)
        for number in self._signals if self.asked == 2 else ():
            signal.raise_signal(number)
        return answers


def interrupted(folder: Path, patch: Patch) -> None:
    """F39: one signal lets what is in flight end; two end it now."""
    for signals, error, unknown in (
        ([signal.SIGINT], Interrupted, 0),
        ([signal.SIGTERM], Interrupted, 0),
        ([signal.SIGTERM, signal.SIGINT], KeyboardInterrupt, 1),
    ):
        world = Interrupting(*signals)
        path = folder / f"{len(signals)}{signals[0]}.sqlite"
        with Ledger(path, 5) as ledger, StopSignals(folder) as stop:
            with suppress(error):
                observe(world, ledger, 5, should_stop=stop.is_set, on_lost="resend")
                pytest.fail("it was not interrupted")
            totals = ledger.totals()
        assert (world.asked, totals.queries, totals.unknown, totals.open) == (2, 2, unknown, 0)
    assert Interrupted.exit_code == 130


def power_loss(folder: Path, patch: Patch) -> None:
    """F40: whatever part of the log after a settled row is gone, the row is there."""
    path, world = folder / "ledger.sqlite", LinearWorld()
    wal = folder / "ledger.sqlite-wal"
    with Ledger(path, 9) as ledger:
        ledger._db.execute("PRAGMA wal_autocheckpoint = 0")
        assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL: synced commits
        observe(world, ledger, 2)
        settled = wal.stat().st_size
        observe(world, ledger, 3)
        base, log = path.read_bytes(), wal.read_bytes()
    for cut in (settled, settled + 1, (settled + len(log)) // 2, len(log) - 1):
        (folder / "cut.sqlite").write_bytes(base)
        (folder / "cut.sqlite-wal").write_bytes(log[:cut])
        idle = LinearWorld()
        with Ledger(folder / "cut.sqlite") as ledger:
            observe(idle, ledger, 2)
            assert (idle.asked, ledger.totals().queries - ledger.totals().open) == (0, 2)
        for left in folder.glob("cut.*"):
            left.unlink()


class FailingDisk:
    """A connection whose n-th write fails, and every one after it."""

    def __init__(self, db: sqlite3.Connection, nth: int) -> None:
        self._db, self._left = db, nth

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        self._left -= sql.startswith(("BEGIN", "INSERT", "UPDATE", "DELETE", "COMMIT"))
        if self._left <= 0 and not sql.startswith(("SELECT", "ROLLBACK")):
            raise sqlite3.OperationalError("disk I/O error")
        return self._db.execute(sql, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


def failing_disk(folder: Path, patch: Patch) -> None:
    """F41: nothing leaves that could not be reserved."""
    for nth in range(1, 40):
        world = LinearWorld()
        backend = BillingBackend(world, folder / f"bill{nth}")
        with Ledger(folder / f"{nth}.sqlite", 9) as ledger:
            ledger._db = FailingDisk(ledger._db, nth)  # type: ignore[assignment]
            with suppress(StorageError):
                observe(backend, ledger, 3)
                break
        with Ledger(folder / f"{nth}.sqlite") as ledger:
            left = len(billed(backend.bill))
            assert left <= ledger.spent() <= left + 1
    assert nth > 12
    assert world.asked == 3


def spoilt_ledgers(folder: Path, patch: Patch) -> None:
    """F42: refused, and left as they are."""

    def sql(path: Path, statement: str) -> None:
        with sqlite3.connect(path) as db:
            db.execute(statement)
        db.close()

    def go_on(path: Path, world: LinearWorld) -> None:
        with Ledger(path, 5) as ledger:
            ledger.bind({"seed": 1})
            observe(world, ledger, 5)

    spoils: list[tuple[Callable[[Path], object], type[Exception]]] = [
        (lambda path: path.write_text("not a ledger " * 500), StorageError),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), StorageError),
        (lambda path: sql(path, "UPDATE account SET schema_version = 99"), StorageError),
        (lambda path: sql(path, "UPDATE account SET budget = 4"), RunMismatch),
        (lambda path: sql(path, "UPDATE account SET fingerprint = '{}'"), RunMismatch),
    ]
    for index, (spoil, error) in enumerate(spoils):
        path = folder / f"{index}.sqlite"
        with Ledger(path, 5) as ledger:
            ledger.bind({"seed": 1})
            observe(LinearWorld(), ledger, 3)
        spoil(path)
        before, world = path.read_bytes(), LinearWorld()
        with pytest.raises(error):
            go_on(path, world)
        assert (world.asked, path.read_bytes()) == (0, before)
    with pytest.raises(RunMismatch, match="3 of them are spent"):
        Ledger(folder / "3.sqlite", 2, extend=True)


def jumping_clocks(folder: Path, patch: Patch) -> None:
    """F43: the wall clock is not asked; a suspended machine goes on."""
    patch.setattr(time, "time", lambda: pytest.fail("asked for the time of day"))
    clock = FakeClock()

    class Suspended(LinearWorld):
        async def answer(self, requests: Sequence[Request]) -> list[Answer]:
            clock.advance(1e6)
            return await super().answer(requests)

    world = Suspended(declare(concurrency=2))
    with Ledger(folder / "ledger.sqlite", 9) as ledger:
        observe(world, ledger, 6, clock=clock)
        assert (world.asked, ledger.spent(), clock.sleeps) == (6, 6, [])


def another_run(folder: Path, patch: Patch) -> None:
    """F44."""
    small_recipes(patch)
    tune(make_task(), soft_world(), folder / "run", options())
    spent = (folder / "run" / "ledger.sqlite").stat().st_size
    others: list[tuple[str, dict[str, Any]]] = [
        ("seed", {"asked": options(seed=1)}),
        ("classes", {"task": make_task(n_classes=4)}),
        ("data", {"task": make_task(per_class=5)}),
        ("model", {"world": soft_world(model_id="another")}),
        ("endpoint", {"world": soft_world(decimals=3)}),
        ("version", {}),
    ]
    for name, changes in others:
        if name == "version":
            patch.setattr(blackbox_vlm.tuning, "__version__", "0.0.0")
        world = changes.get("world", soft_world())
        with pytest.raises(RunMismatch, match=name):
            tune(
                changes.get("task", make_task()),
                world,
                folder / "run",
                changes.get("asked", options()),
                resume=True,
            )
        assert world.asked == 0
    assert (folder / "run" / "ledger.sqlite").stat().st_size == spent


def nothing_changed(folder: Path, patch: Patch) -> None:
    """F45."""
    small_recipes(patch)
    world, idle = soft_world(), soft_world()
    first = tune(make_task(), world, folder / "run", options())
    before = files(folder / "run")
    assert tune(make_task(), idle, folder / "run", options(), resume=True) == first
    assert (idle.asked, files(folder / "run")) == (0, before)
    assert first.queries_spent == len(world.requests)


def poisoned_answers(folder: Path, patch: Patch) -> None:
    """F46: what failed is no answer; what is stored is checked again."""
    path, key = folder / "ledger.sqlite", query_key(scores(0), declare().identity)
    empty = with_values(lambda values: values[:, :0])
    for fault, error in ((UnknownOutcome("lost"), UnknownOutcome), (empty, ContractError)):
        with Ledger(path, 9) as ledger:
            with pytest.raises(error):
                observe(ScriptedBackend(LinearWorld(), [fault]), ledger, 1, on_lost="stop")
            assert ledger.answer(key) is None
        path.unlink()
    with Ledger(path, 9) as ledger:
        observe(LinearWorld(), ledger, 1)
        nothing = np.full((1, 3), np.nan, dtype=np.float32).tobytes()
        ledger._db.execute("UPDATE answer SET data = ?", (nothing,))
        idle = LinearWorld()
        with pytest.raises(StorageError, match="not given"):
            observe(idle, ledger, 1)
        assert (idle.asked, ledger.spent()) == (0, 1)


def two_models(folder: Path, patch: Patch) -> None:
    """F47: one file, and no answer of one is taken for the other's."""
    worlds = [
        LinearWorld(declare()),
        LinearWorld(declare(model_id="another")),
        LinearWorld(declare(decimals=2)),
        LinearWorld(declare(conditions="https://elsewhere.example")),
    ]
    with Ledger(folder / "ledger.sqlite", 9) as ledger:
        for world in worlds * 2:
            observe(world, ledger, 1)
        assert [world.asked for world in worlds] == [1, 1, 1, 1]
        assert ledger.spent() == 4


ROWS: dict[str, Callable[[Path, Patch], None]] = {
    "F35 budget 100, 32 threads": many_threads,
    "F36 two processes": two_processes,
    "F37 budget below a generation": too_small_a_budget,
    "F38 SIGKILL at each point": killed_at_each_point,
    "F39 Ctrl-C and SIGTERM": interrupted,
    "F40 power loss": power_loss,
    "F41 disk full, read-only, EIO": failing_disk,
    "F42 ledger corrupt or another's": spoilt_ledgers,
    "F43 clocks that jump": jumping_clocks,
    "F44 resumed as another run": another_run,
    "F45 resumed unchanged": nothing_changed,
    "F46 cache poisoned": poisoned_answers,
    "F47 two models, one cache": two_models,
}
