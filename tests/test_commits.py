"""Group commits: what is written in one turn of the loop is on the disk together, or not at all."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blackbox_vlm.backend import Answer
from blackbox_vlm.commits import GroupCommit
from blackbox_vlm.errors import BudgetError, StorageError, UnknownOutcome
from blackbox_vlm.ledger import Entry, Ledger
from blackbox_vlm.running import run_sync

ANSWER = Answer(np.ones((1, 2), np.float32), "model")


class Disk:
    """A connection that counts its commits, and fails at the statement that it is told to."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.commits = 0
        self.breaks_at = ""

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if self.breaks_at and sql.startswith(self.breaks_at):
            raise sqlite3.OperationalError("disk I/O error")
        self.commits += sql == "COMMIT"
        return self._db.execute(sql, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite", 4) as ledger:
        yield ledger


@pytest.fixture
def disk(ledger: Ledger) -> Disk:
    disk = Disk(ledger._db)
    ledger._db = disk  # type: ignore[assignment]
    return disk


def nothing() -> None:
    """To be told of a commit."""


def reserve(ledger: Ledger, *names: str) -> Callable[[], list[int]]:
    return lambda: ledger.reserve([Entry(name, "search", 1, 2) for name in names])


def settle(ledger: Ledger, *attempts: int) -> Callable[[], None]:
    return lambda: ledger.settle(attempts, [ANSWER] * len(attempts))


def together(commits: GroupCommit, *writes: Callable[[], Any]) -> list[Any]:
    """Submit writes in one turn of the loop; their results, or their errors."""

    async def work() -> list[Any]:
        futures = [commits.submit(write) for write in writes]
        return await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 5)

    return run_sync(work())


def state(ledger: Ledger) -> tuple[int, int]:
    """Charged, of them open: as another connection sees it, on the disk."""
    with Ledger(ledger.path) as other:
        totals = other.totals()
    return totals.queries, totals.open


def test_one_turn_of_the_loop_is_one_commit(ledger: Ledger, disk: Disk) -> None:
    told: list[int] = []
    commits = GroupCommit(ledger, lambda: told.append(ledger.spent()))
    first, second = together(commits, reserve(ledger, "a"), reserve(ledger, "b", "c"))
    assert (disk.commits, told) == (1, [3])
    assert len({*first, *second}) == 3
    together(commits, settle(ledger, *first), reserve(ledger, "d"))
    assert (disk.commits, told) == (2, [3, 4])
    assert state(ledger) == (4, 3)
    assert ledger.answer("a") is not None


def test_a_result_is_there_only_once_it_is_on_the_disk(ledger: Ledger) -> None:
    async def work() -> None:
        commits = GroupCommit(ledger, nothing)
        future = commits.submit(reserve(ledger, "a"))
        assert state(ledger) == (0, 0)
        await future
        assert state(ledger) == (1, 1)

    run_sync(work())


def test_a_flush_waits_for_what_nobody_waits_for(ledger: Ledger) -> None:
    async def work() -> None:
        commits = GroupCommit(ledger, nothing)
        [attempt] = await commits.submit(reserve(ledger, "a"))
        commits.submit(settle(ledger, attempt))
        await commits.flush()
        assert state(ledger) == (1, 0)

    run_sync(work())


def test_a_reservation_that_is_refused_touches_no_other_write(ledger: Ledger) -> None:
    commits = GroupCommit(ledger, nothing)
    [[a], _] = together(commits, reserve(ledger, "a"), reserve(ledger, "lost"))
    writes = (
        settle(ledger, a),
        reserve(ledger, "b", "c", "d"),  # one more than there is
        reserve(ledger, "e", "lost"),
        reserve(ledger, "f", "g"),
    )
    settled, too_many, resent, fine = together(commits, *writes)
    assert settled is None
    assert isinstance(too_many, BudgetError)
    assert isinstance(resent, UnknownOutcome)
    assert len(fine) == 2
    assert state(ledger) == (4, 3)  # lost, f and g are open
    assert ledger.answer("a") is not None


@pytest.mark.parametrize("breaks_at", ["BEGIN", "UPDATE account", "INSERT INTO attempt", "COMMIT"])
def test_a_broken_disk_is_everybodys_from_then_on(
    ledger: Ledger, disk: Disk, breaks_at: str
) -> None:
    commits = GroupCommit(ledger, nothing)
    [[a]] = together(commits, reserve(ledger, "a"))
    disk.breaks_at = breaks_at
    results = together(commits, settle(ledger, a), reserve(ledger, "b"), reserve(ledger, "c"))
    assert [type(result) for result in results] == [StorageError] * 3
    assert state(ledger) == (1, 1)
    disk.breaks_at = ""  # nobody goes on as if nothing had happened
    with pytest.raises(StorageError, match="disk I/O error"):
        run_sync(commits.flush())
    assert ledger.answer("a") is None


def test_an_error_that_should_not_happen_leaves_nobody_waiting(ledger: Ledger) -> None:
    """A cost that is no number, a plugin's bug: whatever it is, it is raised, not waited for."""
    commits = GroupCommit(ledger, nothing)
    [[a]] = together(commits, reserve(ledger, "a"))

    def fails() -> None:
        ledger.reserve([Entry("half", "search", 1, 2)])
        raise OverflowError("too large")

    results = together(commits, settle(ledger, a), fails, reserve(ledger, "b"))
    assert [type(result) for result in results] == [OverflowError] * 3
    assert state(ledger) == (1, 1)
    with pytest.raises(OverflowError):
        run_sync(commits.flush())


def test_who_is_cancelled_before_the_commit_reserves_nothing(ledger: Ledger) -> None:
    async def work() -> None:
        commits = GroupCommit(ledger, nothing)
        cancelled, kept = (commits.submit(reserve(ledger, name)) for name in "ab")
        cancelled.cancel()
        assert len(await kept) == 1

    run_sync(work())
    assert state(ledger) == (1, 1)


def test_what_a_dead_loop_left_hangs_no_other(ledger: Ledger) -> None:
    commits = GroupCommit(ledger, nothing)
    loop = asyncio.new_event_loop()

    async def die() -> None:
        commits.submit(reserve(ledger, "a"))
        loop.stop()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(die())
    loop.close()
    [[attempt]] = together(commits, reserve(ledger, "b"))
    assert attempt == 1
    assert state(ledger) == (1, 1)
