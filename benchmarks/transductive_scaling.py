"""Time and memory of the transductive classifiers and their neighbours, by the number of vectors.

    python benchmarks/transductive_scaling.py
    python benchmarks/transductive_scaling.py --vectors 10000 100000 --dims 64      # a look

Synthetic vectors: Gaussian classes of a falling spectrum. Each cell runs in a process of its own.
Times are processor seconds, and their ratio is per vector, to that of the fewest vectors: 1 is
linear growth. Up to `neighbours.EXACT` vectors all pairs are compared. Memory is the process's peak
over its start, over the size of the vectors and logits.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

import numpy as np

from blackbox_vlm.coft import neighbours
from blackbox_vlm.coft.mass import evening
from blackbox_vlm.coft.transductive import transclip
from blackbox_vlm.observe.heads import Seen

BLOCK = 10_000
SCALE = 1 / 1024 if sys.platform == "linux" else 1 / 1024**2  # of ru_maxrss, in MiB


def draw(n: int, dim: int, classes: int) -> tuple[Seen, np.ndarray]:
    """Vectors of a mean squared length of about 1, and what they are."""
    random = np.random.default_rng(0)
    spread = (np.arange(1, dim + 1, dtype=np.float32) ** -0.5) / np.sqrt(np.log(dim))
    centres = random.standard_normal((classes, dim), dtype=np.float32)
    truth = random.integers(classes, size=n)
    seen = Seen(np.empty((n, dim), np.float32), np.empty((n, classes), np.float32))
    for start in range(0, n, BLOCK):
        rows, some = slice(start, start + BLOCK), truth[start : start + BLOCK]
        noise = random.standard_normal((len(some), dim), dtype=np.float32)
        seen.features[rows] = 0.7 * spread * (centres[some] + noise)
        seen.zero_shot[rows] = random.standard_normal((len(some), classes), dtype=np.float32)
        seen.zero_shot[rows][np.arange(len(some)), some] += 2
    return seen, truth


def peak() -> float:
    """Most memory that this process has had so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * SCALE


def cell(n: int, dim: int, classes: int) -> dict[str, float]:
    """Processor seconds, peak memory and accuracy."""
    empty = peak()
    seen, truth = draw(n, dim, classes)
    given = (seen.features.nbytes + seen.zero_shot.nbytes) / 2**20
    times = [time.process_time()]
    graph = neighbours.graph(seen.features, random=np.random.default_rng(0))
    times.append(time.process_time())
    found = transclip(seen, graph, np.full(n, -1), offset=evening(seen.zero_shot))
    times.append(time.process_time())
    return {
        "neighbours": times[1] - times[0],
        "transclip": times[2] - times[1],
        "peak": peak() - empty,
        "memory": (peak() - empty) / given,
        "zero-shot": float((seen.zero_shot.argmax(axis=1) == truth).mean()),
        "accuracy": float((found.posterior.argmax(axis=1) == truth).mean()),
    }


def apart(n: int, dim: int, classes: int) -> dict[str, float]:
    """The cell in a process of its own."""
    command = [sys.executable, __file__, "--cell", str(n), str(dim), str(classes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def table(vectors: list[int], dims: list[int], classes: int) -> None:
    """Print it, a line at a time."""
    print(f"{platform.machine()}, {platform.platform()}, {classes} classes\n")
    print(
        "| dims | vectors | neighbours, s | ratio | TransCLIP, s | ratio | peak, GiB | of input |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for dim in dims:
        first: dict[str, float] = {}
        for n in vectors:
            found = apart(n, dim, classes)
            first = first or {part: found[part] / n for part in ("neighbours", "transclip")}
            times = (f"{found[part]:.1f} | {found[part] / n / first[part]:.2f}" for part in first)
            memory = f"{found['peak'] / 1024:.2f} | {found['memory']:.1f}"
            print(f"| {dim} | {n} | {' | '.join(times)} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vectors", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--cell", type=int, nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.cell:
        print(json.dumps(cell(*chosen.cell)))
    else:
        table(sorted(chosen.vectors), chosen.dims, chosen.classes)


if __name__ == "__main__":
    main()
