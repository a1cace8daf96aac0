"""Accuracy of CraFT under soft-prompt access: ours and the published settings, on test images.

    python benchmarks/accuracy.py DATA [DATA ...] [--seeds 0 1 2] [--budget 8000] [--jobs 2]

DATA are folders with train/ and test/ holding class folders. For every data set, seed and recipe
one run is made through the whole path (local black box, meter, ledger on disk); then each module is
deployed in turn and asked about the test images, once. Nothing about a run is chosen by what is
printed here. Finished cells are kept in --results (JSON lines), so that an interrupted benchmark
goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _grid import run_all

RECIPES = ("craft", "craft-paper", "craft-paper-flowers")
COLUMNS = {
    "zero-shot": ("craft", "zero-shot"),
    "prompt only": ("craft", "prompt"),
    "refiner only": ("craft", "refiner"),
    "both, no guard": ("craft", "prompt+refiner"),
    "**CraFT (ours)**": ("craft", "chosen"),
    "craft-paper": ("craft-paper", "prompt+refiner"),
    "craft-paper-flowers": ("craft-paper-flowers", "prompt+refiner"),
}


class Cell(NamedTuple):
    """One run of the benchmark."""

    data: str
    recipe: str
    seed: int
    shots: int
    budget: int
    model: str
    settings: str  # digest of the recipe and the version, so that old cells are not mixed in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--budget", type=int, default=8000)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("runs/accuracy.jsonl"))
    given = parser.parse_args()
    cells = [
        Cell(str(data), recipe, seed, given.shots, given.budget, given.model, digest(recipe))
        for seed in given.seeds
        for data in given.data
        for recipe in given.recipes
    ]
    print_table(run_all([[cell] for cell in cells], run, given.results, given.jobs), given)


def digest(recipe: str) -> str:
    """A few hex digits over everything that the recipe sets."""
    from blackbox_vlm import __version__
    from blackbox_vlm.craft.recipes import recipe_named

    text = repr((__version__, recipe_named(recipe)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run(cell: Cell) -> dict[str, Any]:
    """Tune, then deploy each strategy on the test images; accuracies in percent."""
    import asyncio

    from blackbox_vlm.backends.local import LocalBlackBox

    from blackbox_vlm import Task
    from blackbox_vlm.craft.craft import refined
    from blackbox_vlm.craft.recipes import recipe_named
    from blackbox_vlm.ledger import Ledger
    from blackbox_vlm.meter import Meter
    from blackbox_vlm.observations import plain_logits, prompt_logits
    from blackbox_vlm.search import CraftRun
    from blackbox_vlm.tuning import Options, dry_run

    task = Task.from_folder(cell.data).sample(cell.shots, cell.seed)
    test = Task.from_folder(cell.data, split="test")
    assert test.labels is not None
    classes, recipe = task.classes, recipe_named(cell.recipe)
    backend = LocalBlackBox(model=cell.model, access="soft")
    options = Options(cell.budget, recipe=cell.recipe, seed=cell.seed)
    plan = dry_run(task, backend.capabilities, options)
    with tempfile.TemporaryDirectory() as folder:
        with Ledger(Path(folder) / "tune", cell.budget) as ledger:
            meter = Meter(backend, ledger)
            plain = asyncio.run(plain_logits(meter, task.images, classes, "zero-shot"))
            search = CraftRun(task, plan, recipe, cell.seed, meter, ledger, lambda _: None)
            tuned = asyncio.run(search.run(plain))
            totals = ledger.totals()
        with Ledger(Path(folder) / "test", 10) as ledger:
            meter = Meter(backend, ledger)
            shown = asyncio.run(plain_logits(meter, test.images, classes, "zero-shot"))
            assert tuned.offset is not None
            offsets = tuned.offset[None]
            prompted = asyncio.run(prompt_logits(meter, test.images, classes, offsets, "tuned"))[0]
    predictions = {
        "zero-shot": shown,
        "prompt": prompted,
        **{
            strategy.value: refined(refiner, prompted if strategy.uses_prompt else shown)
            for strategy, refiner in tuned.refiners.items()
        },
    }
    accuracy = {
        name: 100 * float((logits.argmax(1) == test.labels).mean())
        for name, logits in predictions.items()
    }
    accuracy["chosen"] = accuracy[tuned.strategy.value]
    return {
        "cell": list(cell),
        "accuracy": accuracy,
        "strategy": tuned.strategy.value,
        "out_of_fold": tuned.verdict
        and {name.value: 100 * value for name, value in tuned.verdict.accuracy.items()},
        "queries": totals.queries,
        "images": totals.images,
        "n_test": len(test),
    }


def print_table(rows: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Mean and deviation over seeds, in percent; a line per data set and their average."""
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    chosen: dict[str, list[str]] = defaultdict(list)
    spent = set()
    for row in rows:
        data, recipe, *_ = row["cell"]
        name = Path(data).name
        spent.add(row["queries"])
        for column, (of_recipe, strategy) in COLUMNS.items():
            if of_recipe == recipe:
                table[name][column].append(row["accuracy"][strategy])
        if recipe == "craft":
            chosen[name].append(row["strategy"])
    columns = [column for column in COLUMNS if any(column in row for row in table.values())]
    print(f"\n| data set | {' | '.join(columns)} | the guard chose |")
    print("|---" * (len(columns) + 2) + "|")
    for name, row in table.items():
        shown = [f"{np.mean(row[c]):.1f} ± {np.std(row[c], ddof=1):.1f}" for c in columns]
        print(f"| {name} | {' | '.join(shown)} | {', '.join(sorted(chosen[name]))} |")
    averages = [np.mean([np.mean(row[c]) for row in table.values()]) for c in columns]
    print(f"| average | {' | '.join(f'{a:.1f}' for a in averages)} | |")
    print(
        f"\n{given.shots} shots, seeds {given.seeds}, budget {given.budget}, spent "
        f"{min(spent)} to {max(spent)} queries a run; model {given.model}; "
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
