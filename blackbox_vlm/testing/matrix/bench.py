"""Where faults are tried: a scripted server, a meter with a ledger, and what all three saw."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image

from blackbox_vlm.backend import (
    Access,
    Array,
    Backend,
    Capabilities,
    Labels,
    Outcome,
    Request,
    TextEmbeddings,
    TextScores,
)
from blackbox_vlm.errors import BlackboxError
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger, Lost
from blackbox_vlm.meter import Meter
from blackbox_vlm.running import run_sync
from blackbox_vlm.testing.clock import FakeClock
from blackbox_vlm.testing.matrix.spoils import spoil
from blackbox_vlm.testing.server import Received, ScriptedServer, Step, replying

BUDGET = 10_000
PATIENT = 20.0  # seconds: long enough for a right answer on a busy machine
HASTY = 0.4  # seconds, where a row waits for the timeout itself


class FaultHooks:
    """What the fault matrix must know of a backend that speaks to a server."""

    def make_remote(self, url: str, timeout: float, ca_file: Path | None = None) -> Backend:
        """A fresh backend that speaks to this origin and takes a picture with three texts.

        Args:
            url: origin of the scripted server.
            timeout: seconds for one request in all.
            ca_file: certificates to trust, where the backend can be told.
        """
        raise NotImplementedError("override make_remote")

    def good_answer(self, body: bytes) -> bytes:
        """The body of a right answer to the body of a request, as JSON.

        Its scores tell the texts apart: the meter stops where they never do.
        """
        raise NotImplementedError("override good_answer")

    def spoil(self, body: bytes, fault: str) -> bytes | None:
        """The body of a right answer with one fault; None where the protocol cannot have it."""
        return spoil(body, fault)


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of some questions."""

    received: list[Received]  # requests, by the server
    asked: int  # requests, by the backend
    charged: int  # queries, by the ledger
    unknown: int  # of them, those whose answer was lost
    waited: float  # seconds on the fake clock
    took: float  # seconds on the wall
    sent: int  # bytes, by the server
    error: BlackboxError | None
    answers: list[Array]

    @property
    def calls(self) -> int:
        """Requests that the server saw."""
        return len(self.received)


class Bench:
    """Tries one backend, with one ledger, until the block is left.

    Args:
        hooks: how to reach the backend and to answer it.
        folder: for pictures and the ledger.
    """

    def __init__(self, hooks: FaultHooks, folder: Path) -> None:
        self.hooks = hooks
        self.folder = folder
        self._ledger = Ledger(folder / "ledger.sqlite", BUDGET)
        self._ledger._db.execute("PRAGMA synchronous = OFF")  # no row is about a loss of power
        self._tries = 0
        self._port = 0
        self._before = self._ledger.totals()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ledger.close()

    def ask(
        self,
        script: Iterable[Step] = (),
        *,
        count: int = 1,
        usual: Step | None = None,
        url: str | None = None,
        tls: ssl.SSLContext | None = None,
        ca_file: Path | None = None,
        reads_bodies: bool = True,
        timeout: float = PATIENT,
        picture_side: int = 16,
        resume: bool = False,
        pause: float | None = None,
        canary: bool = False,
        on_lost: Lost = "stop",
        **declared: Any,
    ) -> Seen:
        """Ask different questions of a server that follows the script, then does as usual.

        Args:
            script: the faults, one per request.
            count: of the questions.
            usual: left out, right answers.
            url: of another server than the scripted one.
            ca_file: what the backend shall trust.
            tls, reads_bodies: see `ScriptedServer`.
            timeout: seconds that the backend gives one request.
            picture_side: pixels.
            resume: the questions of the last call again, at its address; otherwise new ones.
            pause: real seconds after each question, which are then asked one by one.
            canary: whether the first question is asked once more at the end.
            on_lost: see `Meter`.
            declared: what the backend declares, changed.
        """
        clock, usual = FakeClock(), usual or replying(self.hooks.good_answer)
        if not resume:
            self._tries, self._port, self._before = self._tries + 1, 0, self._ledger.totals()
        with ScriptedServer(
            usual, script, tls=tls, port=self._port, reads_bodies=reads_bodies
        ) as server:
            self._port = server.port
            backend = Declared(
                self.hooks.make_remote(url or server.url, timeout, ca_file), declared
            )
            questions = self._questions(backend.capabilities, count, picture_side)
            meter = Meter(backend, self._ledger, on_lost=on_lost, clock=clock)
            began = time.monotonic()
            answers, error = run_sync(_observe(meter, backend, questions, pause, canary))
            took, totals = time.monotonic() - began, self._ledger.totals()
        assert totals.open == 0, "the ledger closed every attempt"
        return Seen(
            server.received,
            backend.asked,
            totals.queries - self._before.queries,
            totals.unknown - self._before.unknown,
            clock.now(),
            took,
            server.sent,
            error,
            answers,
        )

    @property
    def capabilities(self) -> Capabilities:
        """What the backend declares by itself."""
        return self.hooks.make_remote("http://127.0.0.1:9", PATIENT).capabilities

    def spoilt(self, fault: str) -> Step | None:
        """A step that gives right answers with this fault; None where they cannot have it."""
        if self.hooks.spoil(self._sample, fault) is None:
            return None
        return replying(lambda sent: self.hooks.spoil(self.hooks.good_answer(sent), fault) or b"")

    @cached_property
    def _sample(self) -> bytes:
        """The body of a right answer."""
        return self.hooks.good_answer(self.ask().received[0].body)

    def _questions(self, limits: Capabilities, count: int, side: int) -> list[Request]:
        pictures = (self._picture(side),)
        names = ("cat", "dog", "car")[: limits.texts_per_request]
        questions: list[Request] = []
        for index in range(count):
            texts = tuple(f"a {name} of kind {self._tries}.{index}" for name in names)
            if limits.access is Access.EMBEDDINGS:
                questions.append(TextEmbeddings(texts))
            else:
                kind = Labels if limits.access is Access.LABEL else TextScores
                questions.append(kind(pictures, texts))
        return questions

    def _picture(self, side: int) -> Image:
        path = self.folder / f"{side}.png"
        if not path.exists():
            noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
            PIL.Image.fromarray(noise).save(path, compress_level=0)
        return Image.from_file(path)


class Declared:
    """A backend that declares something else: no more than every backend gives, and the changes.

    Attributes:
        asked: requests so far.
    """

    def __init__(self, inner: Backend, changes: dict[str, Any]) -> None:
        least = {"idempotent": False, "refusals_free": False, "concurrency": 1}
        one = {"requests_per_batch": 1, "deterministic": True}
        self.capabilities: Capabilities = replace(inner.capabilities, **(least | one | changes))
        self.asked = 0
        self._inner = inner

    async def answer(self, requests: Sequence[Request]) -> Sequence[Outcome]:
        self.asked += len(requests)
        return await self._inner.answer(requests)

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _observe(
    meter: Meter, backend: Backend, questions: list[Request], pause: float | None, canary: bool
) -> tuple[list[Array], BlackboxError | None]:
    answers: list[Array] = []
    try:
        if pause is None:
            answers += await meter.observe(questions, "fault")
        else:
            for question in questions:
                answers += await meter.observe([question], "fault")
                await asyncio.sleep(pause)
        if canary:
            answers.append(np.array(await meter.canary(questions[0])))
    except BlackboxError as error:
        return answers, error
    finally:
        await backend.aclose()
    return answers, None
