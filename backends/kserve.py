"""The Open Inference Protocol, version 2, as KServe, Triton and MLServer speak it over REST.

Images and texts are BYTES tensors of shape [n, 1] (pictures in base64), scores one floating-point
tensor [n_images, n_texts], row by row. A model may take soft prompts as an FP32 tensor, which is
added to its own embeddings of the template, or give embeddings instead of scores. Every request has
an id; the echo of another one, or another version of the model, spoils the answer.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal
from urllib.parse import quote as escaped

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.backend import (
    Access,
    Capabilities,
    ImageEmbeddings,
    PromptScores,
    Request,
    ScoreKind,
    TextEmbeddings,
    TextScores,
)
from blackbox_vlm.errors import ContractError, InputError, ModelChanged
from blackbox_vlm.images import quote

from .answers import member, numbers, wrong
from .endpoint import Call, HttpBackend, Reading
from .options import EndpointOptions, SoftOptions, Text
from .transport import Reply

FLOATS = ("FP16", "FP32", "FP64")
_TENSORS = (
    "image_input",
    "text_input",
    "class_input",
    "template_input",
    "offset_input",
    "output",
    "image_output",
    "text_output",
)


class KServeOptions(SoftOptions):
    """The keys of `protocol = "kserve"`; `url` is the root of the server, before `/v2`.

    Attributes:
        version: of the model; left out, the server chooses, and must not change its choice.
        image_input, text_input: names of the tensors that carry images and texts.
        class_input, template_input, offset_input: of those that carry a soft prompt.
        output: of the tensor with the scores.
        image_output, text_output: of those with embeddings.
    """

    score_kind: ScoreKind = ScoreKind.LOGITS
    version: Text | None = None
    access: Literal[Access.SCORES, Access.SOFT, Access.EMBEDDINGS] | None = None
    image_input: Text = "image"
    text_input: Text = "prompts"
    class_input: Text = "class_names"
    template_input: Text = "template"
    offset_input: Text = "offset"
    output: Text = "logits"
    image_output: Text = "image_embeddings"
    text_output: Text = "text_embeddings"


class KServe(HttpBackend):
    """A model behind the V2 inference protocol. Options: `KServeOptions`."""

    Options: ClassVar[type[EndpointOptions]] = KServeOptions

    def __init__(self, *, inner: Any = None, **options: Any) -> None:
        super().__init__(inner=inner, **options)
        self._version: str | None = self.options.version

    def declare(self) -> Capabilities:
        """What the options say.

        Raises:
            InputError: soft prompts are declared in part, or beside another access level.
        """
        access, soft = self.options.soft_access()
        names = " ".join(getattr(self.options, name) for name in _TENSORS)
        conditions = f"version={self.options.version} {names}"
        return self.declared(access=access, soft_prompts=soft, conditions=conditions)

    def encode(self, request: Request) -> Call:
        """Raises InputError: an offset of another shape than declared."""
        body = {
            "id": self.query_key(request),
            "inputs": self._inputs(request),
            "outputs": [{"name": self._output(request)}],
        }
        version = f"/versions/{escaped(self.options.version, '')}" if self.options.version else ""
        path = f"/v2/models/{escaped(self.options.model, '')}{version}/infer"
        return Call(body, path)

    def decode(self, reply: Reply, request: Request) -> Reading:
        """The tensor that was asked for, from the model that was asked."""
        model = member(reply.data, "model_name", str)
        self._check_id(reply.data, request)
        self._check_version(reply.data)
        output = _named(member(reply.data, "outputs", list), self._output(request))
        return Reading(_array(output, request.answer_shape), model)

    def _inputs(self, request: Request) -> list[dict[str, Any]]:
        options = self.options
        match request:
            case TextScores():
                return [self._images(request), _texts(options.text_input, request.texts)]
            case PromptScores():
                return [
                    self._images(request),
                    _texts(options.class_input, request.class_names),
                    _texts(options.template_input, (request.template,)),
                    self._offset(request.offset),
                ]
            case TextEmbeddings():
                return [_texts(options.text_input, request.texts)]
            case _:
                return [self._images(request)]

    def _images(self, request: Any) -> dict[str, Any]:
        uploads = tuple(self.uploads.base64(image) for image in request.images)
        return _texts(self.options.image_input, uploads)

    def _offset(self, offset: NDArray[np.float32]) -> dict[str, Any]:
        shape = [self.options.context_tokens, self.options.width]
        if list(offset.shape) != shape:
            raise InputError(f"a soft prompt of shape {offset.shape}; this endpoint takes {shape}")
        data = offset.ravel().tolist()
        name = self.options.offset_input
        return {"name": name, "shape": shape, "datatype": "FP32", "data": data}

    def _output(self, request: Request) -> str:
        if isinstance(request, ImageEmbeddings):
            return str(self.options.image_output)
        if isinstance(request, TextEmbeddings):
            return str(self.options.text_output)
        return str(self.options.output)

    def _check_id(self, data: dict[str, object], request: Request) -> None:
        own = self.query_key(request)
        if data.get("id") not in (None, "", own):  # Triton leaves it out, others echo it
            raise ContractError(
                "the answer's id is that of another request; the endpoint, or what is between, "
                "mixes answers up. Ask for fewer at a time (concurrency = 1)"
            )

    def _check_version(self, data: dict[str, object]) -> None:
        if data.get("model_version") is None:
            return
        said = member(data, "model_version", str)
        self._version = self._version or said
        if said != self._version:
            raise ModelChanged(
                f"version {quote(said)} of the model answered, {self._version!r} was asked for or "
                "answered before; their scores are not comparable. Declare the version",
                final=True,
            )


def _texts(name: str, values: tuple[str, ...]) -> dict[str, Any]:
    """A BYTES tensor [n, 1]."""
    return {"name": name, "shape": [len(values), 1], "datatype": "BYTES", "data": list(values)}


def _named(outputs: list[Any], name: str) -> Any:
    """The output of that name; there must be one."""
    found = [output for output in outputs if member(output, "name", str) == name]
    if len(found) != 1:
        raise wrong("the answer's outputs", f"one named {name!r}", f"{len(found)}")
    return found[0]


def _array(output: object, shape: tuple[int | None, ...]) -> NDArray[np.float32]:
    """A floating-point tensor: flat in row-major order or, as the protocol allows, nested."""
    datatype = member(output, "datatype", str)
    if datatype not in FLOATS:
        raise wrong("the output's datatype", f"one of {', '.join(FLOATS)}", repr(datatype))
    said = tuple(member(output, "shape", list))
    fits = len(said) == len(shape) and all(
        type(length) is int and length > 0 and wanted in (None, length)
        for length, wanted in zip(said, shape, strict=True)
    )
    if not fits:
        raise wrong("the output's shape", f"{shape}", f"{said}")
    data = member(output, "data", list)
    nested = bool(data) and isinstance(data[0], list)
    flat = said if nested else (math.prod(said),)
    return numbers(data, flat, "the output's data").reshape(said)
