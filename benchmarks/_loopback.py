"""A bare HTTP server for `client.py`, in a process of its own: latency and quotas, nothing else.

    python benchmarks/_loopback.py LATENCY_MS [KIND COUNT SECONDS]

prints its URL, and what it counted as JSON whenever a line comes in; it ends with its input. It
answers every POST as Hugging Face zero-shot classification does, with the same scores for all. KIND
is `window` (COUNT requests in each window of SECONDS, then 429 until the next) or `bucket` (holds
COUNT, refilled in SECONDS); refusals carry Retry-After in whole seconds, rounded up, as most do.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import cast

Quota = Callable[[], float]  # takes a request; returns the seconds to wait where it may not


@dataclass
class Counts:
    """What came."""

    answered: int = 0
    refused: int = 0


def window(count: int, seconds: float) -> Quota:
    """So many requests in each window, which opens with its first request."""
    ends, left = -math.inf, 0

    def take() -> float:
        nonlocal ends, left
        now = time.monotonic()
        if now >= ends:
            ends, left = now + seconds, count
        left -= 1
        return 0.0 if left >= 0 else ends - now

    return take


def bucket(count: int, seconds: float) -> Quota:
    """Tokens that come back one by one, `count` in `seconds`; full at the beginning."""
    tokens, since = float(count), time.monotonic()

    def take() -> float:
        nonlocal tokens, since
        now = time.monotonic()
        tokens, since = min(count, tokens + (now - since) * count / seconds), now
        if tokens < 1:
            return (1 - tokens) * seconds / count
        tokens -= 1
        return 0.0

    return take


class Connection(asyncio.Protocol):
    """One client, one request after the other."""

    def __init__(self, latency: float, quota: Quota, counts: Counts) -> None:
        self._latency, self._quota, self._counts = latency, quota, counts
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(rest) >= length:
            self._received = b""
            self._serve(rest)

    def _serve(self, body: bytes) -> None:
        wait = self._quota()
        if wait > 0:
            self._counts.refused += 1
            self._send(_message(b"{}", f"429 No\r\nretry-after: {math.ceil(wait)}"))
            return
        self._counts.answered += 1
        texts = json.loads(body)["parameters"]["candidate_labels"]
        scored = [
            {"label": text, "score": 2 * (i + 1) / len(texts) / (len(texts) + 1)}
            for i, text in enumerate(texts)
        ]
        answer = _message(json.dumps(scored).encode(), "200 OK")
        if self._latency:
            asyncio.get_running_loop().call_later(self._latency, self._send, answer)
        else:
            self._send(answer)

    def _send(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


def _scored(texts: list[str]) -> list[dict[str, object]]:
    """Scores that sum to 1 and differ."""
    step = 2 / len(texts) / (len(texts) + 1)
    return [{"label": text, "score": step * place} for place, text in enumerate(texts, 1)]


def _message(body: bytes, status: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


async def main(latency: float, quota: Quota) -> None:
    loop, counts = asyncio.get_running_loop(), Counts()
    server = await loop.create_server(lambda: Connection(latency, quota, counts), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(asdict(counts)), flush=True)


if __name__ == "__main__":
    kinds = {"window": window, "bucket": bucket}
    kind, *limits = sys.argv[2:] or ["none"]
    made = kinds[kind](int(limits[0]), float(limits[1])) if limits else lambda: 0.0
    asyncio.run(main(float(sys.argv[1]) / 1000, made))
