"""Places in JSON by dotted path, for endpoints whose requests and answers have a form of their own.

`a.b` is a member of a member, `a.0` the first element of a list, and in an answer `a.*.b` the `b`
of every element.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from blackbox_vlm.errors import ContractError, InputError

from .answers import member, wrong


def put(body: dict[str, Any], path: str, value: object) -> None:
    """Write a value into a JSON object, and make the objects and lists on the way.

    Raises:
        InputError: something else is there already, or a list would get a hole.
    """
    names, here = path.split("."), body
    for name, after in pairwise(names):
        here = _enter(here, name, [] if after.isdecimal() else {}, path)
    if _enter(here, names[-1], value, path) is not value:
        raise InputError(f"two values for {path!r} in the request; give each a place of its own")


def get(data: object, path: str) -> Any:
    """What an answer holds at a path; "" is all of it, `*` makes a list.

    Raises:
        ContractError: there is no such place.
    """
    if not path:
        return data
    name, _, rest = path.partition(".")
    if name != "*":
        return get(_step(data, name), rest)
    if not isinstance(data, list):
        raise wrong("the answer", f"a list for {path!r}", type(data).__name__)
    return [get(element, rest) for element in data]


def optional(data: object, path: str) -> Any:
    """As `get`; None where there is no such place."""
    try:
        return get(data, path)
    except ContractError:
        return None


def _enter(here: Any, name: str, fresh: object, path: str) -> Any:
    """The member or element of that name; `fresh` becomes it where there is none."""
    if isinstance(here, dict):
        return here.setdefault(name, fresh)
    if not isinstance(here, list) or not name.isdecimal() or int(name) > len(here):
        raise InputError(
            f"there is no place for {path!r} in the request; wanted dotted names, and lists filled "
            "in order from 0"
        )
    if int(name) == len(here):
        here.append(fresh)
    return here[int(name)]


def _step(data: object, name: str) -> Any:
    if not isinstance(data, list) or not name.isdecimal():
        return member(data, name)
    if int(name) >= len(data):
        raise wrong("the answer", f"an element {name}", f"{len(data)} elements")
    return data[int(name)]
