"""The owner's books: what was billed, which requests were sent again, and how many may come."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from blackbox_vlm.backend import Price, Request

from .refusal import Refusal
from .settings import Rate

KEPT_BYTES = 64 * 2**20  # of answers that can be given again


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answered request is billed."""

    queries: int
    images: int
    texts: int
    usd: float

    @classmethod
    def of(cls, requests: Sequence[Request], price: Price) -> Usage:
        """One query, whatever it holds."""
        images = sum(request.n_images for request in requests)
        texts = sum(request.n_texts for request in requests)
        counted = price.per_image * images + price.per_text * texts
        return cls(1, images, texts, price.per_request + counted)


@dataclass(slots=True)
class Bill:
    """The counter that `/usage` shows: the judge of what was paid.

    Attributes:
        queries: requests that arrived.
        billed: requests whose answer was computed, whether or not it arrived.
        refused: requests that were answered 4xx, and not billed.
        duplicates: requests answered from memory, and not billed again.
        spoiled: answers that an injected fault lost.
        images, texts, usd: of what was billed.
    """

    queries: int = 0
    billed: int = 0
    refused: int = 0
    duplicates: int = 0
    spoiled: int = 0
    images: int = 0
    texts: int = 0
    usd: float = 0.0

    def charge(self, usage: Usage) -> None:
        """Add what was computed."""
        self.billed += usage.queries
        self.images += usage.images
        self.texts += usage.texts
        self.usd += usage.usd


class Quota:
    """A fixed window: so many requests, then none until the window ends."""

    def __init__(self, rate: Rate, *, headers: bool) -> None:
        self._rate, self._shown = rate, headers
        self._ends, self._left = -math.inf, 0

    def take(self) -> None:
        """Raises Refusal: the window is used up."""
        now = time.monotonic()
        if now >= self._ends:
            self._ends, self._left = now + self._rate.seconds, self._rate.count
        if self._left == 0:
            wait = self._ends - now
            after = {"retry-after": f"{math.ceil(wait)}", "retry-after-ms": f"{1000 * wait:.0f}"}
            told = f"the quota of {self._rate.count} requests in {self._rate.seconds:g} s is used"
            raise Refusal(429, f"{told}; come back later", after if self._shown else {})
        self._left -= 1

    def headers(self) -> dict[str, str]:
        """What is left, and the seconds until there is more."""
        if not self._shown:
            return {}
        resets = max(0.0, self._ends - time.monotonic())
        return {
            "ratelimit-limit": f"{self._rate.count}",
            "ratelimit-remaining": f"{self._left}",
            "ratelimit-reset": f"{resets:.3f}",
        }


class Answered:
    """Answers by idempotency key: a request that is sent again is neither done nor billed again.

    Kept in memory, the last `KEPT_BYTES` of them. A request that comes while the first is still in
    work waits for that one's answer.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()
        self._open: dict[str, tuple[bytes, asyncio.Task[bytes]]] = {}
        self._size = 0

    async def once(
        self, key: str, digest: bytes, work: Callable[[], Awaitable[bytes]]
    ) -> tuple[bytes, bool]:
        """The answer to the request with this key, and whether it had been asked before.

        Args:
            key: of the request.
            digest: of its content.
            work: computes the answer.

        Raises:
            Refusal: the key belongs to a request with another content, or `work` refused.
        """
        known = self._kept.get(key) or self._open.get(key)
        if known is None:
            return await self._first(key, digest, work), False
        if known[0] != digest:
            raise Refusal(422, "this idempotency key was used for another request; use a new one")
        found = known[1]
        return found if isinstance(found, bytes) else await asyncio.shield(found), True

    async def _first(self, key: str, digest: bytes, work: Callable[[], Awaitable[bytes]]) -> bytes:
        task = asyncio.ensure_future(self._work(key, digest, work))
        self._open[key] = digest, task
        return await asyncio.shield(task)  # goes on where its caller has gone: it will be billed

    async def _work(self, key: str, digest: bytes, work: Callable[[], Awaitable[bytes]]) -> bytes:
        try:
            answer = await work()
            self._keep(key, digest, answer)
        finally:
            del self._open[key]
        return answer

    def _keep(self, key: str, digest: bytes, answer: bytes) -> None:
        self._kept[key] = digest, answer
        self._size += len(answer)
        while self._size > KEPT_BYTES and len(self._kept) > 1:
            self._size -= len(self._kept.popitem(last=False)[1][1])
