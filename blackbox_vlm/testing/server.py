"""An HTTP server that misbehaves as scripted, on raw sockets, for tests of a client.

    with ScriptedServer(reply(b'{"fine": true}'), [reset, hang_up]) as server:
        ...  # point a client at server.url
    assert len(server.received) == 3

Every request takes the next step of the script, and the usual one once it is over. A step is
a function of the request that yields what to do: bytes to send, seconds to wait, or one of `Act`.
The steps below speak toxiproxy's vocabulary: latency, bandwidth, timeout, slicer, slow_close,
limit_data, reset_peer.
"""

from __future__ import annotations

import math
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import pytest


class Act(Enum):
    """What a step can do to a connection."""

    CLOSE = "close"  # orderly
    RESET = "reset"  # the other side reads an error, not an end


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it arrived; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]  # one that came twice is joined by commas
    body: bytes
    connection: int  # which one brought it, counted from 0


Step = Callable[[Received], Iterable[bytes | float | Act]]


class ScriptedServer:
    """Serves on 127.0.0.1, one thread per connection, until the block is left.

    Args:
        usual: what is done when the script is over.
        script: one step per request, in the order of their arrival over all connections.
        tls: serves https with it.
        port: to listen on; 0 for a free one.
        reads_bodies: False leaves every body in the network, where it blocks who sends it.

    Attributes:
        url: its origin, e.g. `http://127.0.0.1:49152`.
        port: of that.
        received: the requests so far.
        connections: how many were accepted so far.
        sent: bytes that a client took so far.
    """

    def __init__(
        self,
        usual: Step,
        script: Iterable[Step] = (),
        *,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
        reads_bodies: bool = True,
    ) -> None:
        self._usual = usual
        self._script = iter(script)
        self._tls = tls
        self._reads_bodies = reads_bodies
        self.received: list[Received] = []
        self.connections = 0
        self.sent = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"
        if not reads_bodies:  # inherited by every connection
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        with suppress(OSError):  # wakes `accept`
            socket.create_connection(("127.0.0.1", self.port)).close()
        self._threads[0].join()
        self._listener.close()
        with self._lock:
            for connection in self._open:  # wakes whoever reads or writes
                with suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    # -- connections --------------------------------------------------------------------------

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self._stopped.is_set():
                connection.close()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open.add(connection)
            self._start(self._serve, connection, self.connections)
            self.connections += 1

    def _serve(self, plain: socket.socket, number: int) -> None:
        connection = plain
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(
                    plain, server_side=True, do_handshake_on_connect=False
                )
                with self._lock:
                    self._open = self._open - {plain} | {connection}
                connection.do_handshake()
            with connection.makefile("rb") as stream:
                while (received := self._read(stream, number)) is not None:
                    if not self._perform(connection, self._next()(received)):
                        return
        except (OSError, ValueError):  # the client left, or refused our certificate
            return
        finally:
            with self._lock:
                self._open -= {plain, connection}
            connection.close()
            plain.close()

    def _read(self, stream: BinaryIO, number: int) -> Received | None:
        """The next request of a connection, or None at its end."""
        head = [line.decode("latin-1").strip() for line in _head(stream)]
        if not head:
            return None
        method, path, _ = head[0].split(" ", 2)
        headers = _headers(head[1:])
        length = int(headers.get("content-length", 0)) if self._reads_bodies else 0
        body = stream.read(length)
        if len(body) < length:
            return None
        received = Received(method, path, headers, body, number)
        with self._lock:
            self.received.append(received)
        return received

    def _next(self) -> Step:
        with self._lock:
            return next(self._script, self._usual)

    def _perform(self, connection: socket.socket, plan: Iterable[bytes | float | Act]) -> bool:
        """Do what a step says; returns whether the connection lives on."""
        for action in plan:
            if isinstance(action, Act):
                if action is Act.RESET:
                    at_once = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
                return False
            if isinstance(action, bytes):
                connection.sendall(action)
                self.sent += len(action)
            elif self._stopped.wait(None if math.isinf(action) else action):
                return False
        return True


def _headers(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found[name.lower()] = ", ".join(filter(None, (found.get(name.lower()), value.strip())))
    return found


def _head(stream: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: stream.readline().rstrip(b"\r\n"), b"")


# -- steps --------------------------------------------------------------------------------------


def message(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole answer as it goes over the wire; a given header replaces one of the usual ones."""
    usual = {"content-type": "application/json", "content-length": str(len(body))}
    lines = [f"{name}: {value}" for name, value in (usual | dict(headers or {})).items()]
    return "\r\n".join([f"HTTP/1.1 {status} scripted", *lines, "", ""]).encode("latin-1") + body


def reply(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Step:
    """The same answer to everything."""
    return sending(message(body, status, headers))


def replying(answer: Callable[[bytes], bytes]) -> Step:
    """Status 200, with a body that depends on the request's."""
    return lambda received: [message(answer(received.body))]


def sending(*actions: bytes | float | Act) -> Step:
    """These bytes, waits and acts, whatever was asked."""
    return lambda received: actions


never = sending(math.inf)  # toxiproxy's timeout
hang_up = sending(Act.CLOSE)
reset = sending(Act.RESET)  # reset_peer


def late(seconds: float, step: Step) -> Step:
    """Latency: the step, after a while."""
    return lambda received: chain([seconds], step(received))


def dripping(step: Step, pause: float, size: int = 1) -> Step:
    """Slicer and bandwidth: what the step sends, `size` bytes at a time with pauses between."""

    def drip(received: Received) -> Iterator[bytes | float | Act]:
        for action in step(received):
            if isinstance(action, bytes):
                for at in range(0, len(action), size):
                    yield action[at : at + size]
                    yield pause
            else:
                yield action

    return drip


def cut(step: Step, size: int) -> Step:
    """limit_data: the first `size` bytes of what the step sends (from the end, where negative)."""

    def limited(received: Received) -> Iterator[bytes | float | Act]:
        data = b"".join(action for action in step(received) if isinstance(action, bytes))
        yield data[:size]
        yield Act.CLOSE

    return limited


def closing(step: Step, after: float = 0.0) -> Step:
    """slow_close: the step, and then, without a word about it, the end of the connection."""
    return lambda received: chain(step(received), [after, Act.CLOSE])


# -- https --------------------------------------------------------------------------------


class Authority:
    """Signs certificates for an https server, right and wrong ones. Needs trustme.

    Who trusts `ca_file` trusts them.

    Args:
        folder: for the file.
    """

    def __init__(self, folder: Path) -> None:
        trustme = pytest.importorskip("trustme", reason="trustme makes the certificates")
        self._authority = trustme.CA()
        self.ca_file = folder / "authority.pem"
        self._authority.cert_pem.write_to_path(str(self.ca_file))

    def sign(self, host: str = "127.0.0.1", *, expired: bool = False) -> ssl.SSLContext:
        """What a server of this host needs for https."""
        dates = {"not_before": _year(2000), "not_after": _year(2001)} if expired else {}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(host, **dates).configure_cert(context)
        return context


def _year(year: int) -> datetime:
    return datetime(year, 1, 1, tzinfo=UTC)
