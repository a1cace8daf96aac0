"""`audit`: accuracy before and after, from the labels that a person gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from blackbox_vlm.cli_options import PATH, json_option
from blackbox_vlm.console import percent, print_json, print_table, printable, say
from blackbox_vlm.errors import InputError

if TYPE_CHECKING:
    from blackbox_vlm.audit_report import Accuracy, AuditReport


@click.command()
@click.argument("run", type=PATH)
@click.argument("table", type=PATH, required=False)
@json_option
def audit(run: Path, table: Path | None, as_json: bool) -> None:
    """Measure accuracy before and after on the images of RUN that you labelled. Spends nothing.

    `tune --audit K` draws K images into RUN/audit.csv. Write a class name beside each, a single -
    where no class fits, nothing where you cannot tell; TABLE is that file under another name.
    """
    from blackbox_vlm.audit import TABLE_FILE, read, read_labels
    from blackbox_vlm.run_directory import RunDirectory

    directory = RunDirectory(run)
    directory.describe()
    if not directory.result.exists():
        raise InputError(f"{run} is not finished; blackbox-vlm resume {run} first")
    drawn, filled = read(run), table or run / TABLE_FILE
    if not filled.exists():
        raise InputError(
            f"{filled} is missing; give the table that you filled in, or let blackbox-vlm resume "
            f"{run} write an empty one"
        )
    report = drawn.judge(read_labels(drawn, filled))
    if as_json:
        print_json({**dataclasses.asdict(report), "tells_apart": report.tells_apart})
    else:
        show(report)
    for line in warnings(report):
        say(line)


def show(report: AuditReport) -> None:
    """What was measured, and in one line what it means."""
    print_table(
        f"{report.n_labelled} labels, of {report.n_drawn} images drawn from {report.n_pool}",
        [
            ("accuracy before (zero-shot)", _share(report.before)),
            ("accuracy after (adapter)", _share(report.after)),
            ("right only after, only before", f"{report.gained}, {report.lost}"),
            ("no class fits (wrong in both)", f"{report.n_none}"),
        ],
    )
    click.echo(printable(summary(report)))


def summary(report: AuditReport) -> str:
    """The difference in one line."""
    difference, low, high = (
        f"{100 * x:+.1f}" for x in (report.difference, report.low, report.high)
    )
    p = "p < 0.001" if report.p_value < 0.001 else f"p = {report.p_value:.2g}"
    return f"after - before: {difference} points (95 % interval {low} to {high}; {p}, sign test)"


def warnings(report: AuditReport) -> Iterator[str]:
    """What a reader of the numbers should not miss."""
    if blank := report.n_drawn - report.n_labelled:
        yield (
            f"{blank} of {report.n_drawn} images have no label and are left out; if they are the "
            "hard ones, both accuracies are too high."
        )
    if not report.tells_apart:
        yield f"{report.n_labelled} labels cannot tell before and after apart{_needed(report)}."
    elif report.difference < 0:
        yield "The adapter is worse than zero-shot on these images; do not use it for them."


def _needed(report: AuditReport) -> str:
    if report.labels_needed is None:
        return ""
    more = report.labels_needed > report.n_pool
    beyond = f", more than the {report.n_pool} images there are" if more else ""
    return f"; if the difference is what it seems, about {report.labels_needed} would{beyond}"


def _share(accuracy: Accuracy) -> str:
    low, high = percent(accuracy.low), percent(accuracy.high)
    return f"{percent(accuracy.share)} (95 % interval {low} to {high})"
