"""The ledger against a model of it: any order of reserving, settling, losing, dying, resuming."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from blackbox_vlm.backend import Answer
from blackbox_vlm.errors import BudgetError, UnknownOutcome
from blackbox_vlm.ledger import NANO, Entry, Ledger

QUERIES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3, unique=True)
CENTS = {query: cents for cents, query in enumerate("abcdefgh")}
PURPOSES = ("zero-shot", "search")


class Attempt:
    """What the model knows of a row."""

    def __init__(self, query: str) -> None:
        self.query = query
        self.outcome = "open"
        self.sends = 1


class LedgerMachine(RuleBasedStateMachine):
    """The model is a dict of attempts and a dict of answers; the ledger must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.attempts: dict[int, Attempt] = {}
        self.answers: dict[str, float] = {}
        self.state: bytes | None = None
        self.asked = 0

    @initialize(budget=st.integers(1, 8), cents=st.none() | st.integers(0, 30))
    def open(self, budget: int, cents: int | None) -> None:
        self.budget, self.cents = budget, cents
        self.max_cost = None if cents is None else cents / 100
        self.ledger = self._opened()

    def _opened(self) -> Ledger:
        ledger = Ledger(self.path, self.budget, max_cost=self.max_cost)
        ledger._db.execute("PRAGMA synchronous = OFF")  # the machine loses no power
        return ledger

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
        self.folder.cleanup()

    # -- the model --------------------------------------------------------------------------

    @property
    def charged(self) -> list[Attempt]:
        return [a for a in self.attempts.values() if a.outcome != "refunded"]

    def pending(self, query: str) -> int | None:
        rows = [n for n, a in self.attempts.items() if a.query == query and a in self.charged]
        return rows[-1] if rows and self.attempts[rows[-1]].outcome != "done" else None

    def affordable(self, queries: list[str]) -> bool:
        cents = sum(CENTS[a.query] for a in self.charged) + sum(CENTS[q] for q in queries)
        enough = self.cents is None or cents <= self.cents
        return enough and len(self.charged) + len(queries) <= self.budget

    def choose(self, data: st.DataObject) -> list[int]:
        known = sorted(self.attempts)
        return data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))

    # -- the moves --------------------------------------------------------------------------

    @rule(queries=QUERIES, idempotent=st.booleans(), resend=st.booleans())
    def reserve(self, queries: list[str], *, idempotent: bool, resend: bool) -> None:
        entries = [
            Entry(q, PURPOSES[CENTS[q] % 2], images=1, texts=2, cost=CENTS[q] / 100)
            for q in queries
        ]
        pending = [self.pending(query) for query in queries]
        fresh = [
            q for q, row in zip(queries, pending, strict=True) if row is None or not idempotent
        ]
        options: dict[str, Any] = {"idempotent": idempotent}
        options["on_lost"] = "resend" if resend else "stop"
        if not idempotent and not resend and any(row is not None for row in pending):
            with pytest.raises(UnknownOutcome):
                self.ledger.reserve(entries, **options)
            return
        if not self.affordable(fresh):
            with pytest.raises(BudgetError):
                self.ledger.reserve(entries, **options)
            return
        got = self.ledger.reserve(entries, **options)
        assert len(got) == len(queries)
        for query, row, attempt in zip(queries, pending, got, strict=True):
            if row is None or not idempotent:
                assert attempt not in self.attempts
                self.attempts[attempt] = Attempt(query)
            else:
                assert attempt == row
                self.attempts[row].outcome = "open"
                self.attempts[row].sends += 1

    def close_some(self, data: st.DataObject, outcome: str) -> list[int]:
        """What `lose` and `forfeit` do: open attempts take an outcome, the others keep theirs."""
        chosen = self.choose(data)
        for number in chosen:
            if self.attempts[number].outcome == "open":
                self.attempts[number].outcome = outcome
        return chosen

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.ledger.lose(self.close_some(data, "unknown"))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def forfeit(self, data: st.DataObject) -> None:
        self.ledger.forfeit(self.close_some(data, "done"))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        chosen = self.choose(data)
        self.ledger.refund(chosen)
        for number in chosen:
            attempt = self.attempts[number]
            if attempt.outcome == "open":
                attempt.outcome = "refunded" if attempt.sends == 1 else "unknown"

    @precondition(lambda self: any(a.outcome in ("open", "unknown") for a in self.charged))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        sent = sorted(n for n, a in self.attempts.items() if a.outcome in ("open", "unknown"))
        number = data.draw(st.sampled_from(sent))
        attempt = self.attempts[number]
        self.asked += 1
        values = np.array([[self.asked]], dtype=np.float32)
        self.ledger.settle([number], [Answer(values, "model")])
        attempt.outcome = "done"
        self.answers.setdefault(attempt.query, self.asked)

    @rule(data=st.binary(max_size=4), purpose=st.sampled_from(PURPOSES))
    def checkpoint(self, data: bytes, purpose: str) -> None:
        self.ledger.checkpoint("state", data, absorbs=[purpose])
        self.state = data
        self.answers = {q: v for q, v in self.answers.items() if PURPOSES[CENTS[q] % 2] != purpose}

    @rule(tidy=st.booleans())
    def resume(self, *, tidy: bool) -> None:
        """Another process takes over; a dead one has closed nothing."""
        old = self.ledger
        if tidy:
            old.close()
        self.ledger = self._opened()
        old.close()

    @rule(more=st.integers(0, 2))
    def extend(self, more: int) -> None:
        self.ledger.close()
        self.budget += more
        Ledger(self.path, self.budget, max_cost=self.max_cost, extend=True).close()
        self.ledger = self._opened()

    # -- what holds at all times ------------------------------------------------------------

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "ledger"):
            return
        totals, charged = self.ledger.totals(), self.charged
        assert totals.queries == self.ledger.spent() == len(charged) <= self.budget
        assert totals.unknown == sum(a.outcome == "unknown" for a in charged)
        assert totals.open == sum(a.outcome == "open" for a in charged)
        assert (totals.images, totals.texts) == (len(charged), 2 * len(charged))
        assert round(totals.cost * NANO) == sum(CENTS[a.query] for a in charged) * NANO // 100
        assert self.max_cost is None or totals.cost <= self.max_cost
        assert sum(self.ledger.by_purpose().values()) == len(charged)

    @invariant()
    def every_answer_is_there(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert self.ledger.restore("state") == self.state
        for query in CENTS:
            stored = self.ledger.answer(query)
            assert (stored and float(stored.values[0, 0])) == self.answers.get(query)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLedgerMachine = pytest.mark.slow(TestLedgerMachine)
