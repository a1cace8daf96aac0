"""What stands before every route: who asks, from where, how much and how fast.

One pure ASGI middleware. In this order: the size of the headers, the Host header (a page of another
site may point its name at this machine), the token, a place among the requests in work, the body
(bounded in bytes, and in time while it is read), the quota. Whoever is refused is told so in one
sentence.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .billing import Bill, Quota
from .refusal import Refusal, problem
from .settings import ServerSettings

OPEN_PATHS = frozenset({"/openapi.json", "/v2/health/live", "/v2/health/ready"})
MAX_HEADERS = 16 * 1024  # bytes, the URL's included
FREE_BYTES = 64 * 1024  # of a body that a GET does not need
DRAIN_SECONDS = 1.0  # a refused request's body is read so long, so that the refusal arrives
_ENDS = (408, 431)  # refusals that end the connection
BUSY_SECONDS = 1  # after which a request that found no place should come again


class Guard:
    """Lets through what may ask, with its whole body. See the module's docstring.

    Args:
        app: what is guarded.
        settings: the limits.
        bill: counts the requests and the refusals.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, bill: Bill) -> None:
        self._app, self._settings, self._bill = app, settings, bill
        self._in_work = 0
        rate, shown = settings.quota, settings.quota_headers
        self._quota = None if rate is None else Quota(rate, headers=shown)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asks = scope["method"] not in ("GET", "HEAD")
        self._bill.queries += asks
        incoming, watched = _Incoming(receive), self._watch(send) if asks else send
        try:
            _check_size(scope)
            self._check_host(scope)
            self._check_token(scope)
            with self._place(asks=asks):
                body = await self._body(incoming, self._settings.most_bytes if asks else FREE_BYTES)
                if asks and self._quota is not None:
                    self._quota.take()
                await self._app(scope, _replay(body, receive), watched)
        except Refusal as refusal:
            await self._refuse(refusal, scope, incoming, watched)
        except _Gone:
            return  # nobody is there to be told

    def _watch(self, send: Send) -> Send:
        """Counts refusals, and says what is left of the quota."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._bill.refused += 400 <= message["status"] < 500
                quota = self._quota.headers() if self._quota is not None else {}
                message = {**message, "headers": [*message["headers"], *_encoded(quota)]}
            await send(message)

        return watched

    def _check_host(self, scope: Scope) -> None:
        host = _header(scope, b"host").decode("latin-1").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name not in self._settings.hosts:
            raise Refusal(400, "this server is not known under that Host; see --allow-host")

    def _check_token(self, scope: Scope) -> None:
        token = self._settings.token
        if token is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        same = hmac.compare_digest(given.strip(), token.reveal().encode("ascii"))
        if not same or scheme.lower() != b"bearer":
            wanted = {"www-authenticate": "Bearer"}
            raise Refusal(401, "wanted the header Authorization: Bearer TOKEN", wanted)

    @contextmanager
    def _place(self, *, asks: bool) -> Iterator[None]:
        if asks and self._in_work >= self._settings.concurrency:
            after = {"retry-after": f"{BUSY_SECONDS}"} if self._settings.quota_headers else {}
            raise Refusal(
                429, f"{self._in_work} requests are in work, which is all; come back later", after
            )
        self._in_work += asks
        try:
            yield
        finally:
            self._in_work -= asks

    async def _body(self, incoming: _Incoming, most: int) -> bytes:
        seconds, body = self._settings.body_seconds, bytearray()
        try:
            async with asyncio.timeout(seconds):
                while not incoming.complete:
                    body += await incoming.chunk()
                    if len(body) > most:
                        raise Refusal(413, f"the body may have {most} bytes; send less at once")
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive in {seconds:g} s") from None
        return bytes(body)

    async def _refuse(
        self, refusal: Refusal, scope: Scope, incoming: _Incoming, send: Send
    ) -> None:
        ends = refusal.status in _ENDS or not await self._drain(incoming)
        headers = {**refusal.headers, "connection": "close"} if ends else refusal.headers
        body = json.dumps(problem(scope["path"], refusal.message)).encode()
        sent = {"content-type": "application/json", "content-length": f"{len(body)}", **headers}
        start = {"type": "http.response.start", "status": refusal.status}
        await send({**start, "headers": _encoded(sent)})
        await send({"type": "http.response.body", "body": body})

    async def _drain(self, incoming: _Incoming) -> bool:
        """Read and forget what is still coming, within limits; whether that was all."""
        left = self._settings.most_bytes
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while left >= 0 and not incoming.complete:
                    left -= len(await incoming.chunk())
        except (TimeoutError, _Gone):
            return False
        return incoming.complete


class _Gone(Exception):
    """The caller closed the connection before its request was complete."""


class _Incoming:
    """The body as it arrives."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.complete = False

    async def chunk(self) -> bytes:
        message = await self._receive()
        if message["type"] != "http.request":
            raise _Gone
        self.complete = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk


def _check_size(scope: Scope) -> None:
    """h11 bounds headers only while they are incomplete."""
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    if size + len(scope["raw_path"] or b"") + len(scope["query_string"]) > MAX_HEADERS:
        raise Refusal(431, f"headers and URL may have {MAX_HEADERS} bytes together; send less")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, in one piece."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
