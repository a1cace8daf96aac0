"""The budget's memory: one SQLite file per run, in which no query is ever forgotten.

One row per attempt, committed *before* its bytes leave; settled, refunded or left as unknown after.
`charged <= budget` holds over threads, processes and crashes, because a reservation is a single
conditional UPDATE. Answers are stored by content, so that a run can be replayed for nothing; a
checkpoint that has absorbed the answers of a search replaces them, in the same transaction.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from blackbox_vlm._ledger_file import NANO, nano, open_file, storage_errors
from blackbox_vlm.backend import Answer
from blackbox_vlm.errors import BudgetError, RunMismatch, StorageError, UnknownOutcome

Lost = Literal["stop", "resend"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A query about to be reserved: its key, why it is asked, and what it carries."""

    query: str
    purpose: str
    images: int
    texts: int
    cost: float = 0.0  # USD


@dataclass(frozen=True, slots=True)
class Totals:
    """What a ledger says was spent."""

    budget: int
    queries: int  # charged: done, unknown and open
    unknown: int  # charged, and the answer was lost
    open: int  # charged, in flight or left by a process that died
    images: int
    texts: int
    cost: float  # USD
    max_cost: float | None

    @property
    def left(self) -> int:
        """Queries that may still be spent."""
        return self.budget - self.queries


class Ledger:
    """The account of one run. Safe to share between threads; processes open their own.

    Args:
        path: the file; made with mode 0600 if it does not exist.
        budget: queries that may be charged, ever. None takes what the file says.
        max_cost: USD that may be charged, ever.
        extend: whether another budget than the file's replaces it, if it covers what is spent.

    Raises:
        StorageError: the file cannot be opened, is no ledger, or is of another version.
        RunMismatch: the file holds another budget.
    """

    def __init__(
        self,
        path: Path,
        budget: int | None = None,
        *,
        max_cost: float | None = None,
        extend: bool = False,
    ) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._inside = False  # a transaction
        with storage_errors(self.path):
            self._db = open_file(self.path, budget, max_cost, extend=extend)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what is settled stays settled."""
        with self._lock:
            self._db.close()

    # -- spending ---------------------------------------------------------------------------

    def reserve(
        self, entries: Sequence[Entry], *, idempotent: bool = False, on_lost: Lost = "stop"
    ) -> list[int]:
        """Charge the entries, all or none, before any of them leaves. Returns their attempts.

        An attempt that a dead process left open is taken up again under its own row and charge
        where the endpoint is idempotent. Elsewhere its answer is lost: `on_lost="resend"` charges
        a new attempt.

        Raises:
            BudgetError: the budget cannot pay for all of them; nothing was charged.
            UnknownOutcome: one was sent before, its answer is lost, and `on_lost` is "stop".
            StorageError: the reservation could not be written; nothing may be sent.
        """
        with self._transaction():
            pending = [self._pending(entry) for entry in entries]
            lost = [entry for entry, row in zip(entries, pending, strict=True) if row is not None]
            if lost and not idempotent and on_lost == "stop":
                raise UnknownOutcome(
                    f"{len(lost)} queries were sent before and their answers are lost; they stay "
                    "charged. Allow paying for them again (--on-lost resend) to go on"
                )
            keep = [row if idempotent else None for row in pending]
            fresh = [entry for entry, row in zip(entries, keep, strict=True) if row is None]
            self._charge(fresh)
            return [
                self._insert(entry) if row is None else self._resend(row)
                for entry, row in zip(entries, keep, strict=True)
            ]

    def settle(self, attempts: Sequence[int], answers: Sequence[Answer]) -> None:
        """Store the answers of reserved attempts, in one transaction.

        A cost that an answer reports replaces the one that was reserved.
        """
        with self._transaction():
            for attempt, answer in zip(attempts, answers, strict=True):
                self._db.execute("UPDATE attempt SET outcome = 'done' WHERE id = ?", (attempt,))
                self._store(attempt, answer)
                if answer.cost is not None:
                    self._correct(attempt, nano(answer.cost))

    def forfeit(self, attempts: Sequence[int]) -> None:
        """Close attempts that the endpoint refused and bills: charged, may be asked anew."""
        with self._transaction():
            for attempt in attempts:
                self._close_attempt(attempt, "done")

    def lose(self, attempts: Sequence[int]) -> None:
        """Mark attempts whose outcome is unknown: they stay charged."""
        with self._transaction():
            for attempt in attempts:
                self._close_attempt(attempt, "unknown")

    def refund(self, attempts: Sequence[int]) -> None:
        """Give back attempts that never reached the endpoint, or that it refused for free.

        An attempt that was sent more than once stays charged: the first time may have been billed.
        """
        with self._transaction():
            for attempt in attempts:
                if self._sends(attempt) > 1:
                    self._close_attempt(attempt, "unknown")
                elif self._close_attempt(attempt, "refunded"):
                    self._db.execute(
                        "UPDATE account SET queries = queries - 1, "
                        "cost = cost - (SELECT cost FROM attempt WHERE id = ?)",
                        (attempt,),
                    )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Put everything inside into one transaction: one commit, or none of it."""
        with self._transaction():
            yield

    # -- remembering ------------------------------------------------------------------------

    def answer(self, query: str) -> Answer | None:
        """The stored answer of a query, or None."""
        sql = "SELECT model_id, dtype, shape, data FROM answer WHERE query = ?"
        with self._lock, storage_errors(self.path):
            row = self._db.execute(sql, (query,)).fetchone()
        if row is None:
            return None
        model_id, dtype, shape, data = row
        try:
            values = np.frombuffer(data, dtype=dtype).reshape(json.loads(shape))
        except (ValueError, TypeError):
            raise StorageError(
                f"{self.path} holds a damaged answer; nothing was sent. Restore it from a backup"
            ) from None
        return Answer(values=values, model_id=model_id)

    def checkpoint(self, name: str, data: bytes, *, absorbs: Sequence[str] = ()) -> None:
        """Save a state and, in the same transaction, drop the answers that it has absorbed.

        Args:
            name: one state is kept per name.
            data: the serialised state.
            absorbs: purposes whose answers the state makes unnecessary; their charges stay.
        """
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO checkpoint VALUES (?, ?)", (name, data))
            for purpose in absorbs:
                self._db.execute("DELETE FROM answer WHERE purpose = ?", (purpose,))

    def restore(self, name: str) -> bytes | None:
        """The state saved under a name, or None."""
        with self._lock, storage_errors(self.path):
            row = self._db.execute("SELECT data FROM checkpoint WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def bind(self, fingerprint: Mapping[str, Any]) -> None:
        """Tie the ledger to a run, or check that it is that run's.

        Raises:
            RunMismatch: it belongs to another run; the message names what differs.
        """
        with self._transaction():
            stored = self._db.execute("SELECT fingerprint FROM account").fetchone()[0]
            if stored is None:
                text = json.dumps(dict(fingerprint), sort_keys=True)
                self._db.execute("UPDATE account SET fingerprint = ?", (text,))
                return
        _compare(json.loads(stored), json.loads(json.dumps(dict(fingerprint))), self.path)

    def totals(self) -> Totals:
        """What was spent so far, added up over all attempts."""
        with self._lock, storage_errors(self.path):
            budget, max_cost, queries, cost = self._db.execute(
                "SELECT budget, max_cost, queries, cost FROM account"
            ).fetchone()
            counts = dict(
                self._db.execute(
                    "SELECT outcome, count(*) FROM attempt "
                    "WHERE outcome IN ('unknown', 'open') GROUP BY outcome"
                ).fetchall()
            )
            images, texts = self._db.execute(
                "SELECT coalesce(sum(images), 0), coalesce(sum(texts), 0) FROM attempt "
                "WHERE outcome != 'refunded'"
            ).fetchone()
        return Totals(
            budget=budget,
            queries=queries,
            unknown=counts.get("unknown", 0),
            open=counts.get("open", 0),
            images=images,
            texts=texts,
            cost=cost / NANO,
            max_cost=None if max_cost is None else max_cost / NANO,
        )

    def spent(self) -> int:
        """Queries charged so far, in constant time."""
        with self._lock, storage_errors(self.path):
            return int(self._db.execute("SELECT queries FROM account").fetchone()[0])

    def by_purpose(self) -> dict[str, int]:
        """Queries charged for each purpose, in the order in which they were first asked."""
        with self._lock, storage_errors(self.path):
            rows = self._db.execute(
                "SELECT purpose, count(*) FROM attempt WHERE outcome != 'refunded' "
                "GROUP BY purpose ORDER BY min(id)"
            ).fetchall()
        return dict(rows)

    # -- inside a transaction ---------------------------------------------------------------

    def _pending(self, entry: Entry) -> int | None:
        """The last attempt at a query, if its answer never came."""
        row = self._db.execute(
            "SELECT id, outcome FROM attempt WHERE query = ? AND outcome != 'refunded' "
            "ORDER BY id DESC LIMIT 1",
            (entry.query,),
        ).fetchone()
        return None if row is None or row[1] == "done" else int(row[0])

    def _sends(self, attempt: int) -> int:
        row = self._db.execute("SELECT sends FROM attempt WHERE id = ?", (attempt,)).fetchone()
        return int(row[0])

    def _charge(self, entries: Sequence[Entry]) -> None:
        count, cost = len(entries), sum(nano(entry.cost) for entry in entries)
        changed = self._db.execute(
            "UPDATE account SET queries = queries + :count, cost = cost + :cost "
            "WHERE queries + :count <= budget AND (max_cost IS NULL OR cost + :cost <= max_cost)",
            {"count": count, "cost": cost},
        ).rowcount
        if not changed:
            raise BudgetError(self._refusal(count, cost))

    def _refusal(self, count: int, cost: int) -> str:
        budget, max_cost, queries, spent = self._db.execute(
            "SELECT budget, max_cost, queries, cost FROM account"
        ).fetchone()
        if queries + count > budget:
            return (
                f"the budget is {budget} queries, {queries} are spent and {count} more are wanted; "
                "nothing was sent. Give a higher --budget to go on"
            )
        return (
            f"the limit is {max_cost / NANO:g} USD, {spent / NANO:g} are spent and {cost / NANO:g} "
            "more are wanted; nothing was sent. Give a higher --max-cost to go on"
        )

    def _insert(self, entry: Entry) -> int:
        row = (entry.query, entry.purpose, entry.images, entry.texts, nano(entry.cost))
        cursor = self._db.execute(
            "INSERT INTO attempt (query, purpose, images, texts, cost, outcome) "
            "VALUES (?, ?, ?, ?, ?, 'open')",
            row,
        )
        assert cursor.lastrowid is not None  # sqlite3 sets it for every INSERT
        return cursor.lastrowid

    def _resend(self, attempt: int) -> int:
        self._db.execute(
            "UPDATE attempt SET outcome = 'open', sends = sends + 1 WHERE id = ?", (attempt,)
        )
        return attempt

    def _store(self, attempt: int, answer: Answer) -> None:
        values = np.ascontiguousarray(answer.values)
        self._db.execute(
            "INSERT OR IGNORE INTO answer "
            "SELECT query, purpose, ?, ?, ?, ? FROM attempt WHERE id = ?",
            (
                answer.model_id,
                values.dtype.str,
                json.dumps(values.shape),
                values.tobytes(),
                attempt,
            ),
        )

    def _close_attempt(self, attempt: int, outcome: str) -> bool:
        """Give an open attempt its outcome; False if it had one already."""
        sql = "UPDATE attempt SET outcome = ? WHERE id = ? AND outcome = 'open'"
        return self._db.execute(sql, (outcome, attempt)).rowcount == 1

    def _correct(self, attempt: int, cost: int) -> None:
        self._db.execute(
            "UPDATE account SET cost = cost + ? - (SELECT cost FROM attempt WHERE id = ?)",
            (cost, attempt),
        )
        self._db.execute("UPDATE attempt SET cost = ? WHERE id = ?", (cost, attempt))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One write transaction. Rolls back on any error, and on an interrupt wherever it falls.

        Inside another one it is a part of that.
        """
        with self._lock, storage_errors(self.path):
            if self._inside:
                yield
                return
            try:
                self._inside = True
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            finally:
                self._inside = False
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")


def _compare(stored: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    stored, given = _flat(stored), _flat(given)
    names = sorted(stored.keys() | given.keys())
    differing = [name for name in names if stored.get(name) != given.get(name)]
    if differing:
        changes = "; ".join(
            f"{name} was {_short(stored.get(name))}, now {_short(given.get(name))}"
            for name in differing
        )
        raise RunMismatch(f"{path} holds another run: {changes}. Undo this or start another --out")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Members of members by their dotted names, so that a message can show what differs."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": v for inner, v in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
