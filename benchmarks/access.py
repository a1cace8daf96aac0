"""Accuracy by what an endpoint gives: the planner against its references, on test images.

    python benchmarks/access.py DATA [DATA ...] [--seeds 0 1 2] [--shots 1 2 4 8 16] [--jobs 2]

DATA are folders with train/ and test/ holding class folders. For every data set, kind of endpoint,
number of shots and seed, `tune` runs with a budget and no other option, against the local black box
that rehearses such an endpoint (one image per request), through meter and ledger. Then the saved
adapter is asked about the test images, once. The references see the same images, through meters,
too: scikit-learn's logistic regression on the returned vectors, CraFT's refiner alone, the best of
a fixed list of templates; CraFT itself is read from what `accuracy.py` left. Nothing about a run is
chosen by what is printed here.

Finished cells are kept in --results (JSON lines) under a digest of the code, so that an interrupted
benchmark goes on. It prints its tables and draws its figures. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import platform
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import _cells
from _cells import KINDS, LOGISTIC, PLANNER, REFINE, TEMPLATE, Cell, run
from _figures import Curves, draw_all, point
from _grid import Row, read, run_all
from _tables import Pair, Rows, all_tables
from blackbox_vlm.backends import local

import blackbox_vlm

SHOTS = (1, 2, 4, 8, 16)
NOT_MEASURED = ("cli", "commands_", "console", "endpoint", "probe", "progress", "settings", "test")


def main() -> None:
    given = parse()
    settings = given.settings or digest()
    groups = list(grid(given, settings))
    if given.settings:
        rows = list(read(given.results))
    else:
        rows = run_all(groups, run, given.results, given.jobs)
    wanted = {cell for group in groups for cell in group}
    show(Rows((row for row in rows if Cell(*row["cell"]) in wanted), given.budget), given, settings)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--methods", nargs="+", default=[], help="also force these: the regret")
    parser.add_argument("--budget", type=int, default=8000)
    parser.add_argument("--label-budgets", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    parser.add_argument("--images-per-request", type=int, default=1, help="0: no limit")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("runs/access.jsonl"))
    parser.add_argument("--craft-results", type=Path, default=Path("runs/accuracy.jsonl"))
    parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
    parser.add_argument("--settings", help="run nothing: show the results kept under this digest")
    return parser.parse_args()


def grid(given: argparse.Namespace, settings: str) -> Iterator[list[Cell]]:
    """Groups of cells that share their data set, shots and seed; the dear ones first."""
    fixed = (given.images_per_request, given.model, settings)
    for data in given.data:
        for shots in sorted(given.shots, reverse=True):
            for seed in given.seeds:
                group = [
                    Cell(str(data), kind, method, shots, seed, given.budget, *fixed)
                    for kind in given.kinds
                    for method in methods(kind, given.methods)
                ]
                if "label" in given.kinds and shots == max(given.shots):
                    group += [
                        Cell(str(data), "label", PLANNER, shots, seed, budget, *fixed)
                        for budget in given.label_budgets
                        if budget != given.budget
                    ]
                yield group


def methods(kind: str, forced: list[str]) -> list[str]:
    """The planner, the references of that kind, and what was asked for."""
    access = KINDS[kind]["access"]
    references = {"embeddings": [LOGISTIC], "scores": [REFINE], "label": [TEMPLATE]}[access]
    return list(dict.fromkeys([PLANNER, *references, *forced]))


def digest() -> str:
    """A few hex digits over the code that tunes, predicts and measures, comments left out."""
    package = Path(blackbox_vlm.__file__).parent
    ours = [path for path in package.rglob("*.py") if not path.name.startswith(NOT_MEASURED)]
    sources = [*sorted(ours), Path(local.__file__), Path(_cells.__file__)]
    parts = [ast.dump(ast.parse(path.read_text(encoding="utf-8"))) for path in sources]
    parts += [path.read_text(encoding="utf-8") for path in sorted(package.glob("data/*.txt"))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def show(rows: Rows, given: argparse.Namespace, settings: str) -> None:
    """Print the tables, draw the figures, and say where this ran."""
    if not rows.kinds():
        raise SystemExit(f"no results under {settings} in {given.results}; run without --settings")
    kept = [row for row in read(given.craft_results) if row["cell"][5] == given.model]
    craft = [row for row in kept if row["cell"][3] == max(given.shots)]
    for text in all_tables(rows, craft_accuracy(craft, given.budget)):
        print(f"\n{text}")
    for path in draw_all(rows, craft_curves(craft, rows), given.figures):
        print(f"drawn: {path}")
    print(
        f"\nshots {given.shots}, seeds {given.seeds}, budget {given.budget}, "
        f"{given.images_per_request or 'any number of'} image(s) per request; model "
        f"{given.model}, settings {settings}; {platform.machine()}, {os.cpu_count()} CPUs, "
        f"{given.jobs} processes of one thread, Python {platform.python_version()}, scikit-learn "
        f"{version('scikit-learn')}"
    )
    for reason, count in rows.left_out.items():
        print(f"left out {count} cells: {reason}")


def craft_accuracy(craft: list[Row], budget: int) -> dict[str, dict[Pair, float]]:
    """CraFT's test accuracy by recipe, from the rows of `accuracy.py`."""
    found: dict[str, dict[Pair, float]] = defaultdict(dict)
    for row in craft:
        data, recipe, seed, _, spent, *_ = row["cell"]
        if spent == budget:
            found[recipe][Path(data).name, seed] = row["accuracy"]["chosen"]
    return dict(found)


def craft_curves(craft: list[Row], rows: Rows) -> Curves:
    """CraFT's accuracy by the images that it showed at most: searches on folds show some less."""
    curves: Curves = {}
    for recipe in dict.fromkeys(row["cell"][1] for row in craft):
        for budget in sorted({row["cell"][4] for row in craft}):
            accuracy = craft_accuracy(craft, budget).get(recipe, {})
            found = point(
                {p: budget * n for p, n in rows.n_train.items() if p in accuracy}, accuracy
            )
            if found and set(rows.data(rows.shots[-1])) <= {name for name, _ in accuracy}:
                curves.setdefault(recipe, []).append(found)
    return curves


if __name__ == "__main__":
    main()
