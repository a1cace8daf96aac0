"""What the HTTP client costs: throughput, processor time, use of a quota, and memory.

    python benchmarks/client.py
    python benchmarks/client.py --rounds 1 --seconds 1 --quota-seconds 10 --windows 3   # a look
    python benchmarks/client.py --memory 100000                                         # that alone

Everything goes through a meter, a ledger and the `zero-shot` backend to a bare server in another
process (`_loopback.py`). The reference is a loop over `httpx.AsyncClient` with as many requests in
flight, which posts the same bodies, encoded beforehand, to the same server and parses the answers.
Both run in turns; a ratio is of two neighbours, a number the median over the rounds.

Throughput: at 20 ms latency and no quota, with the ledger on the disk, and in memory where the
system has a folder there. Processor time: of the client's process, at zero latency. Quota: so many
windows, started together; its use is what was answered, of what the server would have granted in
that time. Memory: resident, after a tenth, a half and all of the queries.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Self

import httpx
from blackbox_vlm.backends.endpoint import HttpBackend
from overhead import machine, resident, shared_memory

from blackbox_vlm import Image, demo_folder
from blackbox_vlm.backend import TextScores, open_backend
from blackbox_vlm.errors import Interrupted
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter

LATENCY = 20.0  # milliseconds
IN_FLIGHT = (1, 8, 64)
CLASSES = 10


class Server:
    """`_loopback.py` in a process of its own."""

    def __init__(self, *limits: object) -> None:
        words = [sys.executable, str(Path(__file__).with_name("_loopback.py")), *map(str, limits)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        self.url = self._line().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)

    def counts(self) -> dict[str, int]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        found: dict[str, int] = json.loads(self._line())
        return found

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class Questions:
    """An emoji under texts that are new every time."""

    def __init__(self) -> None:
        self._image = Image.from_file(sorted((demo_folder() / "train").glob("*/*.png"))[0])
        self._asked = 0

    def new(self, count: int) -> list[TextScores]:
        self._asked += count
        numbers = range(self._asked - count, self._asked)
        return [
            TextScores((self._image,), tuple(f"a photo {i} of class {c}" for c in range(CLASSES)))
            for i in numbers
        ]


def connect(url: str, in_flight: int) -> HttpBackend:
    """The backend under test."""
    options = {"refusals_free": True, "deterministic": True}
    backend = open_backend("zero-shot", url=url, model="any", concurrency=in_flight, **options)
    assert isinstance(backend, HttpBackend)
    return backend


# -- one load, both ways ------------------------------------------------------------------------


@dataclass
class Took:
    """Seconds per query of one way, one number per round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @contextmanager
    def timing(self, count: int) -> Iterator[None]:
        """Time the block, which asks so many queries."""
        start, computed = time.perf_counter(), time.process_time()
        yield
        self.wall.append((time.perf_counter() - start) / count)
        self.processor.append((time.process_time() - computed) / count)


async def bare(url: str, bodies: Sequence[bytes], in_flight: int, took: Took) -> None:
    """The reference."""
    waiting = iter(bodies)
    limits = httpx.Limits(max_connections=in_flight)
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(limits=limits, trust_env=False, timeout=60) as client:

        async def worker() -> None:
            for body in waiting:
                response = await client.post(url, content=body, headers=headers)
                response.json()

        with took.timing(len(bodies)):
            await asyncio.gather(*(worker() for _ in range(in_flight)))


async def ours(
    url: str, asked: Sequence[TextScores], in_flight: int, folder: Path, took: Took
) -> None:
    """Meter, ledger and backend."""
    backend = connect(url, in_flight)
    with (
        tempfile.TemporaryDirectory(dir=folder) as inner,
        Ledger(Path(inner) / "ledger.sqlite", len(asked)) as ledger,
    ):
        meter = Meter(backend, ledger)
        with took.timing(len(asked)):
            await meter.observe(asked, "benchmark")
    await backend.aclose()


def compare(
    server: Server, questions: Questions, in_flight: int, count: int, args: argparse.Namespace
) -> dict[str, Took]:
    """All ways in turns, every query a new one."""
    backend, folders = connect(server.url, in_flight), {"disk": args.folder}
    if (memory := shared_memory()) is not None:
        folders["memory"] = memory
    ways = {name: Took() for name in ("bare", *folders)}
    for _ in range(args.rounds):
        bodies = [_body(backend, request) for request in questions.new(count)]
        asyncio.run(bare(server.url, bodies, in_flight, ways["bare"]))
        for name, folder in folders.items():
            asked = questions.new(count)
            asyncio.run(ours(server.url, asked, in_flight, folder, ways[name]))
    return ways


def _body(backend: HttpBackend, request: TextScores) -> bytes:
    return json.dumps(backend.encode(request).body, separators=(",", ":")).encode()


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return median(a / b for a, b in zip(one, other, strict=True))


# -- tables -------------------------------------------------------------------------------------


def throughput_table(args: argparse.Namespace, questions: Questions) -> Iterator[str]:
    yield f"| queries/s at {LATENCY:g} ms | bare httpx | ledger on disk | ... / bare | " + (
        "ledger in memory | ... / bare |"
    )
    yield "|---|" + "---|" * 5
    with Server(LATENCY) as server:
        for in_flight in IN_FLIGHT:
            count = int(args.seconds * min(in_flight / LATENCY * 1000, args.most))
            ways = compare(server, questions, in_flight, count, args)
            reference = ways["bare"].wall
            cells = [
                f" {1 / median(way.wall):.1f} | {ratio(reference, way.wall):.1%} |"
                for name, way in ways.items()
                if name != "bare"
            ]
            yield f"| {in_flight} in flight | {1 / median(reference):.1f} |{''.join(cells)}"


def processor_table(args: argparse.Namespace, questions: Questions) -> Iterator[str]:
    yield "| processor time, µs per query at 0 ms | bare httpx | ours | ours - bare | ours / bare |"
    yield "|---|" + "---|" * 4
    with Server(0) as server:
        for in_flight in IN_FLIGHT:
            ways = compare(server, questions, in_flight, int(args.seconds * args.most), args)
            reference, way = ways["bare"].processor, ways["disk"].processor
            more = median(b - a for a, b in zip(reference, way, strict=True))
            yield (
                f"| {in_flight} in flight | {1e6 * median(reference):.0f} | {1e6 * median(way):.0f}"
                f" | {1e6 * more:.0f} | {ratio(way, reference):.2f} |"
            )


def quota_table(args: argparse.Namespace, questions: Questions) -> Iterator[str]:
    count, seconds = args.quota, args.quota_seconds
    duration = args.windows * seconds
    yield f"| {count} requests per {seconds:g} s, {duration:g} s | granted | answered | used |" + (
        " refused | of the answered |"
    )
    yield "|---|" + "---|" * 5
    granted = {"window": count * args.windows, "bucket": count * (1 + args.windows)}
    with (
        Server(LATENCY, "window", count, seconds) as window,
        Server(LATENCY, "bucket", count, seconds) as bucket,
    ):
        servers = {"window": window, "bucket": bucket}
        asyncio.run(_until_stopped(servers, granted, questions, duration, args.folder))
        for kind, server in servers.items():
            answered, refused = server.counts().values()
            yield (
                f"| {kind} | {granted[kind]} | {answered} | {answered / granted[kind]:.1%} |"
                f" {refused} | {refused / answered:.1%} |"
            )


async def _until_stopped(
    servers: dict[str, Server],
    granted: dict[str, int],
    questions: Questions,
    duration: float,
    folder: Path,
) -> None:
    end = time.monotonic() + duration

    async def ask(kind: str, inner: str) -> None:
        backend, asked = connect(servers[kind].url, 8), questions.new(2 * granted[kind])
        with Ledger(Path(inner) / f"{kind}.sqlite", 2 * len(asked)) as ledger:
            meter = Meter(backend, ledger, should_stop=lambda: time.monotonic() >= end)
            with suppress(Interrupted):
                await meter.observe(asked, "benchmark")
        await backend.aclose()

    with tempfile.TemporaryDirectory(dir=folder) as inner:
        await asyncio.gather(*(ask(kind, inner) for kind in servers))


def memory_table(args: argparse.Namespace, questions: Questions) -> Iterator[str]:
    marks = [args.memory // part for part in (10, 2, 1)]
    yield "| MiB in memory after so many queries |" + "".join(f" {m:,} |" for m in marks)
    yield "|---|" + "---|" * len(marks)
    with Server(0) as server, tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sizes = asyncio.run(_sizes(server.url, questions, marks, Path(folder)))
    yield "| 8 in flight |" + "".join(f" {size:.1f} |" for size in sizes)


async def _sizes(url: str, questions: Questions, marks: list[int], folder: Path) -> list[float]:
    backend, sizes, step = connect(url, 8), [], marks[0] // 10
    with Ledger(folder / "ledger.sqlite", marks[-1]) as ledger:
        meter = Meter(backend, ledger)
        for asked in range(step, marks[-1] + 1, step):
            await meter.observe(questions.new(step), "benchmark")
            if asked in marks:
                sizes.append(resident())
    await backend.aclose()
    return sizes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="about, of each measurement")
    parser.add_argument("--most", type=int, default=400, help="queries/s to expect of this machine")
    parser.add_argument("--quota", type=int, default=1200)
    parser.add_argument("--quota-seconds", type=float, default=60.0)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--memory", type=int, help="measure memory alone, over so many queries")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the ledgers are made")
    return parser.parse_args()


def main() -> None:
    args, questions = arguments(), Questions()
    print(machine(), end="\n\n")
    tables: list[Callable[[argparse.Namespace, Questions], Iterator[str]]]
    tables = [memory_table] if args.memory else [throughput_table, processor_table, quota_table]
    for table in tables:
        for line in table(args, questions):
            print(line, flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
