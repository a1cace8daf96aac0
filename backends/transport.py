"""One request, once: beside `_client.py` the only module that knows httpx.

A request is sent a single time and ends in a `Reply` or in the one error that says what it means
for the budget (`blackbox_vlm.errors`). Who retries, and who pays, is the meter's business.

Nothing from the other side is trusted: redirects and compressed bodies are refused; headers, body,
JSON depth and numbers are bounded before they are parsed; a monotonic deadline ends a dripping
answer. The key leaves only to the configured origin, over https or the loopback interface, and no
exception or log line holds it. Measured reasons: the project's reliability notes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import httpx

from blackbox_vlm._version import __version__
from blackbox_vlm.backend import Quota
from blackbox_vlm.errors import (
    AuthError,
    BackendError,
    ContractError,
    InputError,
    NotSent,
    QuotaError,
    RateLimited,
    Refused,
    UnknownOutcome,
)
from blackbox_vlm.secret import Secret

from . import _headers
from ._client import Progress, Session, require_http2, trusted
from ._json import parse_json
from ._url import Origin, parse_url

logger = logging.getLogger(__name__)
for _name in ("httpx", "httpcore"):  # at INFO they print URLs, which may hold a key
    logging.getLogger(_name).setLevel(logging.WARNING)

MAX_BODY = 2**20  # bytes of an answer
MAX_HEADERS = 16 * 1024  # bytes
MAX_REFUSAL = 64 * 1024  # bytes of a body that says no; the rest is not read
# Seconds for TCP and again for TLS. Both end before the deadline of the whole request: a handshake
# that is cancelled leaves its socket open (httpcore 1.0.9).
CONNECT_TIMEOUT = 10.0
SHOWN = 200  # characters of an error body in a message


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer with status 200: its JSON, and its headers in lower case."""

    data: Any
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def quota(self) -> Quota | None:
        """What the headers say about the rate limit."""
        return _headers.quota(self.headers)


class Transport:
    """Posts JSON to one origin.

    Args:
        url: http only on the loopback interface, https elsewhere.
        headers: sent with every request; a `Secret` among the values is revealed only there.
        timeout: seconds for one request in all, from the connection to the last byte.
        connections: how many may be open.
        busy: statuses by which the endpoint says "not now" without doing the work.
        http2: speak HTTP/2 where the endpoint does (needs the extra `http2`).
        ca_file: certificates to trust instead of the usual ones; verification itself is always on.
        use_env_proxy: whether HTTP_PROXY and friends count.
        inner: an httpx transport in place of the network, for tests.

    Raises:
        InputError: the URL is not one that is spoken to, or HTTP/2 is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str | Secret] | None = None,
        timeout: float = 60.0,
        connections: int = 1,
        busy: frozenset[int] = frozenset({429}),
        http2: bool = False,
        ca_file: Path | None = None,
        use_env_proxy: bool = False,
        inner: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._origin, self._path, self._query = parse_url(url)
        self._headers = {name.lower(): value for name, value in (headers or {}).items()}
        self._timeout = timeout
        self._busy = busy
        self._inner = inner
        self._connections = connections
        self._options: dict[str, Any] = {
            "http2": http2,
            "verify": trusted(ca_file),
            "trust_env": use_env_proxy,
            "transport": inner,
            "follow_redirects": False,
            "limits": httpx.Limits(max_connections=connections),
            "timeout": httpx.Timeout(None, connect=min(CONNECT_TIMEOUT, timeout / 3)),
        }
        if http2:
            require_http2()
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, Session] = WeakKeyDictionary()

    @property
    def origin(self) -> Origin:
        """Scheme, host and port; the host in punycode."""
        return self._origin

    @property
    def route(self) -> str:
        """Origin and path, and a digest of the query string, which may hold what is not shown."""
        digest = hashlib.sha256(self._query.encode()).hexdigest()[:12] if self._query else ""
        return f"{self._origin}{self._path}{digest and '?' + digest}"

    async def post(
        self,
        body: Any,
        *,
        path: str = "",
        headers: Mapping[str, str] | None = None,
        most: int = MAX_BODY,
    ) -> Reply:
        """Send a body once and read the JSON of the answer.

        Args:
            body: what `json.dumps` takes, without NaN; or bytes, sent as they are under the
                content type among `headers`.
            path: appended to the configured URL.
            headers: of this request alone, such as its idempotency key.
            most: bytes that the answer may have.

        Raises:
            NotSent: it never reached the endpoint.
            Refused: a complete answer that says no; `RateLimited`, `AuthError` and `QuotaError` are
                what their names say.
            UnknownOutcome: it was sent, and its answer was lost or cannot be read.
        """
        content = body
        if not isinstance(body, bytes):
            content = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        return await self._exchange("POST", path, headers or {}, content, most)

    async def get(self, path: str = "", *, most: int = MAX_BODY) -> Reply:
        """Read JSON that costs nothing, such as a server's description of itself.

        Raises:
            NotSent, Refused, UnknownOutcome: as `post`.
        """
        return await self._exchange("GET", path, {}, None, most)

    async def aclose(self) -> None:
        """Close the connections of the running loop; the next request opens new ones."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.aclose()

    # -- one exchange -------------------------------------------------------------------------

    async def _exchange(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes | None, most: int
    ) -> Reply:
        started = time.monotonic()
        outcome: _Raw | Reply | BackendError
        outcome = await self._attempt(method, path, headers, content, most)
        if isinstance(outcome, _Raw):
            outcome = self._read(outcome)
        where, took = f"{method} {self._origin}{self._path}{path}", time.monotonic() - started
        logger.debug("%s: %s in %.0f ms", where, type(outcome).__name__, 1000 * took)
        if isinstance(outcome, BackendError):
            raise outcome  # outside every except block, and from a frame that never saw the answer
        return outcome

    async def _attempt(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes | None, most: int
    ) -> _Raw | BackendError:
        """Send and receive; every failure becomes a value, so that no traceback holds a key."""
        progress = Progress(headers_done=self._inner is not None, begun=self._inner is not None)
        try:
            async with asyncio.timeout(self._timeout), self._session().client() as client:
                request = client.build_request(
                    method,
                    self._url(path),
                    headers=self._all_headers(headers),
                    content=content,
                    extensions={"trace": progress.note},
                )
                return await _receive(client, request, most)
        except TimeoutError:
            return self._late(begun=progress.begun)
        except _TooMuch as refusal:
            return UnknownOutcome(f"{self._origin} {refusal}; it stays charged")
        except Exception as error:  # httpx lets errors of ssl and h2 through as they are
            return self._failure(error, progress)

    def _late(self, *, begun: bool) -> BackendError:
        if begun:
            return UnknownOutcome(
                f"{self._origin} did not finish its answer in {self._timeout:g} s; it stays "
                "charged. Give it a longer timeout, or fewer images per request"
            )
        return self._unreachable(f"no connection in {self._timeout:g} s")

    def _failure(self, error: Exception, progress: Progress) -> BackendError:
        """Before the request was on its way, or after? That is what the budget must know."""
        said = self.scrub(_one_line(str(error)) or type(error).__name__)
        if isinstance(error, httpx.LocalProtocolError) and not progress.headers_done:
            return NotSent(f"the request to {self._origin} could not be built ({said})", final=True)
        if isinstance(error, _BEFORE) or not progress.begun:
            return self._untrusted(said) if _is_tls(error) else self._unreachable(said)
        return UnknownOutcome(f"{self._origin} broke off ({said}); the request stays charged")

    def _untrusted(self, said: str) -> NotSent:
        return NotSent(
            f"{self._origin} did not prove who it is ({said}); nothing was sent. Fix its "
            "certificate, or name the one to trust as ca_file",
            final=True,
        )

    def _unreachable(self, said: str) -> NotSent:
        return NotSent(
            f"{self._origin} cannot be reached ({said}); nothing was sent. Check the URL and "
            "whether it is up, then resume"
        )

    def _session(self) -> Session:
        """The running event loop's."""
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            session = Session(self._options, self._connections, shared=self._options["http2"])
            self._sessions[loop] = session
        return session

    def _url(self, path: str) -> str:
        return f"{self._origin}{self._path}{path}{self._query}"

    def _all_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Only ever an argument: no frame of ours keeps a key while it waits."""
        own = {
            name: value.reveal() if isinstance(value, Secret) else value
            for name, value in self._headers.items()
        }
        return {
            "accept": "application/json",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": f"blackbox-vlm/{__version__}",
            **own,
            **{name.lower(): value for name, value in headers.items()},
        }

    # -- what a complete answer means ---------------------------------------------------------

    def _read(self, raw: _Raw) -> Reply | BackendError:
        if not 200 <= raw.status < 300:
            return self._refusal(raw)
        try:
            return Reply(parse_json(raw.body), raw.headers)
        except ValueError as error:
            return ContractError(
                f"{self._origin} answered something that is no JSON that we read ({error}): "
                f"{self._excerpt(raw.body)}. Check the URL and the protocol"
            )

    def _refusal(self, raw: _Raw) -> BackendError:
        status, said = raw.status, self._excerpt(raw.body)
        told = f"{self._origin} answered {status}: {said}"
        retry_after = _headers.retry_after(raw.headers)
        final = raw.headers.get("x-should-retry", "").lower() == "false"
        if 300 <= status < 400:
            return Refused(
                f"{self._origin} redirects to {self._target(raw)}, and redirects are not followed "
                "(they would carry the key along); give that URL itself",
                final=True,
            )
        if status == 402 or (status in (403, 429) and _says_no_credit(raw.body)):
            return QuotaError(f"{told}. The account has no credit left; fill it, then resume")
        if status in (401, 403):
            return AuthError(f"{told}. Check the key, then resume")
        if status in self._busy:
            return RateLimited(told, retry_after=retry_after, final=final)
        if status == 413:
            return Refused(f"{told}. Send smaller images or fewer images per request", final=True)
        if status == 408 or status >= 500:
            return UnknownOutcome(
                f"{told}. The request stays charged", retry_after=retry_after, final=final
            )
        return Refused(f"{told}. Fix the endpoint's declaration or the request", final=True)

    def _target(self, raw: _Raw) -> str:
        location = raw.headers.get("location", "")
        try:
            return str(parse_url(location)[0])
        except InputError:
            return repr(self.scrub(_one_line(location.split("?")[0]))[:SHOWN])

    def _excerpt(self, body: bytes) -> str:
        """The start of a body for a message: one printable line, without the key."""
        text = self.scrub(body[: 16 * SHOWN].decode("utf-8", "replace"))
        return _one_line(text)[:SHOWN] or "(nothing)"

    def scrub(self, text: str) -> str:
        """The text without the keys, whatever an endpoint has made it repeat."""
        for value in self._headers.values():
            if isinstance(value, Secret):
                text = value.scrub(text)
        return text


@dataclass(frozen=True, slots=True)
class _Raw:
    status: int
    headers: Mapping[str, str]
    body: bytes


class _TooMuch(Exception):
    """The answer is beyond a limit; the text says which."""


async def _receive(client: httpx.AsyncClient, request: httpx.Request, most: int) -> _Raw:
    response = await client.send(request, stream=True)
    try:
        headers = _bounded_headers(response)
        plain = headers.get("content-encoding", "identity").strip().lower() == "identity"
        if not response.is_success:  # what a refusal means is in its status
            body = await _body(response, MAX_REFUSAL) if plain else b""
            return _Raw(response.status_code, headers, body)
        if not plain:
            raise _TooMuch("sent a compressed answer, which was not asked for and is not read")
        body = await _body(response, most)
        if len(body) > most:
            raise _TooMuch(f"sent more than {most} bytes, which is more than was asked for")
        return _Raw(response.status_code, headers, body)
    finally:
        await response.aclose()


def _bounded_headers(response: httpx.Response) -> dict[str, str]:
    size = sum(len(name) + len(value) for name, value in response.headers.raw)
    if size > MAX_HEADERS:
        raise _TooMuch(f"sent {size} bytes of headers; at most {MAX_HEADERS} are read")
    return dict(response.headers)


async def _body(response: httpx.Response, most: int) -> bytes:
    """The body, or its start once that is longer than `most` bytes."""
    body = bytearray()
    async with aclosing(cast(AsyncGenerator[bytes, None], response.aiter_raw())) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > most:
                break
    return bytes(body)


_BEFORE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


_BROKEN_OFF = (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLEOFError)  # not about trust


def _is_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError) and not isinstance(error, _BROKEN_OFF):
            return True
        error = error.__cause__ or error.__context__
    return False


def _says_no_credit(body: bytes) -> bool:
    """OpenAI's 429 has two meanings; this one will not pass with time."""
    return b"insufficient_quota" in body[: 16 * SHOWN]


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
