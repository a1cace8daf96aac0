"""The table of an audit: what a person fills in, and what a spreadsheet makes of it."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from blackbox_vlm._classes import read_text
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image, quote

_DELIMITERS = ",;\t"  # spreadsheets write what their locale wants


class Row(NamedTuple):
    """An image's cell, what a person wrote beside it, and how messages call the line."""

    image: str
    label: str
    where: str


def cell(image: Image) -> str:
    """How the table names an image: its absolute path, with what is not UTF-8 in it escaped."""
    return os.fsencode(image.path.absolute()).decode("utf-8", "backslashreplace")


def to_table(images: Iterable[Image]) -> bytes:
    """The table to fill in: `path,label`, the labels empty.

    Every cell is quoted and begins with a root (`/`, `C:`), so that no spreadsheet finds a formula
    in it, wherever it parts cells. Beyond ASCII it has the byte order mark that makes Excel read
    UTF-8.
    """
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([("path", "label"), *((cell(image), "") for image in images)])
    made = text.getvalue()
    return made.encode("utf-8" if made.isascii() else "utf-8-sig")


def read_rows(table: Path) -> Iterator[Row]:
    """Rows that are not empty, whatever other columns there are.

    Cells may be parted by commas, semicolons or tabs. Raises InputError, with the line's number
    where there is one: unreadable, not UTF-8, without the two columns, malformed.
    """
    text = read_text(table)
    delimiter, header = _header(text, table)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        next(reader)
        for cells in reader:
            where = f"{quote(table)} line {reader.line_num}"
            if any(cells[len(header) :]):
                raise InputError(
                    f"{where} has more cells than the header; put what holds a {delimiter!r} in"
                    ' "quotes"'
                )
            row = dict(zip(header, cells, strict=False))
            if any(cells):
                yield Row(row.get("path", ""), row.get("label", "").strip(), where)
    except csv.Error as error:
        raise InputError(
            f"{quote(table)} is not valid CSV at or after line {reader.line_num} ({error}); repair"
            " it"
        ) from None


def _header(text: str, table: Path) -> tuple[str, list[str]]:
    """What parts the cells, and the names of the columns."""
    first = next(iter(text.splitlines()), "")
    for delimiter in _DELIMITERS:
        names = [name.strip('" ').lower() for name in first.split(delimiter)]
        if names.count("path") == names.count("label") == 1:
            return delimiter, names
    raise InputError(
        f"{quote(table)} begins with {quote(first)}; wanted the columns path and label"
    )
