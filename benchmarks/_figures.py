"""The figures of `access.py`: accuracy against what was spent, one per access level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _cells import LOGISTIC, PLANNER, REFINE, TEMPLATE
from _tables import Pair, Rows, average

SCORES = ("logits", "softmax", "4 decimals", "top 20", "64 texts")
SIZE = (6.4, 4.0)  # inches
STYLE = {
    "svg.hashsalt": "blackbox-vlm",  # the same rows draw the same bytes
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
METADATA = {"Date": None, "Creator": None}


class Point(NamedTuple):
    """Averages over data sets: what was spent, and the accuracy of every seed."""

    spent: float
    accuracy: Sequence[float]


def point(spent: Mapping[Pair, float], accuracy: Mapping[Pair, float]) -> Point | None:
    """One point of a curve; None where nothing was measured."""
    if not accuracy:
        return None
    seeds = sorted({seed for _, seed in accuracy})
    by_seed = [average({p: a for p, a in accuracy.items() if p[1] == seed}) for seed in seeds]
    return Point(average(spent), by_seed)


def by_shots(rows: Rows, kind: str, method: str) -> list[Point]:
    found = [
        point(rows.of(kind, method, shots, "images"), rows.of(kind, method, shots))
        for shots in rows.shots
    ]
    return [p for p in found if p]


def by_budget(rows: Rows, kind: str, method: str) -> list[Point]:
    most = rows.shots[-1]
    found = [
        point(rows.of(kind, method, most, "queries", b), rows.of(kind, method, most, budget=b))
        for b in rows.budgets
    ]
    return [p for p in found if p]


Curves = dict[str, list[Point]]


def all_curves(rows: Rows, craft: Curves) -> Iterator[tuple[str, str, Curves]]:
    """(name of the figure, its horizontal axis, its curves)."""
    shown, most = "images shown while tuning (one per query)", rows.shots[-1]
    yield (
        "embeddings",
        shown,
        {
            "ours": by_shots(rows, "embeddings", PLANNER),
            LOGISTIC: by_shots(rows, "embeddings", LOGISTIC),
            **craft,
        },
    )
    scores = {kind: by_shots(rows, kind, PLANNER) for kind in SCORES}
    alone = {"softmax, refiner alone": by_shots(rows, "softmax", REFINE)}
    yield "scores", shown, scores | alone | craft
    label = {f"ours, {most} shots, by budget": by_budget(rows, "label", PLANNER)}
    label |= {"ours, by shots": by_shots(rows, "label", PLANNER)}
    label |= {"best template, by shots": by_shots(rows, "label", TEMPLATE)}
    yield "label", "queries spent while tuning (one image each)", label
    yield "soft", "images shown while tuning", craft


def draw_all(rows: Rows, craft: Curves, folder: Path) -> list[Path]:
    """Draw what there are points for; the files."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    plain, files = average(rows.zero_shot(rows.kinds()[0], rows.shots[-1])), []
    for name, spent, curves in all_curves(rows, craft):
        kept = {label: points for label, points in curves.items() if points}
        if kept:
            files.append(folder / f"{name}.svg")
            with mpl.rc_context(STYLE):
                _draw(files[-1], spent, kept, plain)
    return files


def _draw(path: Path, spent: str, curves: Curves, zero_shot: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for label, points in curves.items():
        _curve(axes, label, points)
    axes.axhline(zero_shot, color="0.5", linestyle=":", label="zero-shot")
    axes.set(xscale="log", xlabel=spent, ylabel="test accuracy, %, mean over data sets")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, metadata=METADATA)


def _curve(axes: Any, label: str, points: list[Point]) -> None:
    """The mean over seeds, in a band from the lowest seed to the highest."""
    points = sorted(points, key=lambda p: p.spent)
    x = [p.spent for p in points]
    mean = [np.mean(p.accuracy) for p in points]
    (line,) = axes.plot(x, mean, marker="o", markersize=3, label=label)
    low, high = ([f(p.accuracy) for p in points] for f in (min, max))
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
