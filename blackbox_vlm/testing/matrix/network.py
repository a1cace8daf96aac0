"""Rows F01 to F15: what the network does to a request, and answers of the wrong size."""

from __future__ import annotations

import gzip
import socket
import tracemalloc
from collections.abc import Iterator

from blackbox_vlm.errors import NotSent, UnknownOutcome
from blackbox_vlm.testing.matrix.bench import HASTY, Bench
from blackbox_vlm.testing.matrix.verdicts import expect, lost, not_sent, refused
from blackbox_vlm.testing.server import (
    Act,
    Authority,
    Received,
    ScriptedServer,
    Step,
    closing,
    cut,
    dripping,
    hang_up,
    late,
    message,
    never,
    reply,
    replying,
    reset,
    sending,
)

MEMORY = 32 * 2**20  # bytes that a hostile answer may make a client hold
OVERDUE = 0.3  # seconds of a busy machine


def connection_refused(bench: Bench) -> None:
    """Tried again, never charged; the error names who cannot be reached."""
    with ScriptedServer(hang_up) as gone:
        url = gone.url
    not_sent(bench, url)


def connect_timeout(bench: Bench) -> None:
    """As a refused connection: nothing was sent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call, and says nothing
        not_sent(bench, f"https://127.0.0.1:{silent.getsockname()[1]}")


def pool_exhausted(bench: Bench) -> None:
    """Waiting for a connection is no failure and costs no query."""
    usual = late(0.02, replying(bench.hooks.good_answer))
    seen = bench.ask(count=24, usual=usual, concurrency=12)
    expect(seen, "12 in flight", None, calls=24, charged=24)


def untrusted_certificate(bench: Bench) -> None:
    """Refused at once: nothing is sent, and nothing is tried again without it."""
    stranger = Authority(bench.folder).sign()
    authority = Authority(bench.folder)
    for name, tls in (
        ("signed by nobody we know", stranger),
        ("expired", authority.sign(expired=True)),
        ("of another host", authority.sign("elsewhere.example")),
    ):
        seen = bench.ask(tls=tls, ca_file=authority.ca_file)
        expect(seen, name, NotSent, calls=0, charged=0)
        assert seen.asked == 1, name


def redirect_elsewhere(bench: Bench) -> None:
    """Not followed: the other server sees neither the request nor the key."""
    with ScriptedServer(replying(bench.hooks.good_answer)) as other:
        target = {"location": f"{other.url}/other"}
        steps = {str(status): reply(b"", status, target) for status in (301, 302, 307, 308)}
        seen = refused(bench, steps)
        assert all(other.url in str(one.error) for one in seen)
        assert (other.connections, other.received) == (0, [])


def redirect_here(bench: Bench) -> None:
    """Not followed either, wherever on the same server it leads."""

    def around(received: Received) -> list[bytes]:
        return [message(b"", 307, {"location": received.path})]

    refused(bench, {"loop": around, "relative": reply(b"", 302, {"location": "/there"})})


def read_timeout(bench: Bench) -> None:
    """Sent, so charged; sent again only where that is free or allowed."""
    lost(bench, {"no answer": never}, HASTY)


def connection_reset(bench: Bench) -> None:
    """The same, at whatever moment the connection ends."""
    half = sending(b"HTTP/1.1 200 OK\r\ncontent-", Act.RESET)
    lost(bench, {"reset": reset, "closed": hang_up, "reset within the headers": half})


def keep_alive_closed(bench: Bench) -> None:
    """A request that was cut off is never sent again in silence."""
    good = replying(bench.hooks.good_answer)
    seen = bench.ask([good, hang_up], count=3)
    expect(seen, "closed as we send", UnknownOutcome, calls=2, charged=2)
    idle = bench.ask([closing(good)] * 3, count=3, pause=0.05)
    expect(idle, "closed between two requests", None, calls=3, charged=3)


def truncated_body(bench: Bench) -> None:
    """A part of an answer is no answer."""
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n[0.1,\r\n"
    lost(
        bench,
        {
            "shorter than announced": cut(replying(bench.hooks.good_answer), -5),
            "a chunk of no length": sending(chunked + b"zz\r\n0.2]\r\n"),
            "no last chunk": sending(chunked, Act.CLOSE),
        },
    )


def dripping_body(bench: Bench) -> None:
    """The deadline is for the whole answer, not for a single byte."""
    step = dripping(replying(bench.hooks.good_answer), HASTY / 3)
    [seen] = lost(bench, {"a byte at a time": step}, HASTY)
    assert 0.9 * HASTY <= seen.took <= 1.1 * HASTY + OVERDUE


def slow_upload(bench: Bench) -> None:
    """The deadline counts while we send, too."""
    seen = bench.ask(usual=never, timeout=HASTY, reads_bodies=False, picture_side=1300)
    expect(seen, "nobody reads the body", UnknownOutcome, calls=1, charged=1)
    assert seen.took <= 1.1 * HASTY + OVERDUE + 2  # 5 MB are encoded first


# -- the size and form of an answer ---------------------------------------------------------------


def endless_body(bench: Bench) -> None:
    """Cut off at what was asked for."""

    def endless(received: Received) -> Iterator[bytes | float | Act]:
        yield b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n["
        for _ in range(200 * 16):
            yield b"0.5, " * (2**16 // 5)
        yield Act.CLOSE

    [seen] = lost(bench, {"200 MB": endless})
    assert seen.sent < MEMORY


def compressed_body(bench: Bench) -> None:
    """Refused unread: nobody asked for it, and it may grow in memory."""
    bomb = gzip.compress(bytes(2 * MEMORY))
    encoded = {"gzip": bomb, "gzip, gzip": gzip.compress(bomb), "zstd": bytes(99), "br": bytes(99)}
    steps = {
        name: reply(body, headers={"content-encoding": name}) for name, body in encoded.items()
    }
    lost(bench, steps)
    tracemalloc.start()
    try:
        for name, step in steps.items():
            bench.ask([_from_here_on(step)])
            held, most = tracemalloc.get_traced_memory()
            assert most - held < MEMORY, name
    finally:
        tracemalloc.stop()


def _from_here_on(step: Step) -> Step:
    """The step; the most memory that is held is measured from its beginning."""

    def measured(received: Received) -> Iterator[bytes | float | Act]:
        tracemalloc.reset_peak()
        yield from step(received)

    return measured


def header_bomb(bench: Bench) -> None:
    """Too many headers are no answer."""
    many = {f"x-{number}": "bomb" for number in range(10_000)}
    long = {"100 KiB": {"x-bomb": "b" * 100 * 1024}, "20 KiB": {"x-bomb": "b" * 20 * 1024}}
    headers = long | {"10,000 headers": many}
    lost(bench, {name: reply(b"{}", headers=given) for name, given in headers.items()})
