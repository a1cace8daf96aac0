"""The server on a socket: bound to this machine unless a token guards it, stopped by a signal."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import uvicorn

from blackbox_vlm.backend import Backend
from blackbox_vlm.errors import InputError

from .app import create_app
from .connection import bounded
from .guards import MAX_HEADERS
from .settings import ServerSettings

LAST_SECONDS = 2  # that answers in work get when the server stops


def bind(host: str, port: int, settings: ServerSettings) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        InputError: the address cannot be had, or lies beyond this machine and no token is wanted.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise InputError(f"got the host {host!r}; wanted an IP address, or localhost") from None
    if not address.is_loopback and settings.token is None:
        raise InputError(
            f"{address} can be reached from other machines; ask for a token: --token-env NAME"
        )
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    # Named as TCP, so that asyncio turns off Nagle's algorithm: it costs 40 ms an answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((str(address), port))
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or "no such port"
        raise InputError(f"cannot listen on {address} port {port}: {reason}") from None
    return listening


def url_of(listening: socket.socket) -> str:
    """The address of a listening socket, as a client writes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(backend: Backend, settings: ServerSettings, listening: socket.socket) -> int:
    """Serve until SIGINT or SIGTERM; returns the signal's number."""
    server = _Server(_config(backend, settings))
    asyncio.run(server.until_signal(listening))
    return server.stopped_by


@contextmanager
def running_server(backend: Backend, settings: ServerSettings | None = None) -> Iterator[str]:
    """A server in a thread, on a free port of this machine; gives its URL.

    The backend stays the caller's to close.
    """
    settings = ServerSettings() if settings is None else settings
    server = _Server(_config(backend, settings))
    with bind("127.0.0.1", 0, settings) as listening:
        url = url_of(listening)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    """uvicorn, which ends with a number in place of sending itself the signal again."""

    stopped_by = 0

    def capture_signals(self) -> Any:
        return nullcontext()

    async def until_signal(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        await self.serve([listening])

    def _stop(self, number: int) -> None:
        self.force_exit = self.should_exit  # the second signal waits for nothing
        self.should_exit, self.stopped_by = True, number


def _config(backend: Backend, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(backend, settings),
        http=bounded(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",  # a connection that a fault breaks is no error; ours are logged by us
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADERS,
    )
