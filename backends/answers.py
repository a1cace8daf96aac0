"""Reading the JSON of an answer: every member is checked before it counts for anything."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.errors import ContractError

MOST_BILLED = 1e9  # tokens or USD of one answer


def numbers(value: object, shape: tuple[int | None, ...], what: str) -> NDArray[np.float32]:
    """A nested list of real numbers as an array; null stands for a number left out (NaN).

    Args:
        value: JSON values.
        shape: wanted; None takes any length.
        what: for the message.

    Raises:
        ContractError: another shape, ragged, or not numbers: texts and booleans are none.
    """
    flat: list[float] = []
    found = _measure(value, len(shape), what, flat)
    if any(w is not None and w != g for w, g in zip(shape, found, strict=True)):
        raise wrong(what, f"numbers of shape {shape}", f"shape {found}")
    array = np.array(flat, dtype=np.float64).reshape(found)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _measure(value: object, depth: int, what: str, flat: list[float]) -> tuple[int, ...]:
    """The lengths of a nested list, whose numbers go to `flat`."""
    if not isinstance(value, list):
        raise wrong(what, "a list", type(value).__name__)
    if depth == 1:
        for number in value:
            if number is not None and type(number) not in (int, float):
                raise wrong(what, "numbers", type(number).__name__)
        try:
            flat += [np.nan if number is None else float(number) for number in value]
        except OverflowError:
            raise wrong(what, "numbers within float64", "a larger one") from None
        return (len(value),)
    shapes = {_measure(row, depth - 1, what, flat) for row in value}
    if len(shapes) != 1:
        raise wrong(what, "rows of one length", f"{len(shapes)} different ones")
    return (len(value), *shapes.pop())


def member(data: object, name: str, kind: type | tuple[type, ...] = object) -> Any:
    """A member of a JSON object.

    Raises:
        ContractError: it is no object, has no such member, or of another type.
    """
    if not isinstance(data, dict) or name not in data:
        got = f"members {sorted(data)[:10]}" if isinstance(data, dict) else type(data).__name__
        raise wrong("the answer", f"an object with {name!r}", got)
    value = data[name]
    if not isinstance(value, kind) or (
        isinstance(value, bool) and kind in (int, float, (int, float))
    ):
        raise wrong(f"the answer's {name!r}", f"{kind}", type(value).__name__)
    return value


def billed(amount: object) -> float | None:
    """A number of tokens or USD that an answer reports; None where it is no such number.

    One below zero would refund, and one beyond `MOST_BILLED` is a mistake.
    """
    if not isinstance(amount, int | float) or isinstance(amount, bool):
        return None
    return amount if 0 <= amount <= MOST_BILLED else None


def wrong(what: str, wanted: str, got: str) -> ContractError:
    """The error of an answer that does not have the protocol's form."""
    return ContractError(
        f"{what}: wanted {wanted}, got {got[:200]}; check the endpoint's protocol and declaration"
    )
