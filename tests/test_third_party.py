"""All that somebody writes who adds a protocol of their own, and both suites on it.

Nothing private of ours is used here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blackbox_vlm.backends.answers import member, numbers
from blackbox_vlm.backends.endpoint import Call, HttpBackend, Reading
from blackbox_vlm.backends.transport import Reply

from blackbox_vlm.backend import Access, Backend, Capabilities, ScoreKind
from blackbox_vlm.testing import BackendConformance, FaultMatrix, ScriptedServer
from blackbox_vlm.testing.server import replying


class Sorter(HttpBackend):
    """`{"picture": BASE64, "words": [...]}` is answered by `{"model": ..., "shares": [...]}`."""

    def declare(self) -> Capabilities:
        return self.declared(access=Access.SCORES, score_kind=ScoreKind.SOFTMAX)

    def encode(self, request: Any) -> Call:
        [image] = request.images
        return Call({"picture": self.uploads.base64(image), "words": list(request.texts)})

    def decode(self, reply: Reply, request: Any) -> Reading:
        shares = member(reply.data, "shares", list)
        values = numbers([shares], request.answer_shape, "the answer's shares")
        return Reading(values, model_id=member(reply.data, "model", str))


class TestSorter(BackendConformance, FaultMatrix):
    @pytest.fixture
    def server(self) -> Iterator[ScriptedServer]:
        with ScriptedServer(replying(self.good_answer)) as server:
            yield server

    @pytest.fixture(autouse=True)
    def _url(self, server: ScriptedServer) -> None:
        self._origin = server.url

    def make_backend(self) -> Backend:
        return self.make_remote(self._origin, timeout=20.0)

    def make_remote(self, url: str, timeout: float, ca_file: Path | None = None) -> Backend:
        return Sorter(url=url, model="sorter", timeout=timeout, ca_file=ca_file)

    def good_answer(self, body: bytes) -> bytes:
        words = json.loads(body)["words"]
        shares = [1 / len(words)] * len(words)
        shares[0] += 0.25 * shares[-1]  # texts told apart, or there would be nothing to learn
        shares[-1] *= 0.75
        return json.dumps({"model": "sorter", "shares": shares}).encode()
