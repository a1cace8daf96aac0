"""A connection that does not wait for ever: what uvicorn leaves open is bounded here.

uvicorn ends an idle connection only after its first answer. A caller that opens connections and
sends headers a byte at a time, or never reads its answer, would hold them; here the headers have a
deadline, an answer nobody reads is dropped with its connection, and connections are counted.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import ServerSettings


class Connection(H11Protocol):
    """uvicorn's connection with deadlines; `bounded` sets them."""

    header_seconds: float
    idle_seconds: float
    most_connections: int
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive = self.idle_seconds  # type: ignore[assignment]
        if len(self.connections) > self.most_connections:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection is closed; one whose answer is still unread, at once."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _watch(self) -> None:
        """The clock runs while a request's headers are incomplete."""
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bounded(settings: ServerSettings) -> type[Connection]:
    """The connection class with these limits."""
    names = ("header_seconds", "idle_seconds", "most_connections")
    return type(
        "BoundedConnection", (Connection,), {name: getattr(settings, name) for name in names}
    )
