"""JSON from a stranger: depth, numbers and duplicate names are bounded before anything is used."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_DEPTH = 32
MAX_DIGITS = 400  # of a number; float64 needs far fewer

_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def parse_json(body: bytes) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        ValueError: not JSON, deeper than `MAX_DEPTH`, a name twice in one object, a number that is
            no finite number or longer than `MAX_DIGITS`; the message quotes nothing of the body.
    """
    if body.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it starts with a byte order mark")
    _check_depth(body)
    try:
        return json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos}") from None


def _check_depth(body: bytes) -> None:
    depth = 0
    for match in _STRUCTURE.finditer(body):
        mark = match[0]
        if mark in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH}")
        elif mark in b"]}":
            depth -= 1


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number")


def _finite(digits: str) -> float:
    value = float(_short(digits))
    if not math.isfinite(value):
        raise ValueError("it holds a number beyond float64")
    return value


def _bounded(digits: str) -> int:
    return int(_short(digits))


def _short(digits: str) -> str:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds a number of more than {MAX_DIGITS} digits")
    return digits


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names a member twice in one object")
    return found
