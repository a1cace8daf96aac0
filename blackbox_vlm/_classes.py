"""Class names and templates: what is accepted, and the files that give them.

A name is text and nothing else: it is never parsed as YAML, never passed to `str.format`, so `no`,
`012`, `22:30` and `{0.__class__}` are names like any other. Refused are characters that a reader
cannot see (control, bidi, zero-width): they can hide text from people and show it to a model.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blackbox_vlm.errors import InputError
from blackbox_vlm.images import quote, read_file

DEFAULT_TEMPLATE = "a photo of a {}."
MAX_CLASSES = 20_000
MAX_NAME = 100
MAX_TEMPLATE = 200

# Control, format (bidi and zero-width among them), lone surrogates, line and paragraph separators.
_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Unicode's Default_Ignorable_Code_Point outside those categories: fillers and variation selectors.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
    + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
)


class Line(NamedTuple):
    """One class of a file: the folder (or CSV label) it stands for, and its name."""

    source: str
    name: str


class Meta(NamedTuple):
    """What a `meta.json` gives; None for what it leaves open."""

    lines: tuple[Line, ...] | None
    template: str | None


def spaced(folder: str) -> str:
    """A folder's name as a class name: underscores read as spaces."""
    return folder.replace("_", " ").strip()


def fold(name: str) -> str:
    """Key under which two spellings are the same: case, Unicode form, underscore or space."""
    folded = unicodedata.normalize("NFC", spaced(name)).casefold()
    return unicodedata.normalize("NFC", folded)


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in NFC, stripped. Raises InputError: a name or their number is not allowed."""
    checked = tuple(_check_name(name) for name in names)
    if not 2 <= len(checked) <= MAX_CLASSES:
        raise InputError(
            f"got {len(checked)} class(es); at least two are needed to tell apart, at most"
            f" {MAX_CLASSES} are taken"
        )
    check_distinct(checked, "class names")
    return checked


def check_distinct(names: Iterable[str], what: str) -> None:
    """Raises InputError: two of them have one `fold`."""
    seen: dict[str, str] = {}
    for name in names:
        key = fold(name)
        if key in seen:
            raise InputError(
                f"the {what} {seen[key]!a} and {name!a} differ at most in case, Unicode form or"
                " underscores; rename one"
            )
        seen[key] = name


def _check_name(name: str) -> str:
    if not isinstance(name, str):
        raise InputError(f"got the class name {quote(name)}, not text; write it in quotes")
    text = unicodedata.normalize("NFC", name).strip()
    if not 1 <= len(text) <= MAX_NAME:
        raise InputError(
            f"the class name {quote(name[:40])} has {len(text)} characters; wanted 1 to {MAX_NAME}:"
            " give a shorter name for it"
        )
    _check_visible(text, "class name")
    return text


def _check_visible(text: str, what: str) -> None:
    for char in text:
        if unicodedata.category(char) in _INVISIBLE_CATEGORIES or char in _INVISIBLE:
            raise InputError(
                f"the {what} {quote(text)} holds the invisible character U+{ord(char):04X};"
                " remove it"
            )


def check_template(template: str) -> str:
    """The template itself. Raises InputError: not exactly one "{}", too long, or invisible text."""
    if template.count("{}") != 1:
        raise InputError(
            f'the template {quote(template)} must hold "{{}}" exactly once, where the class name'
            f" goes; for example {DEFAULT_TEMPLATE!r}"
        )
    if len(template) > MAX_TEMPLATE:
        raise InputError(
            f"the template has {len(template)} characters; wanted at most {MAX_TEMPLATE}; shorten"
            " it"
        )
    _check_visible(template, "template")
    return template


def match(lines: Sequence[Line], folders: Sequence[str], origin: str) -> dict[str, str]:
    """Folder -> class name in label order, one to one.

    A line names its folder exactly, or up to case, Unicode form, and underscore or space. Raises
    InputError: a line without a folder, a folder without a line, or one named twice.
    """
    by_key = {fold(folder): folder for folder in folders}
    matched: dict[str, str] = {}
    for line in lines:
        folder = by_key.get(fold(line.source))
        if folder is None:
            raise InputError(
                f"{origin} names {quote(line.source)}, which no class folder matches (a class"
                " without images?); add the folder or remove the line"
            )
        if folder in matched:
            raise InputError(f"{origin} names the folder {quote(folder)} twice; remove one line")
        matched[folder] = line.name
    missing = [folder for folder in folders if folder not in matched]
    if missing:
        raise InputError(
            f"{origin} has no line for the folder {quote(missing[0])} ({len(missing)} such); add a"
            " line for it or move it away"
        )
    return matched


def read_classes(path: Path) -> tuple[Line, ...]:
    """Classes of a text file in label order; each line `folder,class name` or just a class name.

    Blank lines and lines that begin with # are skipped. Raises InputError: unreadable, not UTF-8,
    or a line with more than two fields.
    """
    stripped = (line.strip() for line in read_text(path).split("\n"))
    kept = [(n, line) for n, line in enumerate(stripped, 1) if line and not line.startswith("#")]
    if len(kept) > MAX_CLASSES:
        raise InputError(
            f"{quote(path)} has {len(kept)} classes; at most {MAX_CLASSES} are taken: merge some"
        )
    return tuple(_line(text, f"{quote(path)} line {n}") for n, text in kept)


def _line(text: str, where: str) -> Line:
    try:
        fields = next(csv.reader([text], strict=True)) if "," in text else [text]
    except csv.Error:  # quotes that are no CSV: the line is a name that holds them
        fields = [text]
    if len(fields) > 2:
        raise InputError(
            f"{where} has {len(fields)} fields; wanted `folder,class name` or a class name: put a"
            ' name that holds a comma in "quotes"'
        )
    return Line(fields[0].strip(), fields[-1].strip())


def read_text(path: Path) -> str:
    """A text file, with or without a byte order mark. Raises InputError: unreadable, not UTF-8."""
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{quote(path)} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def read_meta(folders: Iterable[Path]) -> tuple[str, Meta]:
    """The first `meta.json` in the folders: how messages call it, and what it gives.

    Raises InputError: not JSON, or `classnames`, `class_dirs`, `prompt_template` of another type.
    """
    path = next((f / "meta.json" for f in folders if (f / "meta.json").exists()), None)
    if path is None:
        return "", Meta(None, None)
    try:
        loaded = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{quote(path)} is not valid JSON; repair or remove it") from None
    return quote(path), _meta(loaded if isinstance(loaded, dict) else {}, quote(path))


def _meta(loaded: Mapping[str, Any], where: str) -> Meta:
    names = _texts(loaded, "classnames", where)
    sources = _texts(loaded, "class_dirs", where)
    template = loaded.get("prompt_template")
    if not isinstance(template, str | None):
        raise InputError(f"{where}: prompt_template must be text; write it in quotes")
    if names is None:
        return Meta(None, template)
    if sources is not None and len(sources) != len(names):
        raise InputError(
            f"{where} has {len(names)} classnames and {len(sources)} class_dirs; wanted one folder"
            " per name"
        )
    return Meta(tuple(map(Line, sources or names, names)), template)


def _texts(loaded: Mapping[str, Any], key: str, where: str) -> list[str] | None:
    values = loaded.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: {key} must be a list of texts; write every name in quotes")
    return values
