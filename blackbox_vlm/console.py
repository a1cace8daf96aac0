"""What people see: lines, tables, JSON, CSV; and how they stop a run."""

from __future__ import annotations

import csv
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Self

import click

from blackbox_vlm.errors import InputError


def say(line: str) -> None:
    """A line for people, on stderr."""
    click.echo(printable(line), err=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout, ASCII, without NaN."""
    click.echo(json.dumps(value, ensure_ascii=True, allow_nan=False))


def print_csv(rows: list[dict[str, Any]]) -> None:
    """Rows of equal columns on stdout."""
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _inert(value) for name, value in row.items()})


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Two columns on stdout; nothing in them is read as markup or as terminal control."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(Text(printable(name)), Text(printable(value), overflow="fold"))
    Console(markup=False, highlight=False).print(table)


def percent(fraction: float | None) -> str:
    """A fraction for people."""
    return "not measured" if fraction is None else f"{100 * fraction:.1f} %"


def usd(amount: float | None) -> str:
    """A sum of money for people; None where the endpoint declares no price."""
    return "price unknown" if amount is None else f"{amount:g} USD"


def queries(count: int) -> str:
    """A number of queries for people."""
    return "1 query" if count == 1 else f"{count} queries"


def _inert(value: object) -> object:
    """A cell that no terminal takes for control and no spreadsheet for a formula."""
    if not isinstance(value, str):
        return value
    visible = printable(value)
    return "'" + visible if visible.startswith(("=", "+", "-", "@")) else visible


def printable(text: str) -> str:
    """Text with control, bidi and undecodable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class StopSignals:
    """The first Ctrl-C or SIGTERM asks for a clean stop, the second stops at once."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._asked = threading.Event()
        self._old: dict[int, Any] = {}

    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked.is_set()

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if error is not None and self._resumable(error):
            error.add_note(f"Go on with: blackbox-vlm resume {self._run}")

    def _resumable(self, error: BaseException) -> bool:
        """Whether the run had begun, and goes on if nothing else is given."""
        from blackbox_vlm.run_directory import RunDirectory

        return RunDirectory(self._run).exists and not isinstance(error, InputError)

    def _handle(self, number: int, frame: object) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()
        say("Stopping after what is in flight; once more stops at once.")
