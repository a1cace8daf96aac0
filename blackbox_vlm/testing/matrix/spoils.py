"""Right answers made wrong: the faults of a server that answers, for any protocol that speaks JSON.

The scores of an answer are found by their form: a list of objects with a `score`, or else the
longest list of numbers. Labels are the member `label` of objects in a list. A protocol that looks
otherwise overrides `FaultMatrix.spoil`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Slot = tuple[Any, Any]  # a list or an object, and where in it a number stands

_LITERALS = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "1e999": "1e999",
    "text": '"0.5"',
    "true": "true",
    "null": "null",
    "-0.0": "-0.0",
    "5000 digits": "7" * 5000,
}
_MARK = "\0here"


def spoil(body: bytes, fault: str) -> bytes | None:
    """The body of a right answer with one fault, or None where this form of answer has none."""
    data = json.loads(body)
    if fault in _LITERALS:
        return _with_first(data, _LITERALS[fault])
    if fault == "a name twice":
        return body.replace(b"{", b'{"twice": 1, "twice": 2, ', 1) if b"{" in body else None
    return json.dumps(data).encode() if _CHANGES[fault](data) else None


def _with_first(data: Any, literal: str) -> bytes | None:
    """The first score as these characters, which need not be JSON."""
    slots = _scores(data)
    if not slots:
        return None
    container, place = slots[0]
    container[place] = _MARK
    return json.dumps(data).replace(json.dumps(_MARK), literal).encode()


# -- where things are ---------------------------------------------------------------------------


def _lists(data: Any) -> Iterator[list[Any]]:
    if isinstance(data, list):
        yield data
    inner = data if isinstance(data, list) else data.values() if isinstance(data, dict) else ()
    for value in inner:
        yield from _lists(value)


def _longest(data: Any, member: Callable[[Any], bool]) -> list[Any]:
    """The longest list of which every element passes, the first one of several; or an empty one."""
    fitting = (items for items in _lists(data) if items and all(map(member, items)))
    return max(fitting, key=len, default=[])


def _scores(data: Any) -> list[Slot]:
    named = _longest(data, lambda item: isinstance(item, dict) and "score" in item)
    if named:
        return [(item, "score") for item in named]
    numbers = _longest(data, lambda item: isinstance(item, float))
    return [(numbers, place) for place in range(len(numbers))]


def _labelled(data: Any) -> list[Any]:
    return _longest(
        data, lambda item: isinstance(item, dict) and isinstance(item.get("label"), str)
    )


def _items(data: Any) -> list[Any]:
    """Objects that say themselves where they belong, by a label or an index."""
    indexed = _longest(data, lambda item: isinstance(item, dict) and "index" in item)
    return _labelled(data) or indexed


# -- changes in place; False where there is nothing to change -----------------------------------


def _rescore(change: Callable[[list[float]], list[float]]) -> Callable[[Any], bool]:
    def apply(data: Any) -> bool:
        slots = _scores(data)
        values = change([container[place] for container, place in slots]) if slots else []
        for (container, place), value in zip(slots, values, strict=True):
            container[place] = value
        return bool(slots)

    return apply


def _relabel(change: Callable[[list[str]], list[str]]) -> Callable[[Any], bool]:
    def apply(data: Any) -> bool:
        items = _labelled(data)
        labels = change([item["label"] for item in items]) if items else []
        for item, label in zip(items, labels, strict=True):
            item["label"] = label
        return bool(items)

    return apply


def _resize(change: Callable[[list[Any]], object]) -> Callable[[Any], bool]:
    """Change the list of the objects with scores, or that of the scores themselves."""

    def apply(data: Any) -> bool:
        items = [container for container, _ in _scores(data)]
        if items:
            change(_longest(data, lambda item: item in items) or items[0])
        return bool(items)

    return apply


def _reordered(data: Any) -> bool:
    items = _items(data)
    items.reverse()
    return len(items) > 1


def _extra(data: Any) -> bool:
    items = _labelled(data)
    items += [item | {"label": item["label"] + " or so"} for item in items[-1:]]
    return bool(items)


def _missing(data: Any) -> bool:
    items = _labelled(data)
    found = bool(items)
    del items[-1:]
    return found


def _of_another_request(data: Any) -> bool:
    """Its labels are others, or its places go on where the last request ended."""
    if _relabel(lambda labels: [f"another {label}" for label in labels])(data):
        return True
    items = _items(data)
    for item in items:
        item["index"] += len(items)
    return bool(items)


def _other_model(data: Any) -> bool:
    members = data if isinstance(data, dict) else {}
    names = members.keys() & {"model", "model_id", "model_name"}
    for name in names:
        members[name] = f"{members[name]}-2"
    return bool(names)


_CHANGES: dict[str, Callable[[Any], bool]] = {
    "too short": _resize(lambda items: items.pop()),
    "too long": _resize(lambda items: items.append(items[-1])),
    "reordered": _reordered,
    "label missing": _missing,
    "label renamed": _relabel(lambda labels: [labels[0] + "s", *labels[1:]]),
    "label doubled": _relabel(lambda labels: [labels[-1], *labels[1:]]),
    "label extra": _extra,
    "label in capitals": _relabel(lambda labels: [labels[0].upper(), *labels[1:]]),
    "sum of 0.7": _rescore(lambda scores: [0.7 * score for score in scores]),
    "negative": _rescore(lambda scores: [-0.2, *scores[1:-1], scores[-1] + scores[0] + 0.2]),
    "times 100": _rescore(lambda scores: [100 * score for score in scores]),
    "all equal": _rescore(lambda scores: [1 / len(scores)] * len(scores)),
    "noisy": _rescore(lambda scores: [1.001 * scores[0], *scores[1:]]),
    "of another request": _of_another_request,
    "other model": _other_model,
}
