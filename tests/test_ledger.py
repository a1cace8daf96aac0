"""The ledger: no query is forgotten, none is free, and no budget is passed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blackbox_vlm.backend import Answer
from blackbox_vlm.errors import (
    BudgetError,
    InputError,
    RunMismatch,
    StorageError,
    UnknownOutcome,
)
from blackbox_vlm.ledger import Entry, Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, 10, max_cost=1.0) as ledger:
        yield ledger


def entry(query: object, *, purpose: str = "search", cost: float = 0.0) -> Entry:
    return Entry(str(query), purpose, images=2, texts=3, cost=cost)


def answer(value: float = 1.0) -> Answer:
    return Answer(np.full((2, 3), value, dtype=np.float32), "model")


def entries(count: int, start: int = 0) -> list[Entry]:
    return [entry(index) for index in range(start, start + count)]


# -- spending -------------------------------------------------------------------------------


def test_a_reservation_is_charged_before_it_is_sent(ledger: Ledger, path: Path) -> None:
    ledger.reserve([entry("a", cost=0.25), entry("b", cost=0.5)])
    with Ledger(path) as other:  # what another process sees: committed, not only counted
        totals = other.totals()
    assert (totals.queries, totals.open, totals.unknown, totals.left) == (2, 2, 0, 8)
    assert (totals.images, totals.texts) == (4, 6)
    assert (totals.cost, totals.budget, totals.max_cost) == (0.75, 10, 1.0)


def test_all_or_none(ledger: Ledger) -> None:
    ledger.reserve(entries(8))
    with pytest.raises(BudgetError, match="10 queries, 8 are spent and 3 more are wanted"):
        ledger.reserve(entries(3, start=8))
    assert ledger.spent() == 8
    ledger.reserve(entries(2, start=8))
    assert ledger.totals().left == 0


def test_money_is_a_limit_too(ledger: Ledger) -> None:
    ledger.reserve([entry("a", cost=0.7)])
    with pytest.raises(BudgetError, match=r"the limit is 1 USD, 0\.7 are spent and 0\.31 more"):
        ledger.reserve([entry("b", cost=0.31)])
    ledger.reserve([entry("b", cost=0.3)])  # exactly the limit
    assert ledger.totals().cost == 1.0
    assert ledger.spent() == 2


def test_small_prices_add_up_exactly(path: Path) -> None:
    with Ledger(path, 1000, max_cost=0.1) as ledger:
        ledger.reserve([entry(i, cost=0.0001) for i in range(1000)])  # 0.1 in floats is not
        assert ledger.totals().cost == 0.1


def test_a_refund_gives_query_and_money_back_once(ledger: Ledger) -> None:
    attempts = ledger.reserve([entry("a", cost=0.5), entry("b", cost=0.5)])
    ledger.refund(attempts[:1])
    ledger.refund(attempts[:1])
    totals = ledger.totals()
    assert (totals.queries, totals.open, totals.cost, totals.images) == (1, 1, 0.5, 2)


def test_what_is_settled_or_lost_is_never_refunded(ledger: Ledger) -> None:
    done, lost = ledger.reserve(entries(2))
    ledger.settle([done], [answer()])
    ledger.lose([lost])
    ledger.refund([done, lost])
    totals = ledger.totals()
    assert (totals.queries, totals.open, totals.unknown) == (2, 0, 1)


def test_what_was_sent_twice_is_not_refunded(ledger: Ledger) -> None:
    """The first send may have been billed: only the second one never left."""
    [first] = ledger.reserve([entry("a")], idempotent=True)
    ledger.lose([first])
    [again] = ledger.reserve([entry("a")], idempotent=True)
    ledger.refund([again])
    assert (ledger.spent(), ledger.totals().unknown) == (1, 1)
    assert ledger.reserve([entry("a")], idempotent=True) == [first]  # and may be sent once more
    assert ledger.spent() == 1


def test_what_was_lost_is_not_settled_late_for_free(ledger: Ledger) -> None:
    [attempt] = ledger.reserve([entry("a")])
    ledger.lose([attempt])
    ledger.settle([attempt], [answer()])
    totals = ledger.totals()
    assert (totals.queries, totals.unknown) == (1, 0)


def test_a_lost_attempt_stops_the_next_run(ledger: Ledger) -> None:
    ledger.lose(ledger.reserve([entry("a")]))
    with pytest.raises(UnknownOutcome, match="1 queries were sent before"):
        ledger.reserve([entry("a"), entry("b")])
    assert ledger.spent() == 1


@pytest.mark.parametrize("how", ["lost", "left open"])
def test_a_resend_is_paid_again(ledger: Ledger, how: str) -> None:
    first = ledger.reserve([entry("a")])
    if how == "lost":
        ledger.lose(first)
    again = ledger.reserve([entry("a")], on_lost="resend")
    assert again != first
    assert ledger.spent() == 2


@pytest.mark.parametrize("how", ["lost", "left open"])
def test_an_idempotent_endpoint_is_asked_again_for_nothing(ledger: Ledger, how: str) -> None:
    first = ledger.reserve([entry("a")], idempotent=True)
    if how == "lost":
        ledger.lose(first)
    assert ledger.reserve([entry("a"), entry("b")], idempotent=True)[0] == first[0]
    assert (ledger.spent(), ledger.totals().open) == (2, 2)


def test_a_resend_at_the_end_of_the_budget_is_refused(path: Path) -> None:
    with Ledger(path, 1) as ledger:
        ledger.lose(ledger.reserve([entry("a")]))
        with pytest.raises(BudgetError):
            ledger.reserve([entry("a")], on_lost="resend")
        ledger.reserve([entry("a")], idempotent=True)  # no new charge
        assert ledger.spent() == 1


def test_an_answer_that_came_at_last_ends_the_loss(ledger: Ledger) -> None:
    """A query lost once and answered later is not "lost" after its answer was absorbed."""
    ledger.lose(ledger.reserve([entry("a")]))
    ledger.settle(ledger.reserve([entry("a")], on_lost="resend"), [answer()])
    ledger.checkpoint("state", b"", absorbs=["search"])
    ledger.reserve([entry("a")])
    assert ledger.spent() == 3


def test_a_refunded_resend_does_not_hide_the_loss(ledger: Ledger) -> None:
    ledger.lose(ledger.reserve([entry("a")]))
    ledger.refund(ledger.reserve([entry("a")], on_lost="resend"))
    with pytest.raises(UnknownOutcome):
        ledger.reserve([entry("a")])


def test_a_billed_refusal_is_charged_and_not_lost(ledger: Ledger) -> None:
    ledger.forfeit(ledger.reserve([entry("a")]))
    totals = ledger.totals()
    assert (totals.queries, totals.unknown, totals.open) == (1, 0, 0)
    assert ledger.answer("a") is None
    ledger.reserve([entry("a")])  # nobody has to allow it, and it is paid
    assert ledger.spent() == 2


def test_the_same_query_twice_in_one_call_is_charged_twice(ledger: Ledger) -> None:
    first, second = ledger.reserve([entry("a"), entry("a")])
    assert first != second
    ledger.settle([first, second], [answer(1), answer(2)])
    assert ledger.spent() == 2
    stored = ledger.answer("a")
    assert stored is not None
    assert stored.values[0, 0] == 1  # the first answer stays


def test_nothing_to_reserve_costs_nothing(path: Path) -> None:
    with Ledger(path, 1) as ledger:
        ledger.reserve([entry("a")])
        assert ledger.reserve([]) == []
        assert ledger.spent() == 1


def test_purposes_in_the_order_they_were_first_asked(ledger: Ledger) -> None:
    ledger.reserve([entry(i, purpose="zero-shot") for i in range(2)])
    attempts = ledger.reserve([entry(i + 2, purpose="a-search") for i in range(3)])
    ledger.reserve([entry(9, purpose="zero-shot")])
    ledger.refund(attempts[:1])
    assert list(ledger.by_purpose().items()) == [("zero-shot", 3), ("a-search", 2)]


# -- remembering ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i8", "<i4", ">f4", "<f2"])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (0, 4), (1, 1)])
def test_answers_survive_to_the_bit(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    values = (np.arange(np.prod(shape), dtype="<f8").reshape(shape) * 1.1 - 2).astype(dtype)
    with Ledger(path, 1) as ledger:
        ledger.settle(ledger.reserve([entry("a")]), [Answer(values, "модель")])
    with Ledger(path) as ledger:
        stored = ledger.answer("a")
    assert stored is not None
    assert (stored.values.dtype, stored.values.shape) == (values.dtype, shape)
    assert stored.values.tobytes() == values.tobytes()
    assert stored.model_id == "модель"


def test_special_numbers_and_strides_survive(ledger: Ledger) -> None:
    values = np.array([[np.nan, -0.0, np.inf], [1e-45, 2.0, 3.0]], dtype=np.float32).T
    ledger.settle(ledger.reserve([entry("a")]), [Answer(values, "model")])
    stored = ledger.answer("a")
    assert stored is not None
    assert stored.values.tobytes() == np.ascontiguousarray(values).tobytes()


def test_an_unknown_query_has_no_answer(ledger: Ledger) -> None:
    ledger.reserve([entry("a")])
    assert ledger.answer("a") is None
    assert ledger.answer("never") is None


def test_answers_are_settled_together_or_not_at_all(ledger: Ledger) -> None:
    attempts = ledger.reserve(entries(2))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ledger.settle(attempts, [answer()])
    assert ledger.answer("0") is None
    assert ledger.totals().open == 2


def test_a_checkpoint_replaces_the_answers_it_absorbed(ledger: Ledger) -> None:
    kept = ledger.reserve([entry("a", purpose="zero-shot")])
    ledger.settle(kept, [answer()])
    ledger.settle(ledger.reserve([entry("b"), entry("c")]), [answer(), answer()])
    ledger.checkpoint("state", b"1", absorbs=["search", "nothing of the kind"])
    assert ledger.answer("a") is not None
    assert ledger.answer("b") is None
    assert ledger.restore("state") == b"1"
    assert ledger.spent() == 3
    ledger.checkpoint("state", b"\0two")
    ledger.checkpoint("other", b"3")
    assert ledger.restore("state") == b"\0two"
    assert ledger.restore("none") is None


def test_a_checkpoint_that_fails_keeps_the_old_state_and_the_answers(ledger: Ledger) -> None:
    ledger.settle(ledger.reserve([entry("a")]), [answer()])
    ledger.checkpoint("state", b"old")

    def absorbs() -> Iterator[str]:
        yield "search"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.checkpoint("state", b"new", absorbs=absorbs())  # type: ignore[arg-type]
    assert ledger.restore("state") == b"old"
    assert ledger.answer("a") is not None


# -- interrupts -----------------------------------------------------------------------------


def test_an_interrupt_inside_a_transaction_leaves_nothing_half_done(ledger: Ledger) -> None:
    def interrupted() -> Iterator[Entry]:
        yield from entries(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.reserve(interrupted())  # type: ignore[arg-type]
    assert ledger.spent() == 0
    ledger.reserve(entries(1))
    assert ledger.spent() == 1


def test_a_transaction_left_open_is_not_joined(ledger: Ledger, path: Path) -> None:
    """After an interrupt at the worst place, a reservation is refused, not silently uncommitted."""
    ledger._db.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="within a transaction"):
        ledger.reserve(entries(1))
    ledger.reserve(entries(1))
    with Ledger(path) as other:
        assert other.spent() == 1


@pytest.mark.parametrize("statement", ["BEGIN", "UPDATE", "INSERT", "COMMIT"])
def test_an_interrupt_at_any_statement(path: Path, statement: str) -> None:
    with Ledger(path, 10) as ledger:
        ledger.reserve(entries(1))
        ledger._db = _Interrupting(ledger._db, statement)  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve(entries(1, start=1))
        spent = ledger.spent()
        assert spent == (2 if statement == "COMMIT" else 1)  # after COMMIT it is charged
        assert ledger.totals().open == spent
        ledger.reserve(entries(1, start=2))
    with Ledger(path) as ledger:
        assert ledger.spent() == spent + 1


class _Interrupting:
    """A connection that is interrupted once, right after a statement."""

    def __init__(self, db: sqlite3.Connection, statement: str) -> None:
        self._db, self._statement, self._armed = db, statement, True

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        cursor = self._db.execute(sql, *values)
        if self._armed and sql.startswith(self._statement):
            self._armed = False
            raise KeyboardInterrupt
        return cursor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


# -- opening --------------------------------------------------------------------------------


def test_the_file_is_private(path: Path) -> None:
    before = os.umask(0)
    try:
        with Ledger(path, 1) as ledger:
            ledger.reserve(entries(1))
            modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in path.parent.iterdir()}
    finally:
        os.umask(before)
    names = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm")
    assert modes == dict.fromkeys(names, 0o600)


def test_a_commit_is_synced(ledger: Ledger) -> None:
    """Power loss (row 40): WAL with synchronous FULL syncs at every commit."""
    assert ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_a_lost_tail_of_the_log_loses_only_what_was_not_committed(path: Path) -> None:
    """Cut the log inside the last commit: the earlier ones are all there (row 40)."""
    with Ledger(path, 10) as ledger:
        ledger._db.execute("PRAGMA wal_autocheckpoint = 0")
        ledger.reserve(entries(1))
        wal = path.with_name(path.name + "-wal")
        whole = wal.stat().st_size
        ledger.reserve(entries(1, start=1))
        base, log = path.read_bytes(), wal.read_bytes()
    for cut, spent in ((whole, 1), (whole + 100, 1), (len(log) - 1, 1), (len(log), 2)):
        copy = path.with_name(f"cut{cut}.sqlite")
        copy.write_bytes(base)
        copy.with_name(copy.name + "-wal").write_bytes(log[:cut])
        with Ledger(copy) as ledger:
            assert ledger.spent() == spent
            assert ledger.totals().open == spent


def test_no_file_is_opened_that_sqlite_may_have_locked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing a second descriptor of a database drops the locks of the whole process."""
    with Ledger(path, 5):
        opened: list[int] = []

        def watched(*args: Any, original: Any = os.open, **named: Any) -> int:
            opened.append(original(*args, **named))
            return opened[-1]

        monkeypatch.setattr(os, "open", watched)
        with Ledger(path, 5):
            assert opened == []


def test_closing_twice_is_harmless_and_a_closed_ledger_sends_nothing(path: Path) -> None:
    ledger = Ledger(path, 1)
    ledger.close()
    ledger.close()
    with pytest.raises(StorageError, match="closed"):
        ledger.reserve(entries(1))


def test_a_missing_ledger(path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no ledger at .*ledger\.sqlite; wanted"):
        Ledger(path)
    assert not path.exists()


@pytest.mark.parametrize("budget", [0, -1, 2**63])
def test_an_impossible_budget(path: Path, budget: int) -> None:
    with pytest.raises(InputError, match="give at least 1"):
        Ledger(path, budget)
    assert not path.exists()


@pytest.mark.parametrize("limit", [-0.01, float("nan"), float("inf"), 1e10])
def test_an_impossible_limit(path: Path, limit: float) -> None:
    with pytest.raises(InputError, match="USD; give a number of 0 or more"):
        Ledger(path, 1, max_cost=limit)
    assert not path.exists()


def test_a_limit_of_nothing_pays_for_nothing(path: Path) -> None:
    with Ledger(path, 5, max_cost=0.0) as ledger:
        with pytest.raises(BudgetError):
            ledger.reserve([entry("a", cost=0.01)])
        ledger.reserve([entry("a")])
    with pytest.raises(RunMismatch, match="and 0 USD"):
        Ledger(path, 5)


@pytest.mark.parametrize("budget", [9, 11])
def test_another_budget_is_refused(path: Path, budget: int) -> None:
    Ledger(path, 10).close()
    with pytest.raises(RunMismatch, match=f"budget of 10 queries, 0 .* and now {budget} is asked"):
        Ledger(path, budget)
    with pytest.raises(RunMismatch, match="and 2 USD is asked"):
        Ledger(path, 10, max_cost=2.0)
    with Ledger(path, 10) as ledger:
        assert ledger.totals().budget == 10


def test_a_budget_may_be_extended_but_not_below_what_is_spent(path: Path) -> None:
    with Ledger(path, 10, max_cost=1.0) as ledger:
        ledger.reserve([entry(i, cost=0.1) for i in range(4)])
    with pytest.raises(RunMismatch):
        Ledger(path, 3, extend=True)
    with pytest.raises(RunMismatch, match=r"and now 10 and 0\.3 USD"):
        Ledger(path, 10, max_cost=0.3, extend=True)
    with Ledger(path, 4, max_cost=0.4, extend=True) as ledger:
        with pytest.raises(BudgetError):
            ledger.reserve(entries(1, start=4))
        assert (ledger.totals().budget, ledger.totals().max_cost) == (4, 0.4)
    with Ledger(path, 20, extend=True) as ledger:
        ledger.reserve(entries(16, start=4))
        assert ledger.totals().max_cost is None


def test_another_version_is_refused(path: Path) -> None:
    Ledger(path, 10).close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("UPDATE account SET schema_version = 99")
    db.execute("ALTER TABLE account RENAME COLUMN budget TO allowance")  # it may look different
    db.close()
    with pytest.raises(StorageError, match="has ledger version 99, this program reads 1"):
        Ledger(path, 10)


def test_another_database_is_refused(path: Path) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("CREATE TABLE holiday (photo TEXT)")
    db.close()
    with pytest.raises(StorageError, match="is not a readable ledger"):
        Ledger(path, 10)


def test_an_empty_file_without_a_budget(path: Path) -> None:
    path.touch()
    with pytest.raises(StorageError, match="is empty; wanted a ledger"):
        Ledger(path)
    Ledger(path, 3).close()  # a process that died while it made the file: nothing was spent


def damage_random(data: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(data))


def damage_truncated(data: bytes) -> bytes:
    return data[: len(data) // 2 - 100]


def damage_text(data: bytes) -> bytes:
    return b"query,cost\nabc,1\n" * 100


@pytest.mark.parametrize("damage", [damage_random, damage_truncated, damage_text])
@pytest.mark.parametrize("budget", [None, 10])
def test_a_corrupt_file_is_refused_and_kept(path: Path, damage: Any, budget: int | None) -> None:
    with Ledger(path, 10) as ledger:
        ledger.reserve(entries(5))
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"not a readable ledger .*backup"):
        Ledger(path, budget)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change", ["dtype = '|O'", "dtype = 'junk'", "shape = '[7, 7]'", "shape = '{'", "data = x'00'"]
)
def test_a_damaged_answer_is_refused(ledger: Ledger, change: str) -> None:
    ledger.settle(ledger.reserve([entry("a")]), [answer()])
    ledger._db.execute(f"UPDATE answer SET {change}")
    with pytest.raises(StorageError, match="damaged answer"):
        ledger.answer("a")


# -- whose ledger it is ---------------------------------------------------------------------


def test_a_ledger_belongs_to_one_run(ledger: Ledger, path: Path) -> None:
    run = {"seed": 1, "classes": ["cat", "no"], "rate": 0.1, "limits": (1, 2), "note": None}
    ledger.bind(run)
    ledger.bind(run)
    with Ledger(path) as again:
        again.bind(dict(reversed(run.items())))
        with pytest.raises(RunMismatch) as caught:
            again.bind(run | {"seed": 2, "classes": ["cat", "x" * 200], "model": "new"})
    message = str(caught.value)
    assert "seed was 1, now 2" in message
    assert "model was None, now 'new'" in message
    assert "classes was ['cat', 'no'], now ['cat', 'xxx" in message
    assert "rate" not in message
    assert "x" * 100 not in message
    with pytest.raises(RunMismatch, match="limits was"):
        ledger.bind(run | {"limits": [1, 3]})


def test_a_message_shows_untrusted_text_escaped(ledger: Ledger) -> None:
    ledger.bind({"template": "a {}"})
    with pytest.raises(RunMismatch) as caught:
        ledger.bind({"template": "\x1b[2J\u202e{}"})
    assert str(caught.value).isprintable()


# -- storage faults -------------------------------------------------------------------------


def test_a_read_only_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **named: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="Read-only file system; nothing was sent"):
        Ledger(path, 10)


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot use"):
        Ledger(tmp_path / "file" / "ledger.sqlite", 10)
    with pytest.raises(StorageError, match="cannot use"):
        Ledger(tmp_path / "nowhere" / "ledger.sqlite", 10)
    with pytest.raises(StorageError, match="unable to open"):
        Ledger(tmp_path, 10)


@pytest.mark.parametrize(
    ("fault", "text"),
    [("query_only = ON", "readonly"), ("max_page_count = 1", "full")],
    ids=["read-only", "disk full"],
)
def test_what_cannot_be_written_is_not_reserved(
    ledger: Ledger, path: Path, fault: str, text: str
) -> None:
    ledger.settle(ledger.reserve(entries(1)), [answer()])
    ledger._db.execute(f"PRAGMA {fault}")
    many = [Entry(f"{index}" * 3000, "search", 1, 1) for index in range(1, 8)]
    with pytest.raises(StorageError, match=f"cannot write the ledger .*{text}.*then resume"):
        ledger.reserve(many)
    with Ledger(path) as other:
        assert (other.spent(), other.totals().open) == (1, 0)


def test_a_lock_that_is_held_too_long(ledger: Ledger, path: Path) -> None:
    with Ledger(path) as other:
        other._db.execute("PRAGMA busy_timeout = 0")
        ledger._db.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="database is locked"):
            other.reserve(entries(1))
        ledger._db.execute("ROLLBACK")
        other.reserve(entries(1))


# -- many at once ---------------------------------------------------------------------------


def test_64_threads_reserve_exactly_the_budget(path: Path) -> None:
    start = threading.Barrier(64)
    reserved: list[int] = []

    def spend(thread: int, ledger: Ledger) -> None:
        start.wait()
        for index in range(4):
            try:
                reserved.extend(ledger.reserve([entry(f"{thread}-{index}")]))
            except BudgetError:
                return

    with Ledger(path, 100) as ledger:
        threads = [threading.Thread(target=spend, args=(i, ledger)) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(reserved)) == len(reserved) == 100
        assert (ledger.spent(), ledger.totals().open) == (100, 100)


def spend_in_process(path: Path, start: Barrier, results: Any, name: int) -> None:
    try:
        start.wait()
        with Ledger(path, 100) as ledger:  # all of them make it at once
            reserved: list[int] = []
            for index in range(40):
                try:
                    reserved += ledger.reserve([entry(f"{name}-{index}")])
                except BudgetError:
                    break
        results.put(reserved)
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.slow
def test_4_processes_reserve_exactly_the_budget(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=spend_in_process, args=(path, start, results, name))
        for name in range(4)
    ]
    for process in processes:
        process.start()
    reserved = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(isinstance(result, list) for result in reserved), reserved
    attempts = [attempt for result in reserved for attempt in result]
    assert len(set(attempts)) == len(attempts) == 100
    with Ledger(path) as ledger:
        assert ledger.spent() == 100


def test_two_that_make_the_same_ledger_wait_for_each_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite refuses at once to turn WAL on while another one does; that is no error here."""
    attempts: list[str] = []

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if "journal_mode" in sql:
                attempts.append(sql)
                if len(attempts) < 4:
                    raise sqlite3.OperationalError("database is locked")
            return super().execute(sql, *values)

    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *a, **named: connect(*a, factory=Connection, **named)
    )
    with Ledger(path, 1) as ledger:
        assert len(attempts) == 4
        assert ledger.spent() == 0


# -- size -----------------------------------------------------------------------------------


def test_the_work_of_a_query_does_not_grow_with_their_number(path: Path) -> None:
    """Counted in SQLite's own steps, from an account of 10 queries to one of 3,000."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    def cost_of_one(index: int) -> int:
        nonlocal steps
        steps = 0
        ledger._db.set_progress_handler(count, 1)
        ledger.answer(f"{index}")
        ledger.settle(ledger.reserve([entry(index)]), [answer()])
        ledger.refund(ledger.reserve([entry(-index)]))
        ledger.spent()
        ledger._db.set_progress_handler(None, 1)
        return steps

    with Ledger(path, 5000) as ledger:
        ledger.reserve(entries(10, start=10_000))
        early = cost_of_one(1)
        ledger.reserve(entries(3000, start=20_000))
        late = cost_of_one(2)
        state = {name for name, value in vars(ledger).items() if hasattr(value, "__len__")}
    assert early > 20
    assert late <= early * 1.5
    assert state == set()  # nothing is collected in memory
