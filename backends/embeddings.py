"""Vectors of images and of texts: OpenAI's embeddings route, and the services that differ from it.

One request asks for images or for texts, never for both. What a service wants written and where it
puts its vectors is a dialect, see `_dialects`; the classifier on top of the vectors is our own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from blackbox_vlm.backend import Access, Capabilities, ImageEmbeddings, Request, TextEmbeddings
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image

from ._dialects import BYTES, Dialect, Item, Shape, fill, find, named, vector
from ._mapping import get, optional
from .answers import wrong
from .endpoint import Call, HttpBackend, Reading
from .options import Count, EndpointOptions, Scale
from .transport import Reply


class EmbeddingsOptions(EndpointOptions):
    """The keys of an embeddings endpoint.

    `url` is the route itself, such as https://host/v1/embeddings. The dialect says how many images
    and texts a request may carry, unless the file does.

    Attributes:
        dialect: a name in `dialects.toml`, or a table of the same form.
        encoding_format: how vectors are asked for; base64 is a third of the bytes. Both are read.
        dimensions: of the vectors, where the model can shorten them.
        logit_scale: turns cosines into logits; 100 for CLIP.
    """

    dialect: Annotated[Dialect, BeforeValidator(named)] = Field(
        default="openai", validate_default=True
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    logit_scale: Scale = 100.0


class Embeddings(HttpBackend):
    """A backend that embeds images and texts in one space. See `HttpBackend`.

    Raises:
        InputError: also where the dialect cannot say what an option asks for.
    """

    Options: ClassVar[type[EndpointOptions]] = EmbeddingsOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._width: int | None = self.options.dimensions

    def declare(self) -> Capabilities:
        """Embeddings, within the limits of the dialect."""
        dialect = self.options.dialect
        for name in ("encoding_format", "dimensions"):
            if name in self.options.model_fields_set and f"${name}" not in dialect.markers:
                raise InputError(f"this dialect has no place for {name}; leave it out")
        return self.declared(
            access=Access.EMBEDDINGS,
            logit_scale=self.options.logit_scale,
            images_per_request=self._limit("images_per_request", dialect.images),
            texts_per_request=self._limit("texts_per_request", dialect.texts),
            conditions=f"dimensions={self.options.dimensions} dialect={self._fingerprint()}",
        )

    def encode(self, request: Request) -> Call:
        """The dialect's body for the images or texts."""
        shape, items = self._shape(request), self._items(request)
        options = {
            "$model": self.options.model,
            "$encoding_format": self.options.encoding_format,
            "$dimensions": self.options.dimensions,
        }
        raw = {"content-type": "application/octet-stream"} if shape.body == BYTES else {}
        return Call(fill(shape.body, options, items), shape.path, raw)

    def decode(self, reply: Reply, request: Request) -> Reading:
        """Vectors in the order of what was asked, of one width from the first answer on."""
        shape, data = self._shape(request), reply.data
        count = request.n_images + request.n_texts
        values = _matrix(find(data, shape.vectors), count)
        if shape.index:
            values = values[np.argsort(_places(find(data, shape.index), count))]
        self._check_width(values.shape[1])
        return Reading(values, _model(data, shape.model), optional(data, shape.tokens))

    def _limit(self, name: str, shape: Shape) -> int | None:
        """What one request may carry: as the endpoint's file says, else as the dialect does."""
        given = name in self.options.model_fields_set
        limit: int = getattr(self.options, name) if given else shape.per_request
        if limit != 1 and not shape.takes_many:
            raise InputError(f"{name} is {limit}; this dialect has place for one, leave it out")
        return limit or None

    def _fingerprint(self) -> str:
        """What else decides an answer: how items are written, and where vectors are found."""
        shapes = (self.options.dialect.images, self.options.dialect.texts)
        asked = [(shape.path, shape.body, shape.vectors) for shape in shapes]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]

    def _shape(self, request: Request) -> Shape:
        dialect: Dialect = self.options.dialect
        return dialect.images if isinstance(request, ImageEmbeddings) else dialect.texts

    def _items(self, request: Request) -> list[Item]:
        if isinstance(request, ImageEmbeddings):
            return [self._image(image) for image in request.images]
        if isinstance(request, TextEmbeddings):
            return [_text(text) for text in request.texts]
        raise InputError(f"{type(request).__name__} asks for no embeddings")

    def _image(self, image: Image) -> Item:
        def write(marker: str) -> str | bytes:
            if marker == "$data_uri":
                return self.uploads.data_uri(image)
            text = self.uploads.base64(image)
            return base64.b64decode(text) if marker == BYTES else text

        return write

    def _check_width(self, width: int) -> None:
        """One width for all vectors, or no image could be compared with a text."""
        if self._width is None:
            self._width = width
        if width != self._width:
            raise wrong("an embedding", f"{self._width} dimensions as before", str(width))


def _text(text: str) -> Item:
    return lambda marker: text


def _matrix(found: list[Any], count: int) -> NDArray[np.float32]:
    """`(count, dim)` float32, finite."""
    if len(found) != count:
        raise wrong("the answer", f"{count} embeddings", str(len(found)))
    rows = [vector(value) for value in found]
    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths:
        raise wrong("the embeddings", "one width above zero", f"{sorted(widths)}")
    values = np.stack(rows)
    if not np.isfinite(values).all():
        raise wrong("the embeddings", "finite numbers", "null, or a number beyond float32")
    return values


def _places(found: list[Any], count: int) -> list[int]:
    """Which item each vector belongs to: every one once."""
    whole = all(type(place) is int for place in found)
    if not whole or sorted(found) != list(range(count)):
        raise wrong("the embeddings' index", f"0 to {count - 1}, each once", repr(found[:10]))
    return found


def _model(data: object, path: str) -> str | None:
    if not path:
        return None
    model = get(data, path)
    if not isinstance(model, str):
        raise wrong(f"the answer's {path}", "a name", type(model).__name__)
    return model
