"""What tests of the hosted protocols share: an endpoint that is a function, and its pictures."""

from __future__ import annotations

import base64
import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image

from blackbox_vlm.backend import Answer, Array, Backend, Outcome, Request
from blackbox_vlm.contract import check_answer
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.running import run_sync

EXAMPLES = Path(__file__).parent.parent / "examples"
URL = "http://127.0.0.1:1/models/clip"


def reply(data: Any, status: int = 200, **headers: str) -> httpx.Response:
    """An answer that is still to be read, as one from a network is; bytes are sent as they are."""
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(content))


def served(answer: Callable[[httpx.Request], Any]) -> httpx.MockTransport:
    """An endpoint in this process: a request -> its answer, as JSON, bytes or a response."""

    def handle(request: httpx.Request) -> httpx.Response:
        data = answer(request)
        return data if isinstance(data, httpx.Response) else reply(data)

    return httpx.MockTransport(handle)


def uploaded(text: str) -> Image:
    """The picture that a server sees, by the base64 it was sent."""
    return Image(Path("uploaded"), hashlib.sha256(base64.b64decode(text)).hexdigest())


def noise(folder: Path, count: int) -> tuple[Image, ...]:
    """Different pictures on the disk."""
    pixels = np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    for index, picture in enumerate(pixels):
        PIL.Image.fromarray(picture).save(folder / f"{index}.png")
    return tuple(Image.from_file(folder / f"{index}.png") for index in range(count))


def outcomes(backend: Backend, *requests: Request) -> list[Outcome]:
    """What became of requests that were asked together."""

    async def ask() -> list[Outcome]:
        try:
            return list(await backend.answer(requests))
        finally:
            await backend.aclose()

    return run_sync(ask())


def answers(backend: Backend, *requests: Request) -> list[Answer]:
    """Answers, checked as the meter checks them; the first error is raised."""
    found = []
    for request, outcome in zip(requests, outcomes(backend, *requests), strict=True):
        if not isinstance(outcome, Answer):
            raise outcome
        check_answer(request, outcome, backend.capabilities)
        found.append(outcome)
    return found


def values(backend: Backend, request: Request) -> Any:
    """The numbers of one answer."""
    return answers(backend, request)[0].values


def example(name: str) -> dict[str, Any]:
    """The options of an example of an endpoint file, its protocol among them."""
    return tomllib.loads((EXAMPLES / f"{name}.toml").read_text(encoding="utf-8"))


def metered(backend: Backend, ledger: Ledger, *requests: Request, **options: Any) -> list[Array]:
    """Ask as a run does: through the meter, on the account of a ledger."""

    async def ask() -> list[Array]:
        try:
            return await Meter(backend, ledger, **options).observe(requests, "search")
        finally:
            await backend.aclose()

    return run_sync(ask())


def spent(ledger: Ledger) -> tuple[int, int]:
    """Queries charged, and how many of them lost their answer."""
    totals = ledger.totals()
    return totals.queries, totals.unknown
