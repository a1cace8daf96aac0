"""The ledger's file: its tables, how it is opened, and what a broken one looks like to people.

Durability is SQLite's: WAL with synchronous=FULL, so that a settled row survives a power loss.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from blackbox_vlm.errors import InputError, RunMismatch, StorageError

SCHEMA_VERSION = 1
NANO = 1_000_000_000  # money is kept in whole nano-USD
_LARGEST = 2**63 - 1  # of SQLite's integers
_OPEN_TRIES = 20  # how often another process that makes the same ledger may be in the way

_SCHEMA = """
CREATE TABLE account (            -- one row: what may be spent and what is
    schema_version INTEGER NOT NULL,
    budget INTEGER NOT NULL,      -- queries
    max_cost INTEGER,             -- nano-USD; NULL: no cap on money
    queries INTEGER NOT NULL DEFAULT 0,
    cost INTEGER NOT NULL DEFAULT 0,
    fingerprint TEXT              -- JSON: which run this is
) STRICT;
CREATE TABLE attempt (
    id INTEGER PRIMARY KEY,
    query TEXT NOT NULL,          -- SHA-256 of model and request
    purpose TEXT NOT NULL,        -- what the run asked it for
    images INTEGER NOT NULL,
    texts INTEGER NOT NULL,
    cost INTEGER NOT NULL,        -- nano-USD
    outcome TEXT NOT NULL CHECK (outcome IN ('open', 'done', 'unknown', 'refunded')),
    sends INTEGER NOT NULL DEFAULT 1
) STRICT;
CREATE INDEX attempt_by_query ON attempt (query);
CREATE TABLE answer (
    query TEXT PRIMARY KEY,
    purpose TEXT NOT NULL,
    model_id TEXT NOT NULL,
    dtype TEXT NOT NULL,
    shape TEXT NOT NULL,
    data BLOB NOT NULL
) STRICT;
CREATE INDEX answer_by_purpose ON answer (purpose);
CREATE TABLE checkpoint (name TEXT PRIMARY KEY, data BLOB NOT NULL) STRICT;
"""


def open_file(
    path: Path, budget: int | None, max_cost: float | None, *, extend: bool
) -> sqlite3.Connection:
    """Open a ledger's file, or make it with mode 0600. The arguments are `Ledger`'s.

    Raises:
        StorageError: there is no such file, it is no ledger, or one of another version.
        RunMismatch: the file holds another budget.
        InputError: the budget or the limit is none.
    """
    if budget is None and not path.exists():
        raise StorageError(f"there is no ledger at {path}; wanted a run made by `tune`")
    if budget is not None and not 1 <= budget <= _LARGEST:
        raise InputError(f"the budget is {budget} queries; give at least 1")
    if max_cost is not None and not 0 <= max_cost < _LARGEST / NANO:
        raise InputError(f"the limit is {max_cost} USD; give a number of 0 or more")
    with contextlib.suppress(FileExistsError):  # never open a file that SQLite may have locked
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    try:
        _write_ahead(db)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            _create(db, path, budget, max_cost)
        _check(db, path, budget, max_cost, extend=extend)
        db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db


def _create(db: sqlite3.Connection, path: Path, budget: int | None, max_cost: float | None) -> None:
    if budget is None:
        raise StorageError(f"{path} is empty; wanted a ledger. Start the run again")
    for statement in _SCHEMA.split(";\n"):
        db.execute(statement)
    db.execute(
        "INSERT INTO account (schema_version, budget, max_cost) VALUES (?, ?, ?)",
        (SCHEMA_VERSION, budget, None if max_cost is None else nano(max_cost)),
    )


def _check(
    db: sqlite3.Connection,
    path: Path,
    budget: int | None,
    max_cost: float | None,
    *,
    extend: bool,
) -> None:
    version = db.execute("SELECT schema_version FROM account").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise StorageError(
            f"{path} has ledger version {version}, this program reads {SCHEMA_VERSION}; "
            "use the program that wrote it, or another --out"
        )
    stored, stored_cost, spent, cost = db.execute(
        "SELECT budget, max_cost, queries, cost FROM account"
    ).fetchone()
    cap = None if max_cost is None else nano(max_cost)
    if budget is None or (budget, cap) == (stored, stored_cost):
        return
    if not extend or budget < spent or (cap is not None and cap < cost):
        raise RunMismatch(
            f"{path} was opened with a budget of {stored} queries"
            f"{_usd_limit(stored_cost)}, {spent} of them are spent, and now "
            f"{budget}{_usd_limit(cap)} is asked; go on with the "
            "same limits or start another --out"
        )
    db.execute("UPDATE account SET budget = ?, max_cost = ?", (budget, cap))


def _write_ahead(db: sqlite3.Connection) -> None:
    """Turn WAL on. SQLite does not wait here for another process that makes the same ledger."""
    for _ in range(_OPEN_TRIES):
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute("PRAGMA journal_mode = WAL")
            return
        db.execute("BEGIN IMMEDIATE")  # this waits for it
        db.execute("COMMIT")
    db.execute("PRAGMA journal_mode = WAL")


def _usd_limit(nano: int | None) -> str:
    return "" if nano is None else f" and {nano / NANO:g} USD"


def nano(usd: float) -> int:
    """USD in the ledger's unit."""
    return round(usd * NANO)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite and the disk raise into `StorageError`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise StorageError(_storage_hint(path, error)) from error
    except OSError as error:
        raise StorageError(f"cannot use {path}: {error.strerror}; nothing was sent") from error


def _storage_hint(path: Path, error: sqlite3.DatabaseError) -> str:
    text = str(error)
    if isinstance(error, sqlite3.OperationalError) and not text.startswith("no such"):
        return f"cannot write the ledger {path}: {text}; free the disk or the lock, then resume"
    return (
        f"{path} is not a readable ledger ({text}); nothing was sent. Restore it from a backup "
        "or start another --out: what it had spent is then not counted"
    )
