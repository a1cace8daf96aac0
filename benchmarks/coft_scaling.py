"""Time and memory of CoFT's layer by the number of vectors: `coft.look`, then both phases.

    python benchmarks/coft_scaling.py
    python benchmarks/coft_scaling.py --largest     # a million vectors as well: minutes, and memory

Synthetic vectors, as of `transductive_scaling.py`. Each cell runs in a process of its own, of one
thread. "Per vector" is over the same of 10,000 vectors: 1 is linear growth, less is better. Memory
is the process's peak, over what it had with the vectors and logits in it, in their size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np
from _tables import table
from transductive_scaling import draw, peak

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.coft.coft import coft, look
from blackbox_vlm.coft.mass import evening
from blackbox_vlm.coft.settings import PLUS, CoftSettings

SIZES, LARGEST, BASE = (2_000, 10_000, 100_000), 1_000_000, 10_000
VARIANTS = {"CoFT": CoftSettings(), "CoFT+": PLUS}


def cell(n: int, dim: int, classes: int, variant: str) -> dict[str, float]:
    """Seconds and MiB of one run, and its accuracy beside zero-shot's, in percent."""
    settings = VARIANTS[variant]
    seen, truth = draw(n, dim, classes)
    before, times = peak(), [time.process_time()]
    views = look(seen.features, settings.power, 0)
    times.append(time.process_time())
    looked = peak()
    refined = seen.zero_shot + evening(seen.zero_shot).astype(np.float32)
    unknown = np.full(n, NO_LABEL)
    found = coft(views, refined, unknown, settings, settings.ridge, 0)
    times.append(time.process_time())
    given = (seen.features.nbytes + seen.zero_shot.nbytes) / 2**20
    return {
        "look": times[1] - times[0],
        "coft": times[2] - times[1],
        "look_memory": (looked - before) / given,
        "memory": (peak() - before) / given,
        "peak": peak(),
        "zero_shot": 100 * float((refined.argmax(axis=1) == truth).mean()),
        "accuracy": 100 * float((found.student.posterior.argmax(axis=1) == truth).mean()),
    }


def apart(*of: object) -> dict[str, float]:
    """The cell in a process of its own."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    command = [sys.executable, __file__, "--cell", *map(str, of)]
    one = os.environ | dict.fromkeys(names, "1")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vectors", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--largest", action="store_true", help=f"{LARGEST:,} vectors as well")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--variants", nargs="+", default=["CoFT"], choices=VARIANTS)
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        n, dim, classes, variant = given.cell
        print(json.dumps(cell(int(n), int(dim), int(classes), variant)))
        return
    for variant in given.variants:
        print(shown(variant, given), flush=True)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")


def shown(variant: str, given: argparse.Namespace) -> str:
    """The table of a variant."""
    sizes = sorted({*given.vectors, BASE, *([LARGEST] if given.largest else [])})
    rows = {n: apart(n, given.dim, given.classes, variant) for n in sizes}

    def line(n: int) -> list[object]:
        row, base = rows[n], rows[BASE]
        seconds, other = (found["look"] + found["coft"] for found in (row, base))
        per = f"{seconds / n / (other / BASE):.2f}"
        memory = [f"{row[name]:.1f}" for name in ("look_memory", "memory")]
        figures = [row[name] for name in ("look", "coft")]
        return [f"{n:,}", *figures, per, *memory, row["peak"], row["zero_shot"], row["accuracy"]]

    header = ["vectors", "look, s", "both phases, s", "per vector", "memory of look", "of all"]
    header += ["peak, MiB", "zero-shot", variant]
    title = f"{variant}, {given.dim} dimensions, {given.classes} classes; processor seconds"
    return table(title, header, map(line, sizes))


if __name__ == "__main__":
    main()
