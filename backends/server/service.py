"""From a request's content to its answer: once per idempotency key, in one thread, and billed.

A request is billed when its answer has been computed, whether or not it arrives. What is refused is
not billed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from blackbox_vlm.backend import Access, Array, Backend, Capabilities, Request
from blackbox_vlm.errors import BackendError, InputError, RateLimited
from blackbox_vlm.images import Image
from blackbox_vlm.running import run_sync

from .billing import Answered, Bill, Usage
from .faults import BEFORE, Faults, spoiled
from .pictures import Pictures
from .refusal import Refusal
from .settings import MAX_IMAGES, MAX_TEXTS, ServerSettings


@dataclass(frozen=True, slots=True)
class Question:
    """A request as a protocol reads it.

    Attributes:
        images: in base64.
        ask: what to ask the backend about them; several requests are billed as one.
        write: the JSON of the answer, from the backend's values and the bill.
    """

    images: Sequence[str]
    ask: Callable[[tuple[Image, ...]], list[Request]]
    write: Callable[[list[Array], Usage], Any]


class Service:
    """A backend with an owner: who asks it, pays.

    Args:
        backend: answers; it is asked one request at a time.
        settings: the owner's demands.

    Attributes:
        offer: what is given, as a client should declare it.
        bill: what was billed so far.
    """

    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        self._backend, self._settings = backend, settings
        self.offer = offered(backend.capabilities, settings)
        self.bill = Bill()
        self._answered = Answered()
        self._faults = Faults(settings.faults, settings.seed)
        self._pictures = Pictures(settings.most_pixels)
        self._worker = _one_thread()

    def gives(self, *levels: Access) -> bool:
        """Whether the access level is one of these."""
        return self.offer.access in levels

    def check_model(self, name: str | None) -> None:
        """Raises Refusal: another model was asked for."""
        if name is not None and name != self.offer.model_id:
            raise Refusal(404, f"no such model here; this endpoint serves {self.offer.model_id}")

    async def answer(self, http: HttpRequest, question: Question) -> Response:
        """The HTTP answer to a question; billed, unless it is refused or was asked before."""
        fault = self._faults.draw()
        if fault in BEFORE:
            raise Refusal(BEFORE[fault], "not now (injected); come back later")
        await asyncio.sleep(self._settings.latency)
        body, again = await self._once(http, question)
        self.bill.duplicates += again
        self.bill.spoiled += fault is not None
        if fault == "slow":
            await asyncio.sleep(self._settings.slow)
        headers = {"idempotency-replayed": "true"} if again else None
        return spoiled(fault, Response(body, headers=headers, media_type="application/json"))

    def close(self) -> None:
        """Finish what the model is at, and let go of its thread; the next question starts one."""
        self._worker.shutdown(cancel_futures=True)
        self._worker = _one_thread()

    async def _once(self, http: HttpRequest, question: Question) -> tuple[bytes, bool]:
        async def work() -> bytes:
            loop = asyncio.get_running_loop()
            body, usage = await loop.run_in_executor(self._worker, self._work, question)
            self.bill.charge(usage)
            return body

        key = http.headers.get("idempotency-key")
        if key is None:
            return await work(), False
        digest = hashlib.sha256(http.url.path.encode() + b"\n" + await http.body()).digest()
        return await self._answered.once(key, digest, work)

    def _work(self, question: Question) -> tuple[bytes, Usage]:
        with self._pictures.received(question.images) as images:
            requests = question.ask(images)
            values = [self._values(request) for request in requests]
        usage = Usage.of(requests, self._settings.price)
        return json.dumps(question.write(values, usage), allow_nan=False).encode(), usage

    def _values(self, request: Request) -> Array:
        self._check(request)
        try:
            [outcome] = run_sync(_ask(self._backend, request))
        except InputError:
            outcome = None  # its message repeats a text
        if outcome is None:
            raise Refusal(
                422,
                "the model does not take these texts; is one of them longer than it reads, or "
                "runs the template into the class name?",
            )
        if isinstance(outcome, RateLimited):
            raise Refusal(429, "the model behind this endpoint is busy; come back later")
        if isinstance(outcome, BackendError):
            raise Refusal(502, "the model behind this endpoint failed")
        values: Array = outcome.values
        return values

    def _check(self, request: Request) -> None:
        try:
            self.offer.check(request)
        except InputError as error:
            raise Refusal(422, str(error)) from None


def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="serve-blackbox")


async def _ask(backend: Backend, request: Request) -> Sequence[Any]:
    try:
        return await backend.answer([request])
    except BackendError as error:
        return [error]


def plain(values: Array, decimals: int | None = None) -> Any:
    """Numbers as nested lists, exactly; null for what is withheld.

    Rounded numbers are written as short as they are: float32 holds 0.1234 a little off.
    """
    if values.dtype.kind == "f" and (decimals is not None or np.isnan(values).any()):
        return _plain(values.tolist(), decimals)
    return values.tolist()


def _plain(value: Any, decimals: int | None) -> Any:
    if isinstance(value, list):
        return [_plain(part, decimals) for part in value]
    if value != value:
        return None
    return value if decimals is None else round(value, decimals)


def offered(capabilities: Capabilities, settings: ServerSettings) -> Capabilities:
    """What a served backend gives: within the server's own limits, at its owner's price."""

    def least(limit: int | None, most: int) -> int:
        return most if limit is None else min(limit, most)

    return replace(
        capabilities,
        images_per_request=least(capabilities.images_per_request, MAX_IMAGES),
        texts_per_request=least(capabilities.texts_per_request, MAX_TEXTS),
        price=settings.price,
        idempotent=True,
        refusals_free=True,
        concurrency=settings.concurrency,
    )
