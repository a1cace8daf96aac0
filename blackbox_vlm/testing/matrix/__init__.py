"""The fault matrix: what a network and a server can do to a client, and what it may cost.

Every row of `ROWS` is one fault. It is tried under the declarations that matter to the bill, and
each time three numbers must be right: the requests that the server saw, the queries that the ledger
charged, and the time that was waited (on a fake clock; on the wall where a deadline is meant).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from blackbox_vlm.testing.matrix import network, nonsense, refusals
from blackbox_vlm.testing.matrix.bench import Bench, FaultHooks


@dataclass(frozen=True, slots=True)
class Row:
    """One fault: its number in the matrix, its name, and what must hold."""

    id: str
    name: str
    check: Callable[[Bench], None]

    def __str__(self) -> str:
        return f"{self.id} {self.name}"


ROWS = (
    Row("F01", "connection refused", network.connection_refused),
    Row("F02", "connect timeout", network.connect_timeout),
    Row("F03", "pool exhausted", network.pool_exhausted),
    Row("F04", "untrusted certificate", network.untrusted_certificate),
    Row("F05", "redirect to another host", network.redirect_elsewhere),
    Row("F06", "redirect loop, relative redirect", network.redirect_here),
    Row("F07", "no answer in time", network.read_timeout),
    Row("F08", "reset before the answer", network.connection_reset),
    Row("F09", "kept connection closed", network.keep_alive_closed),
    Row("F10", "truncated body", network.truncated_body),
    Row("F11", "dripping body", network.dripping_body),
    Row("F12", "nobody reads the upload", network.slow_upload),
    Row("F13", "endless body", network.endless_body),
    Row("F14", "compressed body", network.compressed_body),
    Row("F15", "header bomb", network.header_bomb),
    Row("F16", "429 with Retry-After", refusals.rate_limited),
    Row("F17", "429 for ever", refusals.rate_limited_for_ever),
    Row("F18", "5xx once", refusals.server_error),
    Row("F19", "503 storm", refusals.server_error_storm),
    Row("F20", "401, 403", refusals.key_refused),
    Row("F21", "402, quota exhausted", refusals.credit_spent),
    Row("F22", "400, 422", refusals.request_refused),
    Row("F23", "413", refusals.request_too_large),
    Row("F24", "no JSON", nonsense.no_json),
    Row("F25", "no finite number", nonsense.no_number),
    Row("F26", "too short, too long", nonsense.wrong_length),
    Row("F27", "labels reordered", nonsense.labels_reordered),
    Row("F28", "labels changed", nonsense.labels_changed),
    Row("F29", "no probabilities, no signal", nonsense.improbable),
    Row("F30", "answer of another request", nonsense.answer_of_another),
    Row("F31", "model changes", nonsense.model_changes),
    Row("F32", "other answer to the same query", nonsense.noisy_server),
    Row("F33", "one of a batch", nonsense.one_of_a_batch),
    Row("F34", "hostile JSON", nonsense.hostile_json),
)


class FaultMatrix(FaultHooks):
    """Every fault against a backend that speaks to a server. Name the subclass `Test...`.

    Override `make_remote` and `good_answer`, and `spoil` where answers are no JSON.
    """

    @pytest.mark.parametrize("row", ROWS, ids=str)
    def test_fault(self, row: Row, tmp_path: Path) -> None:
        with Bench(self, tmp_path) as bench:
            row.check(bench)
