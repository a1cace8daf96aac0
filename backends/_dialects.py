"""What differs between embedding services, as data: how items are written, where vectors are.

A dialect is two `Shape`s, one for images and one for texts; those that have a name are in
`dialects.toml`. A request is written by `fill`, an answer read by `find` and `vector`.
"""

from __future__ import annotations

import base64
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue, model_validator

from ._mapping import get
from .answers import numbers, wrong
from .options import Options, Text

EACH = "$each"
BYTES = "$bytes"
OF_OPTIONS = frozenset({"$model", "$encoding_format", "$dimensions"})
OF_IMAGES = frozenset({"$data_uri", "$base64"})
OF_TEXTS = frozenset({"$text"})

Item = Callable[[str], Any]  # a marker -> what one image or text is under it
_UNSET = object()


class Shape(Options):
    """How one kind of item is asked for, and where an answer has what.

    The four places are paths in the answer, see `_mapping`; an empty one says that the answer does
    not tell.

    Attributes:
        body: JSON to send, with markers: `$model`, `$encoding_format` and `$dimensions` are the
            endpoint's options, and a member is left out while its option is not set; `$text`, or
            `$data_uri` and `$base64` of a picture, is the item; an object `{"$each": X}` is the
            list of X for every item. `$bytes` instead of an object sends the picture itself.
        path: appended to the endpoint's URL.
        per_request: items, at most; 0 for no limit.
        vectors: lists of numbers, or little-endian float32 in base64.
        index: where each vector belongs among the items.
        model: which model spoke.
        tokens: that are billed.
    """

    body: dict[str, JsonValue] | Literal["$bytes"]
    path: str = ""
    per_request: int = Field(default=1, ge=0)
    vectors: Text = "data.*.embedding"
    index: str = "data.*.index"
    model: str = "model"
    tokens: str = "usage.total_tokens"

    @property
    def takes_many(self) -> bool:
        """Whether one request may carry more than one item."""
        return EACH in self.markers

    @property
    def markers(self) -> frozenset[str]:
        """Everything in the body that is not sent as it stands."""
        return frozenset(_markers(self.body))


class Dialect(Options):
    """A service's two shapes."""

    images: Shape
    texts: Shape

    @model_validator(mode="after")
    def _check(self) -> Dialect:
        if self.images.body != BYTES:
            _check_markers(self.images, OF_IMAGES, "images")
        _check_markers(self.texts, OF_TEXTS, "texts")
        return self

    @property
    def markers(self) -> frozenset[str]:
        """The options that it sends with both images and texts."""
        return self.images.markers & self.texts.markers & OF_OPTIONS


def named(value: object) -> object:
    """A dialect by its name; anything but a name is left alone.

    Raises:
        ValueError: there is no such name.
    """
    if not isinstance(value, str):
        return value
    known = _known()
    if value not in known:
        raise ValueError(f"wanted one of {', '.join(known)}, or tables images and texts")
    return known[value]


@cache
def _known() -> dict[str, Dialect]:
    text = (files(__package__) / "dialects.toml").read_text(encoding="utf-8")
    return {name: Dialect(**tables) for name, tables in tomllib.loads(text).items()}


def _check_markers(shape: Shape, of_items: frozenset[str], kind: str) -> None:
    """An image never travels with a text: Titan would answer their average."""
    used = shape.markers
    if strange := used - of_items - OF_OPTIONS - {EACH}:
        raise ValueError(f"{', '.join(sorted(strange))} cannot be in the body of {kind}")
    if not used & of_items:
        raise ValueError(f"the body of {kind} wants {' or '.join(sorted(of_items))} somewhere")


def _markers(template: object) -> Iterator[str]:
    if isinstance(template, dict):
        if EACH in template and len(template) > 1:
            raise ValueError(f"{EACH} stands alone in its object, got {sorted(template)}")
        yield from {EACH} & template.keys()
        template = list(template.values())
    if isinstance(template, list):
        for part in template:
            yield from _markers(part)
    elif isinstance(template, str) and template.startswith("$"):
        yield template


def fill(template: Any, options: Mapping[str, object], items: Sequence[Item]) -> Any:
    """Write a request: the template with its markers replaced; what is put in is not read again.

    Args:
        template: a `Shape.body`.
        options: a marker -> its value; None where it is not set.
        items: one, unless the template says `$each`.
    """
    if isinstance(template, dict):
        if EACH in template:
            return [fill(template[EACH], options, [item]) for item in items]
        filled = {name: fill(part, options, items) for name, part in template.items()}
        kept = {name: part for name, part in filled.items() if part is not _UNSET}
        return kept if kept or not filled else _UNSET
    if isinstance(template, list):
        parts = [fill(part, options, items) for part in template]
        return [part for part in parts if part is not _UNSET]
    if not isinstance(template, str) or not template.startswith("$"):
        return template
    if template in options:
        value = options[template]
        return _UNSET if value is None else value
    (item,) = items
    return item(template)


def find(data: object, path: str) -> list[Any]:
    """The values at a place in an answer: one, unless the path has a `*`.

    Raises:
        ContractError: the answer has no such place.
    """
    found = get(data, path)
    return found if "*" in path.split(".") else [found]


def vector(value: object) -> NDArray[np.float32]:
    """An embedding, `(dim,)` float32, from a list of numbers or from base64.

    Raises:
        ContractError: it is neither.
    """
    if not isinstance(value, str):
        return numbers(value, (None,), "an embedding")
    try:
        data = base64.b64decode(value, validate=True)
    except ValueError:
        raise wrong("an embedding", "numbers or base64", "another text") from None
    if len(data) % 4:
        raise wrong("an embedding", "base64 of float32", f"{len(data)} bytes")
    return np.frombuffer(data, dtype="<f4").astype(np.float32)
