"""`evaluate`, `predict` and `inspect`: the commands that use what a run has made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blackbox_vlm.cli_options import PATH, budget_option, cost_option, json_option, lost_option
from blackbox_vlm.console import percent, print_csv, print_json, print_table, queries, say, usd
from blackbox_vlm.errors import InputError

if TYPE_CHECKING:
    from blackbox_vlm.adapter import Adapter
    from blackbox_vlm.images import Image
    from blackbox_vlm.ledger import Lost
    from blackbox_vlm.run_directory import RunDirectory


@click.command()
@click.argument("run", type=PATH)
@click.argument("data", type=PATH)
@budget_option
@cost_option
@click.option("--split", default="test", show_default=True, help="Where DATA has several.")
@click.option("--classes", type=PATH, help="File with a class per line: `folder,class name`.")
@click.option("--strict", is_flag=True, help="Refuse broken images instead of skipping them.")
@lost_option
@json_option
def evaluate(
    run: Path,
    data: Path,
    budget: int | None,
    max_cost: float | None,
    split: str,
    classes: Path | None,
    strict: bool,
    on_lost: Lost | None,
    as_json: bool,
) -> None:
    """Compare the adapter of RUN with zero-shot on the labelled images in DATA.

    This costs queries, from a budget of its own; images evaluated before cost nothing.
    """
    from blackbox_vlm import evaluation
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.settings import Settings, load_task

    settings, directory = Settings.from_run(run), RunDirectory(run)
    adapter = _adapter(directory)
    task = load_task(
        data,
        classes=None if classes is None else str(classes),
        template=adapter.classes.template,
        strict=strict,
        split=split,
    )
    evaluation.match_labels(adapter, task)
    ledger = directory.side_ledger("evaluate", task.fingerprint())
    with settings.opened() as backend, directory.locked():
        cost = evaluation.evaluation_cost(adapter, task, backend)
        say(f"Evaluating {len(task)} images takes {queries(cost)}, from a budget of its own.")
        result = evaluation.evaluate(
            adapter,
            task,
            backend,
            ledger,
            budget=budget,
            max_cost=max_cost,
            on_lost=on_lost or "stop",
        )
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    print_table(
        f"{result.n_images} images, strategy {result.strategy}",
        [
            ("zero-shot accuracy", percent(result.zero_shot_accuracy)),
            ("tuned accuracy", percent(result.accuracy)),
            ("queries spent", f"{result.queries_spent} of {result.budget}"),
        ],
    )


@click.command()
@click.argument("run", type=PATH)
@click.argument("images", type=PATH, nargs=-1, required=True)
@budget_option
@cost_option
@lost_option
@json_option
def predict(
    run: Path,
    images: tuple[Path, ...],
    budget: int | None,
    max_cost: float | None,
    on_lost: Lost | None,
    as_json: bool,
) -> None:
    """Predict IMAGES (files or folders) with the adapter of RUN; prints CSV.

    Every request costs one query, from a budget of its own; the same images asked about
    together again cost nothing.
    """
    from blackbox_vlm import evaluation
    from blackbox_vlm.backend import NO_LABEL
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.settings import Settings

    settings, directory = Settings.from_run(run), RunDirectory(run)
    adapter = _adapter(directory)
    found = _find(images)
    digest = hashlib.sha256("".join(image.sha256 for image in found).encode()).hexdigest()
    ledger = directory.side_ledger("predict", digest)
    with settings.opened() as backend, directory.locked():
        cost = adapter.queries(found, backend.capabilities)
        say(f"Predicting {len(found)} images takes {queries(cost)}, from a budget of its own.")
        answer, spent = evaluation.predict(
            adapter,
            found,
            backend,
            ledger,
            budget=budget,
            max_cost=max_cost,
            on_lost=on_lost or "stop",
        )
    names = adapter.classes.names
    rows = [
        {
            "path": str(image.path),
            "label": names[label] if label != NO_LABEL else "",
            "probability": float(row.max()),
        }
        for image, label, row in zip(found, *answer, strict=True)
    ]
    if as_json:
        print_json({"predictions": rows, "n_images": len(rows), "queries_spent": spent})
    else:
        print_csv(rows)


@click.command()
@click.argument("run", type=PATH)
@json_option
def inspect(run: Path, as_json: bool) -> None:
    """Show what RUN has spent, on what, and how far it came. Spends nothing."""
    from blackbox_vlm.ledger import Ledger
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.search import read_trajectory

    directory = RunDirectory(run)
    description = directory.describe()
    with Ledger(directory.ledger) as ledger:
        totals, purposes = ledger.totals(), ledger.by_purpose()
        trajectory = read_trajectory(ledger)
    result = json.loads(directory.result.read_text()) if directory.result.exists() else None
    if as_json:
        print_json(
            {
                "settings": description,
                "totals": {**dataclasses.asdict(totals), "left": totals.left},
                "spent_by_purpose": purposes,
                "trajectory": trajectory,
                "result": result,
            }
        )
        return
    print_table(
        str(run),
        [
            ("state", "finished" if result else f"unfinished; blackbox-vlm resume {run}"),
            ("queries spent", f"{totals.queries} of {totals.budget}"),
            ("answers lost or open", f"{totals.unknown + totals.open}"),
            ("images shown", f"{totals.images}"),
            ("texts shown", f"{totals.texts}"),
            ("cost", usd(totals.cost) if totals.cost else "none declared"),
            *((f"  {purpose}", queries(count)) for purpose, count in purposes.items()),
        ],
    )
    if trajectory:
        print_table("mean fitness of a generation (lower is better)", _stages(trajectory))


def _adapter(directory: RunDirectory) -> Adapter:
    from blackbox_vlm.adapter import Adapter

    if not directory.result.exists():
        raise InputError(
            f"{directory.path} is not finished; blackbox-vlm resume {directory.path} first"
        )
    return Adapter.from_pretrained(directory.adapter)


def _find(paths: tuple[Path, ...]) -> list[Image]:
    """The readable images among files and folders; the others are listed."""
    from blackbox_vlm.images import Image, check_images, find_images

    found: list[Image] = []
    for path in paths:
        files, root = (find_images(path), path) if path.is_dir() else ([path], path.parent)
        for checked in check_images(files, root):
            if isinstance(checked, Image):
                found.append(checked)
            else:
                say(f"Skipped {checked}")
    if not found:
        raise InputError("none of the paths holds a readable image; nothing was asked")
    return found


def _stages(trajectory: list[dict[str, Any]]) -> list[tuple[str, str]]:
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in trajectory:
        stages.setdefault(record["stage"], []).append(record)
    return [
        (
            f"{stage}, {len(records)} generations",
            f"{records[0]['mean']:.4f} to {records[-1]['mean']:.4f}",
        )
        for stage, records in stages.items()
    ]
