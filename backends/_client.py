"""httpx clients: those of an event loop, with the keys, the trust and the limits that ours have."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

import httpx

from blackbox_vlm.errors import InputError


class Session:
    """Clients that live as long as their event loop, for one request at a time each.

    One client with many connections would do, but its pool goes through all pairs of them for every
    request (httpcore 1.0.9): with 64, that takes 6 ms of the processor, and with one each 0.7 ms.

    `asyncio.run` closes the async generators of its loop at the end, and with this one the
    connections: a backend can be used in one `asyncio.run` after another.

    Args:
        options: of every client.
        most: how many requests may be in flight; further ones wait.
        shared: all by one client, whose connection carries them together (HTTP/2).
    """

    def __init__(self, options: Mapping[str, Any], most: int, *, shared: bool) -> None:
        self._opening = _open_client(options)
        self._places = asyncio.Semaphore(most)
        self._idle: list[httpx.AsyncClient] = []
        self._shared = shared

    @asynccontextmanager
    async def client(self) -> AsyncGenerator[httpx.AsyncClient, None]:
        """A client for one request; the one that was used last comes first."""
        async with self._places:
            client = self._idle.pop() if self._idle else await anext(self._opening)
            if self._shared:
                self._idle.append(client)
            try:
                yield client
            finally:
                if not self._shared:
                    self._idle.append(client)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._opening.aclose()


async def _open_client(options: Mapping[str, Any]) -> AsyncGenerator[httpx.AsyncClient, None]:
    """One more client each time; all are closed together."""
    async with AsyncExitStack() as opened:
        while True:
            no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # each stands alone
            client = httpx.AsyncClient(**options, cookies=no_cookies)
            yield await opened.enter_async_context(client)


@dataclass(slots=True)
class Progress:
    """How far a request has come; an `inner` transport does not tell, and counts as far."""

    headers_done: bool
    begun: bool  # its first byte may be on its way

    async def note(self, event: str, info: Mapping[str, Any]) -> None:
        """httpx's trace callback; a proxy's CONNECT is not the request."""
        if "request" in info and info["request"].method == b"CONNECT":
            return
        self.begun |= event.endswith("send_request_headers.started")
        self.headers_done |= event.endswith("send_request_body.started")


def trusted(ca_file: Path | None) -> ssl.SSLContext:
    """Whom to trust. Verification has no off switch; SSL_CERT_FILE and SSLKEYLOGFILE do not count.

    Raises:
        InputError: the file holds no certificates.
    """
    import certifi

    if ca_file is None:
        return _usual_context(certifi.where())
    try:
        return _context(str(ca_file))
    except (OSError, ssl.SSLError):
        raise InputError(f"ca_file {str(ca_file)!r} holds no certificates; wanted PEM") from None


@cache  # 15 ms
def _usual_context(ca_file: str) -> ssl.SSLContext:
    return _context(ca_file)


def _context(ca_file: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unlike create_default_context: no key log
    context.load_verify_locations(ca_file)
    return context


def require_http2() -> None:
    """Raises InputError: HTTP/2 is not installed."""
    try:
        import h2  # noqa: F401
    except ImportError:
        raise InputError("http2 needs a package: pip install 'blackbox-vlm[http2]'") from None
