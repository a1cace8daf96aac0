"""The tables of `access.py`, from its rows; nothing is measured here."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from _cells import KINDS, LOGISTIC, PLANNER, REFINE, STRENGTHS, TEMPLATE, Cell

Pair = tuple[str, int]  # data set and seed
LIMITED = ("4 decimals", "top 20", "64 texts")
SHOWN_SHOTS = (1, 2, 16)  # of the tables with a line per data set


class Mean(NamedTuple):
    """A mean and its standard error (NaN of one value) over `n` values."""

    mean: float
    error: float
    n: int

    def __str__(self) -> str:
        error = "" if np.isnan(self.error) else f" ± {self.error:.1f}"
        return f"{self.mean:+.1f}{error}" if self.n else "-"


class Rows:
    """Rows by cell. Everything asked of them is a mapping from (data set, seed) to a figure."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], budget: int) -> None:
        self.budget = budget
        kept = list(rows)
        self._rows = {Cell(*row["cell"]): row for row in kept if "left_out" not in row}
        self.left_out = Counter(row["left_out"] for row in kept if "left_out" in row)

    def of(
        self, kind: str, method: str, shots: int, field: str = "accuracy", budget: int | None = None
    ) -> dict[Pair, Any]:
        wanted = (kind, method, shots, budget or self.budget)
        return {
            (cell.name, cell.seed): row[field]
            for cell, row in self._rows.items()
            if (cell.kind, cell.method, cell.shots, cell.budget) == wanted
            and row.get(field) is not None
        }

    def zero_shot(self, kind: str, shots: int) -> dict[Pair, float]:
        return self.of(kind, PLANNER, shots, "zero_shot")

    def data(self, shots: int) -> list[str]:
        """The data sets that have so many images per class."""
        return list(dict.fromkeys(cell.name for cell in self._rows if cell.shots == shots))

    @property
    def shots(self) -> list[int]:
        return sorted({cell.shots for cell in self._rows})

    @property
    def n_train(self) -> dict[Pair, int]:
        """Training images at the largest number of shots."""
        cells = ((cell, row) for cell, row in self._rows.items() if cell.shots == self.shots[-1])
        return {(cell.name, cell.seed): row["n_train"] for cell, row in cells}

    @property
    def budgets(self) -> list[int]:
        return sorted({cell.budget for cell in self._rows})

    def kinds(self, method: str = PLANNER) -> list[str]:
        used = {cell.kind for cell in self._rows if cell.method == method}
        return [kind for kind in KINDS if kind in used]

    def methods(self, kind: str) -> list[str]:
        """The methods of `Options` that were asked for by name."""
        used = {cell.method: None for cell in self._rows if cell.kind == kind}
        return [m for m in used if m not in (PLANNER, LOGISTIC, TEMPLATE)]


def average(values: Mapping[Pair, float], data: str | None = None) -> float:
    """The mean over data sets of the mean over seeds; of one data set, if it is named."""
    names = {name for name, _ in values} if data is None else {data}
    means = [
        np.mean([v for (name, _), v in values.items() if name == n] or [np.nan]) for n in names
    ]
    return float(np.mean(means)) if means else float("nan")


def paired(one: Mapping[Pair, float], other: Mapping[Pair, float], data: str | None = None) -> Mean:
    """The mean of one minus the other over the pairs (data set, seed) that both have."""
    gains = [one[p] - other[p] for p in one if p in other and data in (None, p[0])]
    if not gains:
        return Mean(float("nan"), float("nan"), 0)
    error = np.std(gains, ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else float("nan")
    return Mean(float(np.mean(gains)), float(error), len(gains))


def share(
    one: Mapping[Pair, float], full: Mapping[Pair, float], base: Mapping[Pair, float]
) -> float:
    """How much of the gain of `full` over `base` another has, over the pairs that all have."""
    pairs = [p for p in one if p in full and p in base]
    gain = sum(full[p] - base[p] for p in pairs)
    return sum(one[p] - base[p] for p in pairs) / gain if gain else float("nan")


def table(title: str, header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A titled table in Markdown; floats with one decimal."""
    body = ["| " + " | ".join(map(_shown, line)) + " |" for line in lines]
    return "\n".join([f"### {title}", "", _line(header), "|---" * len(header) + "|", *body, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.1f}"
    return str(value)


# -- the tables ---------------------------------------------------------------------------------


def all_tables(rows: Rows, craft: Mapping[str, Mapping[Pair, float]]) -> Iterator[str]:
    """Every table that the rows allow; `craft` is CraFT's accuracy by recipe."""
    kinds = rows.kinds()
    if "embeddings" in kinds:
        yield from (make(rows) for make in (embeddings_by_shots, embeddings_by_data, strengths))
    yield kinds_by_data(rows, craft)
    yield kinds_against(rows, craft)
    yield kinds_by_shots(rows)
    if "label" in kinds:
        yield from (make(rows) for make in (label_by_shots, label_by_data))
    for kind in kinds:
        if len(rows.methods(kind)) > 1:  # more than the reference
            yield regret(rows, kind)
    yield from (make(rows) for make in (guard, calibration, cost, seconds, choices))


def embeddings_by_shots(rows: Rows) -> str:
    def line(shots: int) -> list[object]:
        ours, plain = rows.of("embeddings", PLANNER, shots), rows.zero_shot("embeddings", shots)
        lr = rows.of("embeddings", LOGISTIC, shots)
        gain = paired(ours, lr)
        return [shots, *map(average, (plain, lr, ours)), gain, paired(ours, plain), gain.n]

    header = ["shots", "zero-shot", "logistic regression", "**ours**"]
    header += ["ours - regression", "ours - zero-shot", "pairs"]
    return table("Embeddings, averages", header, map(line, rows.shots))


def embeddings_by_data(rows: Rows) -> str:
    shown = [shots for shots in SHOWN_SHOTS if shots in rows.shots]

    def line(data: str) -> list[object]:
        cells: list[object] = [data, average(rows.zero_shot("embeddings", shown[0]), data)]
        for shots in shown:
            ours, lr = (rows.of("embeddings", m, shots) for m in (PLANNER, LOGISTIC))
            cells += [average(lr, data), average(ours, data), paired(ours, lr, data)]
        return cells

    header = ["data set", "zero-shot"]
    for shots in shown:
        header += [f"regression, {shots}", f"ours, {shots}", "difference"]
    lines = map(line, rows.data(shown[0])) if shown else ()
    return table("Embeddings, data sets", header, lines)


def strengths(rows: Rows) -> str:
    def line(shots: int) -> list[object]:
        at = rows.of("embeddings", LOGISTIC, shots, "accuracy_at")
        fixed = [average({p: a[str(C)] for p, a in at.items()}) for C in STRENGTHS]
        ours, lr = (rows.of("embeddings", m, shots) for m in (PLANNER, LOGISTIC))
        return [shots, *fixed, average(lr), average(ours)]

    header = ["shots", *(f"C = {C:g}" for C in STRENGTHS), "C chosen out-of-fold", "**ours**"]
    return table("Logistic regression at every C", header, map(line, rows.shots))


def kinds_by_data(rows: Rows, craft: Mapping[str, Mapping[Pair, float]]) -> str:
    kinds, most = rows.kinds(), rows.shots[-1]
    columns = [rows.zero_shot(kinds[0], most), *craft.values()]
    columns += [rows.of(kind, PLANNER, most) for kind in kinds]
    lines: list[list[object]] = [
        [data, *(average(column, data) for column in columns)] for data in rows.data(most)
    ]
    whole = [{name for name, _ in column} >= set(rows.data(most)) for column in columns]
    lines.append(
        ["average", *(average(c) if w else "-" for c, w in zip(columns, whole, strict=True))]
    )
    header = ["data set", "zero-shot", *craft, *(f"**{kind}**" for kind in kinds)]
    return table(f"Access levels, {most} shots", header, lines)


def kinds_against(rows: Rows, craft: Mapping[str, Mapping[Pair, float]]) -> str:
    """Each kind against every reference, paired; and its share of the gain of embeddings."""
    most = rows.shots[-1]
    full, full_plain = rows.of("embeddings", PLANNER, most), rows.zero_shot("embeddings", most)

    def line(kind: str) -> list[object]:
        ours = rows.of(kind, PLANNER, most)
        others = [rows.zero_shot(kind, most), *craft.values(), rows.of(kind, REFINE, most)]
        part = share(ours, full, full_plain)
        return [
            kind,
            *(paired(ours, other) for other in others),
            paired(ours, rows.of("softmax", PLANNER, most)),
            "-" if np.isnan(part) else f"{100 * part:.0f} %",
        ]

    header = ["ours minus ...", "zero-shot", *craft, "refiner alone", "full softmax"]
    header += ["share of the embeddings' gain"]
    return table(
        f"Access levels against the references, {most} shots", header, map(line, rows.kinds())
    )


def kinds_by_shots(rows: Rows) -> str:
    kinds = rows.kinds()
    limited = [kind for kind in rows.kinds(REFINE) if kind in kinds]

    def line(shots: int) -> list[object]:
        ours = [average(rows.of(kind, PLANNER, shots)) for kind in kinds]
        alone = [average(rows.of(kind, REFINE, shots)) for kind in limited]
        return [shots, average(rows.zero_shot(kinds[0], shots)), *ours, *alone]

    header = ["shots", "zero-shot", *(f"**{kind}**" for kind in kinds)]
    header += [f"refiner alone, {kind}" for kind in limited]
    return table("Access levels, averages", header, map(line, rows.shots))


def label_by_shots(rows: Rows) -> str:
    def line(shots: int) -> list[object]:
        ours, plain = rows.of("label", PLANNER, shots), rows.zero_shot("label", shots)
        best, spent = rows.of("label", TEMPLATE, shots), rows.of("label", PLANNER, shots, "queries")
        queries = f"{np.median(list(spent.values())):.0f} ({max(spent.values())})" if spent else "-"
        return [shots, *map(average, (plain, best, ours)), paired(ours, best), queries]

    header = ["shots", "zero-shot", "best template", "**ours**", "ours - best template"]
    header += ["queries, median (most)"]
    return table("Labels, averages", header, map(line, rows.shots))


def label_by_data(rows: Rows) -> str:
    most = rows.shots[-1]
    ours, best = (rows.of("label", method, most) for method in (PLANNER, TEMPLATE))
    columns = (rows.zero_shot("label", most), best, ours)
    lines = [
        [data, *(average(column, data) for column in columns), paired(ours, best, data)]
        for data in rows.data(most)
    ]
    header = ["data set", "zero-shot", "best template", "**ours**", "ours - best template"]
    return table(f"Labels, {most} shots", header, lines)


def regret(rows: Rows, kind: str) -> str:
    """The planner's choice against the method that is best on the data set's test images.

    The best method is picked with hindsight, which flatters it: the regret is an upper bound.
    """
    methods, most = rows.methods(kind), rows.shots[-1]

    def line(data: str, shots: int) -> list[Any]:
        ours = average(rows.of(kind, PLANNER, shots), data)
        fixed = [average(rows.of(kind, method, shots), data) for method in methods]
        best = int(np.nanargmax(fixed))
        return [*fixed, ours, methods[best], ours - fixed[best]]

    def mean(shots: int) -> list[Any]:
        lines = [line(data, shots) for data in rows.data(shots)]
        columns = list(zip(*lines, strict=True))
        *fixed, ours, _, lost = (c if isinstance(c[0], str) else np.mean(c) for c in columns)
        return [f"average, {shots} shots", *map(float, (*fixed, ours)), "", float(lost)]

    lines = [[data, *line(data, most)] for data in rows.data(most)] + list(map(mean, rows.shots))
    header = [f"data set, {most} shots", *methods, "**planner**", "best method", "planner - best"]
    return table(f"Regret, {kind}", header, lines)


def guard(rows: Rows) -> str:
    """How often, and by how much, what is deployed is below zero-shot on the test images."""

    def line(kind: str) -> list[object]:
        gains, sets = [], []
        for shots in rows.shots:
            ours, plain = rows.of(kind, PLANNER, shots), rows.zero_shot(kind, shots)
            gains += [ours[p] - plain[p] for p in ours]
            of_data = ((paired(ours, plain, data), data) for data in rows.data(shots))
            sets += [(mean, data, shots) for mean, data in of_data if mean.n]
        below = [gain for gain in gains if gain < 0]
        noise = [mean for mean, _, _ in sets if mean.mean < -mean.error]
        worst, data, shots = min(sets)
        return [
            kind,
            len(gains),
            len(below),
            float(np.mean(below)) if below else "-",
            float(min(gains)),
            f"{len(noise)} of {len(sets)}",
            f"{worst} ({data} at {shots})",
        ]

    header = ["access", "cells", "below zero-shot", "mean of those", "worst cell"]
    header += ["data sets and shots below by more than a standard error", "worst of these"]
    return table("The guard", header, map(line, rows.kinds()))


def calibration(rows: Rows) -> str:
    """Expected calibration errors in percent, and how far the out-of-fold figures are off."""

    def line(kind: str, shots: int) -> list[object]:
        of = functools.partial(rows.of, kind, PLANNER, shots)
        error, regression = of("ece"), rows.of(kind, LOGISTIC, shots, "ece")
        gap, flattered = (
            paired(of("out_of_fold_ece"), error),
            paired(of("out_of_fold"), of("accuracy")),
        )
        return [
            kind,
            shots,
            *map(average, (error, regression, of("zero_shot_ece"))),
            gap,
            flattered,
        ]

    ends = dict.fromkeys((rows.shots[0], rows.shots[-1]))
    lines = [line(kind, shots) for kind in rows.kinds() for shots in ends]
    header = [
        "access",
        "shots",
        "ECE on test images",
        "... of logistic regression",
        "... of zero-shot",
    ]
    header += ["out-of-fold ECE minus ours", "out-of-fold accuracy minus accuracy"]
    return table("Calibration, and what out-of-fold figures are worth", header, lines)


def cost(rows: Rows) -> str:
    """Queries are requests; images are counted as often as they are shown."""

    def per_image(kind: str, shots: int, field: str) -> float:
        n_train = rows.of(kind, PLANNER, shots, "n_train")
        spent = rows.of(kind, PLANNER, shots, field)
        return float(np.mean([spent[p] / n_train[p] for p in spent]))

    def line(kind: str) -> list[object]:
        most = rows.shots[-1]
        later = list(rows.of(kind, PLANNER, most, "queries_per_prediction").values())
        spent = rows.of(kind, PLANNER, most, "queries").values()
        per = [f"{per_image(kind, most, field):.2f}" for field in ("queries", "images")]
        return [kind, *per, max(spent), f"{np.mean(later):.2f} ({max(later):.2f})"]

    header = ["access", "queries per training image", "views of each", "most queries of a run"]
    header += ["queries per prediction, mean (most)"]
    return table(f"Cost, {rows.shots[-1]} shots", header, map(line, rows.kinds()))


def seconds(rows: Rows) -> str:
    kinds, most = rows.kinds(), rows.shots[-1]
    columns = [rows.of(kind, PLANNER, most, "local_seconds") for kind in kinds]
    sizes = rows.of(kinds[0], PLANNER, most, "n_classes")
    lines: list[list[object]] = []
    for data in rows.data(most):
        times = (average(column, data) for column in columns)
        shown = ("-" if np.isnan(time) else f"{time:.2f}" for time in times)
        lines.append([data, f"{average(sizes, data):.0f} x {most}", *shown])
    header = ["data set", "classes x shots", *kinds]
    return table("Processor seconds of tuning, without the endpoint's own", header, lines)


def choices(rows: Rows) -> str:
    """What was deployed, and how often."""

    def counts(kind: str, shots: int) -> str:
        found = Counter(rows.of(kind, PLANNER, shots, "strategy").values())
        return ", ".join(f"{n} {strategy}" for strategy, n in sorted(found.items()))

    lines = [[kind, *(counts(kind, shots) for shots in rows.shots)] for kind in rows.kinds()]
    return table("What the planner deployed", ["shots", *map(str, rows.shots)], lines)
