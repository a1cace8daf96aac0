"""The matrix finds a client that breaks one promise; each of these breaks one."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blackbox_vlm.backends import _client, _headers, transport, zero_shot
from blackbox_vlm.backends.endpoint import Reading
from blackbox_vlm.backends.zero_shot import ZeroShot
from faults.remote import BatchedZeroShot, HostedZeroShot

from blackbox_vlm import contract, meter
from blackbox_vlm.backend import Outcome, Request
from blackbox_vlm.errors import BackendError, NotSent, Refused, UnknownOutcome
from blackbox_vlm.testing.matrix import ROWS
from blackbox_vlm.testing.matrix.bench import Bench

BY_ID = {row.id: row for row in ROWS}


class Misread(BatchedZeroShot):
    """Passes every outcome through a mistake."""

    mistake: Callable[[Outcome], Outcome] = staticmethod(lambda outcome: outcome)

    async def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        return [self.mistake(outcome) for outcome in await super().answer(requests)]


class Persistent(BatchedZeroShot):
    """Sends again what failed, without telling."""

    async def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        first = await super().answer(requests)
        if not any(isinstance(outcome, BackendError) for outcome in first):
            return first
        return await super().answer(requests)


class Impatient(BatchedZeroShot):
    """Has too few connections, and takes waiting in vain for a lost answer."""

    async def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        self.transport._connections, self.transport._timeout = 1, 0.1
        outcomes = await super().answer(requests)
        return [UnknownOutcome("?") if isinstance(o, NotSent) else o for o in outcomes]


class Lenient(BatchedZeroShot):
    """Waits longer than it was told."""

    def __init__(self, *, timeout: float, **options: Any) -> None:
        super().__init__(timeout=2 * timeout, **options)


class Positional(BatchedZeroShot):
    """Does not read the labels."""

    def decode(self, reply: Any, request: Any) -> Reading:
        named = zip(reply.data, request.texts, strict=False)
        rows = [{**row, "label": text} for row, text in named]
        return super().decode(replace(reply, data=rows), request)


def misread(kind: type[BackendError], other: type[BackendError]) -> type[ZeroShot]:
    """A client that takes one outcome for another."""

    def mistake(outcome: Outcome) -> Outcome:
        return other(str(outcome)) if isinstance(outcome, kind) else outcome

    return type("Wrong", (Misread,), {"mistake": staticmethod(mistake)})


def coerced(value: Any, shape: Any, what: str) -> Any:
    return np.array(value, dtype=np.float32).reshape(shape)


def no_verification(ca_file: object) -> ssl.SSLContext:
    return ssl._create_unverified_context()


def follow(options: Any) -> Any:
    return _open(dict(options) | {"follow_redirects": True})


FOUND = (AssertionError, RecursionError, ValueError)
_open = _client._open_client
MISTAKES: list[tuple[str, type[ZeroShot] | None, tuple[Any, str, Any] | None]] = [
    ("F01", misread(NotSent, UnknownOutcome), None),
    ("F02", misread(NotSent, UnknownOutcome), None),
    ("F03", Impatient, None),
    ("F04", None, (transport, "trusted", no_verification)),
    ("F05", None, (_client, "_open_client", follow)),
    ("F06", None, (_client, "_open_client", follow)),
    ("F07", misread(UnknownOutcome, NotSent), None),
    ("F07", Persistent, None),
    ("F08", Persistent, None),
    ("F09", Persistent, None),
    ("F10", misread(UnknownOutcome, Refused), None),
    ("F11", Lenient, None),
    ("F13", None, (zero_shot, "_bytes_of_labels", lambda texts: 40 * 2**20)),
    ("F15", None, (transport, "MAX_HEADERS", 2**40)),
    ("F16", None, (_headers, "retry_after", lambda headers: None)),
    ("F16", None, (_headers, "_number", lambda text: float(text or "nan"))),
    ("F17", None, (meter, "ATTEMPTS", 4)),
    ("F18", misread(UnknownOutcome, NotSent), None),
    ("F19", None, (meter, "RETRIES_PER_ANSWER", 10)),
    ("F20", misread(Refused, UnknownOutcome), None),
    ("F20", None, (transport.Transport, "scrub", lambda self, text: text)),
    ("F21", None, (transport, "_says_no_credit", lambda body: False)),
    ("F22", None, (transport, "SHOWN", 100_000)),
    ("F22", None, (transport, "_one_line", lambda text: text)),
    ("F23", misread(Refused, UnknownOutcome), None),
    ("F24", Persistent, None),
    ("F25", None, (zero_shot, "numbers", coerced)),
    ("F26", Positional, None),
    ("F28", Positional, None),
    ("F29", None, (contract, "_check_sum", lambda values, capabilities: None)),
    ("F29", None, (contract, "_is_constant", lambda request, answer: False)),
    ("F30", Positional, None),
    ("F33", misread(Refused, UnknownOutcome), None),
    ("F34", None, (transport, "parse_json", json.loads)),
]
NAMES = [f"{row} {number}" for number, (row, *_) in enumerate(MISTAKES)]


@pytest.mark.parametrize(("row", "client", "patch"), MISTAKES, ids=NAMES)
def test_a_mistake_is_found(
    row: str,
    client: type[ZeroShot] | None,
    patch: tuple[Any, str, Any] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if patch is not None:
        monkeypatch.setattr(*patch)

    class Hooks(HostedZeroShot):
        client_class = client or BatchedZeroShot

    with Bench(Hooks(), tmp_path) as bench, pytest.raises(FOUND):
        BY_ID[row].check(bench)
