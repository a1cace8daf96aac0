"""What the bookkeeping costs: time, memory and disk of the meter and the ledger, without a model.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --queries 10000 --task-images 10000      # a look

Time: soft-prompt queries through `Meter.observe` to a backend that answers at once, against the
bare call of that backend and against plain SQLite (WAL, synchronous=FULL, as the ledger) that
inserts the same answers and commits, once per batch. The three run in turns. The ledger commits
twice per batch, before the queries leave and after their answers came, and once per generation for
the checkpoint, which is not in this table.

Memory and disk: many queries in one process. "search" asks generations on many images and saves a
checkpoint after each, which drops the answers; "pass" asks one image per request and keeps them.
Last, a task of many images (no files behind them) and a request over all of them, by tracemalloc,
and the checkpoint of a search. The files lie in the current folder's file system, or `--folder`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import hashlib
import os
import platform
import resource
import sqlite3
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import numpy as np

from blackbox_vlm import Image, Task
from blackbox_vlm.backend import (
    Access,
    Answer,
    Capabilities,
    Request,
    SoftPrompts,
    query_key,
)
from blackbox_vlm.craft import craft
from blackbox_vlm.craft.recipes import CRAFT
from blackbox_vlm.craft.state import Record, Saved, to_bytes
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import plain_requests, prompt_requests
from blackbox_vlm.plan import Method, make_plan
from blackbox_vlm.task import Classes

CONTEXT_TOKENS, WIDTH = 4, 512  # CLIP's
POPULATION = CRAFT.population_size
BATCHES = (1, POPULATION)
GENERATIONS = (0, 200, 2500)  # 8,000 and 100,000 evaluations


class Instant:
    """A backend that answers at once, always the same scores."""

    def __init__(self, n_images: int, n_classes: int, requests_per_batch: int) -> None:
        self.capabilities = Capabilities(
            Access.SOFT,
            "instant",
            soft_prompts=SoftPrompts(CONTEXT_TOKENS, WIDTH, 0.01),
            requests_per_batch=requests_per_batch,
        )
        scores = np.random.default_rng(0).standard_normal((n_images, n_classes), dtype=np.float32)
        self._answer = Answer(scores, "instant")

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answer] * len(requests)

    async def aclose(self) -> None:
        pass


def synthetic(n_images: int, n_classes: int) -> Task:
    """A labelled task without files."""
    images = tuple(
        Image(Path(f"folder/class/{i:08}.jpg"), hashlib.sha256(b"%d" % i).hexdigest())
        for i in range(n_images)
    )
    names = tuple(f"class {i}" for i in range(n_classes))
    return Task(names, "a photo of a {}.", images, np.arange(n_images) % n_classes)


class Prompts:
    """Soft-prompt observations over a task, every one new."""

    def __init__(self, task: Task) -> None:
        self._images, self._classes = task.images, Classes(task.class_names, task.template)
        self._random = np.random.default_rng(0)

    def batch(self, size: int) -> list[Request]:
        shape = (size, CONTEXT_TOKENS, WIDTH)
        offsets = self._random.standard_normal(shape, dtype=np.float32)
        return prompt_requests(self._images, self._classes, offsets)


# -- time ---------------------------------------------------------------------------------------


class PlainSQLite:
    """The same answers, written by hand."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("CREATE TABLE answer (id INTEGER PRIMARY KEY, data BLOB NOT NULL)")

    def insert(self, blobs: Sequence[bytes]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        for blob in blobs:
            self._db.execute("INSERT INTO answer (data) VALUES (?)", (blob,))
        self._db.execute("COMMIT")

    def close(self) -> None:
        self._db.close()


async def timed(
    backend: Instant, task: Task, size: int, rounds: int, folder: Path
) -> dict[str, list[float]]:
    """Microseconds per query, by way, one number per round."""
    prompts, plain = Prompts(task), PlainSQLite(folder / f"plain-{size}.sqlite")
    seconds: dict[str, list[float]] = {"bare call": [], "plain SQLite": [], "meter": []}
    with (
        contextlib.closing(plain),
        Ledger(folder / f"ledger-{size}.sqlite", rounds * size) as ledger,
    ):
        meter = Meter(backend, ledger)
        for _ in range(rounds):
            requests = prompts.batch(size)
            start = time.perf_counter()
            answers = await backend.answer(requests)
            called = time.perf_counter()
            plain.insert([answer.values.tobytes() for answer in answers])
            inserted = time.perf_counter()
            await meter.observe(requests, "search")
            observed = time.perf_counter()
            seconds["bare call"].append(called - start)
            seconds["plain SQLite"].append(inserted - called)
            seconds["meter"].append(observed - inserted)
    return {way: [1e6 * s / size for s in times] for way, times in seconds.items()}


def time_table(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    task = synthetic(args.images, args.classes)
    yield f"| microseconds per query, {args.images} images | bare call | plain SQLite |" + (
        " meter and ledger | ... / bare | ... / SQLite | processor time |"
    )
    yield "|---|" + "---|" * 6
    for size in BATCHES:
        backend = Instant(args.images, args.classes, size)
        ways = asyncio.run(timed(backend, task, size, args.rounds, folder))
        for name, of in (("median", median), ("mean", mean)):
            bare, plain, meter = (of(times) for times in ways.values())
            computing = f"{asyncio.run(computed(backend, task, size, args.rounds)):.0f}"
            yield (
                f"| batches of {size}, {name} | {bare:.2f} | {plain:.0f} | {meter:.0f} |"
                f" {meter / bare:.0f} | {meter / plain:.2f} |"
                f" {computing if name == 'median' else ''} |"
            )


async def computed(backend: Instant, task: Task, size: int, rounds: int) -> float:
    """Microseconds of processor time per query, with the ledger in memory where that exists."""
    prompts, spent = Prompts(task), list[float]()
    with (
        tempfile.TemporaryDirectory(dir=shared_memory()) as folder,
        Ledger(Path(folder) / "ledger.sqlite", rounds * size) as ledger,
    ):
        meter = Meter(backend, ledger)
        for _ in range(rounds):
            requests = prompts.batch(size)
            start = time.process_time()
            await meter.observe(requests, "search")
            spent.append(time.process_time() - start)
    return 1e6 * median(spent) / size


def shared_memory() -> Path | None:
    where = Path("/dev/shm")
    return where if os.access(where, os.W_OK) else None


# -- memory and disk over many queries ----------------------------------------------------------


def resident() -> float:
    """MiB of this process in memory now; its peak where the system does not say."""
    gc.collect()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def on_disk(ledger: Path) -> int:
    """Bytes of the ledger and of what SQLite keeps beside it."""
    return sum(path.stat().st_size for path in ledger.parent.glob(ledger.name + "*"))


@dataclass(frozen=True)
class Load:
    """Many queries of one kind."""

    name: str
    images: int  # per request
    absorbed: bool  # a checkpoint drops each generation's answers


async def memory_row(load: Load, args: argparse.Namespace, folder: Path) -> str:
    """The row of a load: memory after a tenth, a half and all of the queries."""
    task = synthetic(load.images, args.classes) if load.images > 1 else one_image(args.classes)
    path, prompts = folder / f"{load.name}.sqlite", Prompts(task)
    marks = [args.queries // part // POPULATION for part in (10, 2, 1)]
    backend = Instant(len(task), args.classes, POPULATION)
    state, sizes = checkpoint(separable=True, generations=0), []
    with Ledger(path, args.queries) as ledger:
        meter = Meter(backend, ledger)
        for generation in range(1, marks[-1] + 1):
            await meter.observe(prompts.batch(POPULATION), load.name)
            if load.absorbed:
                ledger.checkpoint("craft", state, absorbs=[load.name])
            if generation in marks:
                sizes.append(resident())
        at_work = on_disk(path)
    cells = "".join(f" {size:.1f} |" for size in sizes)
    per_query = on_disk(path) / (marks[-1] * POPULATION)
    return (
        f"| {load.name}, {len(task)} image(s) per query |{cells} {sizes[-1] - sizes[0]:+.1f} |"
        f" {at_work / 2**20:.1f} MiB | {per_query:.0f} |"
    )


def one_image(n_classes: int) -> Task:
    whole = synthetic(n_classes, n_classes)
    return whole.subset([0])


def memory_table(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    marks = "".join(f" {args.queries // part} |" for part in (10, 2, 1))
    yield f"| MiB in memory after so many queries |{marks} growth | files | bytes per query |"
    yield "|---|" + "---|" * 6
    for load in (Load("search", args.images, True), Load("pass", 1, False)):
        yield asyncio.run(memory_row(load, args, folder))


# -- large tasks and checkpoints ----------------------------------------------------------------


def traced(work: Callable[[], object]) -> tuple[float, float, float]:
    """MiB kept by the result, MiB at most meanwhile, and seconds (of a second call, untraced)."""
    gc.collect()
    tracemalloc.start()
    result = work()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    start = time.perf_counter()
    work()
    return kept / 2**20, peak / 2**20, time.perf_counter() - start


def large_table(args: argparse.Namespace) -> Iterator[str]:
    n, classes = args.task_images, args.classes
    task = synthetic(n, classes)
    whole = Instant(1, classes, POPULATION).capabilities
    single = replace(whole, images_per_request=1)
    names = Classes(task.class_names, task.template)
    request = Prompts(task).batch(1)[0]
    plans = {"whole set": (whole, 8_000), "one image": (single, 50 * n)}
    yield f"| {n} images | MiB kept | MiB at most | seconds |"
    yield "|---|---|---|---|"
    works: dict[str, Callable[[], object]] = {
        "the task": lambda: synthetic(n, classes),
        "its fingerprint": task.fingerprint,
        "a request over all": lambda: plain_requests(whole, task.images, names),
        "its key": lambda: query_key(request, "model"),
    }
    for name, (capabilities, budget) in plans.items():
        works[f"the plan of {budget} queries, {name} per request"] = plan_of(
            task, capabilities, budget
        )
    for name, work in works.items():
        kept, peak, seconds = traced(work)
        yield f"| {name} | {kept:.1f} | {peak:.1f} | {seconds:.3f} |"


def plan_of(task: Task, capabilities: Capabilities, budget: int) -> Callable[[], object]:
    recipe = replace(CRAFT, folds=0)
    return lambda: make_plan(task, capabilities, recipe, budget=budget, method=Method.CRAFT, seed=0)


def checkpoint(*, separable: bool, generations: int, n_classes: int = 10) -> bytes:
    """A search's saved state after so many generations."""
    recipe = replace(CRAFT, separable=separable)
    record: Record = {
        "stage": "search",
        "generation": 100,
        "best": 1.2345678901234567,
        "mean": 1.2345678901234567,
        "sigma": 1.2345678901234567,
    }
    return to_bytes(Saved([], craft.init(recipe, n_classes, 0), [record] * generations))


def checkpoint_table(args: argparse.Namespace) -> Iterator[str]:
    yield "| KiB of a checkpoint after so many generations |" + "".join(
        f" {generations} |" for generations in GENERATIONS
    )
    yield "|---|" + "---|" * len(GENERATIONS)
    for separable in (True, False):
        name = "separable" if separable else "full covariance"
        sizes = (
            len(checkpoint(separable=separable, generations=g, n_classes=args.classes))
            for g in GENERATIONS
        )
        yield f"| {name} |" + "".join(f" {size / 1024:.0f} |" for size in sizes)


def machine() -> str:
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}, {platform.system()}{load}), "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=160, help="of a search's request")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=100, help="batches that are timed")
    parser.add_argument("--queries", type=int, default=100_000, help="for memory and disk")
    parser.add_argument("--task-images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the ledgers are made")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    print(machine(), end="\n\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        for table in (time_table(args, folder), memory_table(args, folder)):
            print("\n".join(table), end="\n\n", flush=True)
    for table in (large_table(args), checkpoint_table(args)):
        print("\n".join(table), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
