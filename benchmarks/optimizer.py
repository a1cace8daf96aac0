"""Time of one generation (ask, trivial loss, tell) of our CMA-ES, pycma and cmaes.

    python benchmarks/optimizer.py --dimensions 128 512 1000 --population-size 40

All optimisers run in turns, a block of generations each, so that they meet the same load; the time
of an optimiser is the median over its blocks of the block's mean, which holds its share of
eigendecompositions. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from statistics import median

import cmaes
import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.craft.cma import CMASettings, ask, init, tell

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pycma warns where matplotlib is missing
    import cma

Step = Callable[[], object]
SIGMA0 = 0.2
CMAES_FULL_LIMIT = 512  # it decomposes C in every generation: seconds each beyond this


def sphere(candidates: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.square(candidates - 1).sum(axis=-1)


def ours(dimension: int, population_size: int, *, separable: bool) -> Step:
    settings = CMASettings(
        dimension=dimension, population_size=population_size, sigma0=SIGMA0, separable=separable
    )
    state = init(settings)

    def step() -> None:
        nonlocal state
        candidates, state = ask(settings, state)
        state = tell(settings, state, candidates, sphere(candidates))

    return step


def pycma(dimension: int, population_size: int, *, separable: bool) -> Step:
    options = {"popsize": population_size, "CMA_diagonal": separable, "seed": 1, "verbose": -9}
    optimizer = cma.CMAEvolutionStrategy(np.zeros(dimension), SIGMA0, options)

    def step() -> None:
        candidates = optimizer.ask()
        optimizer.tell(candidates, list(sphere(np.asarray(candidates))))

    return step


def cyberagent(dimension: int, population_size: int, *, separable: bool) -> Step:
    kind = cmaes.SepCMA if separable else cmaes.CMA
    optimizer = kind(np.zeros(dimension), SIGMA0, population_size=population_size, seed=1)

    def step() -> None:
        candidates = [optimizer.ask() for _ in range(population_size)]
        optimizer.tell([(x, float(sphere(x))) for x in candidates])

    return step


def contestants(dimension: int, population_size: int) -> Iterator[tuple[str, Step]]:
    """Name and step of each optimiser; the reference comes first."""
    for separable in (False, True):
        kind = "separable" if separable else "full"
        yield f"pycma {kind}", pycma(dimension, population_size, separable=separable)
        yield f"ours {kind}", ours(dimension, population_size, separable=separable)
        if separable or dimension <= CMAES_FULL_LIMIT:
            yield f"cmaes {kind}", cyberagent(dimension, population_size, separable=separable)


def block_time(step: Step, seconds: float) -> float:
    """Mean seconds of a step, over a block of about `seconds` and at least one step."""
    start, steps = time.perf_counter(), 0
    while steps == 0 or time.perf_counter() - start < seconds:
        step()
        steps += 1
    return (time.perf_counter() - start) / steps


def measure(dimension: int, population_size: int, blocks: int, seconds: float) -> dict[str, float]:
    """Milliseconds per generation, by optimiser."""
    steps = dict(contestants(dimension, population_size))
    for step in steps.values():
        step()  # the first one allocates and starts the BLAS threads
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(blocks):
        for name, step in steps.items():
            times[name].append(block_time(step, seconds))
    return {name: 1e3 * median(values) for name, values in times.items()}


def cell(milliseconds: float, reference: float) -> str:
    if math.isnan(milliseconds):
        return "-"
    return f"{milliseconds:.2f} ms ({milliseconds / reference:.3f})"


def table(columns: dict[int, dict[str, float]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    yield "| ms per generation (ratio to pycma full) |" + "".join(f" d = {d} |" for d in columns)
    yield "|---|" + "---|" * len(columns)
    for name in names:
        cells = (cell(c.get(name, math.nan), c["pycma full"]) for c in columns.values())
        yield f"| {name} |" + "".join(f" {text} |" for text in cells)


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "cma", "cmaes"))
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "not set")
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}, {platform.system()}), "
        f"Python {platform.python_version()}, {packages}, OPENBLAS_NUM_THREADS {threads}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[128, 512, 1000])
    parser.add_argument("--population-size", type=int, default=40)
    parser.add_argument("--blocks", type=int, default=3, help="turns of each optimiser")
    parser.add_argument("--seconds", type=float, default=0.6, help="length of a block")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    print(f"{machine()}, population {args.population_size}")
    measured = {
        d: measure(d, args.population_size, args.blocks, args.seconds) for d in args.dimensions
    }
    print("\n".join(table(measured)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
