"""The KServe V2 shape (Triton, MLServer): named tensors in, the tensor `logits` out.

Scores take `image` and `prompts`; soft prompts take `image`, `class_names`, `template` and
`offset` (FP32). Images are base64 in BYTES tensors. Data is flat, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from blackbox_vlm.backend import Access, Array, PromptScores, Request, TextScores
from blackbox_vlm.images import Image

from .billing import Usage
from .refusal import Refusal
from .service import Question, Service, plain
from .settings import MAX_IMAGES, MAX_TEXT, MAX_TEXTS
from .wire import PROBLEMS, Foreign, IdempotencyKey, check_offset, check_template, new_router

MAX_NUMBERS = 65536
OUTPUT = "logits"
SCORES = frozenset({"image", "prompts"})
SOFT = frozenset({"image", "class_names", "template", "offset"})


class Tensor(Foreign):
    """A named tensor; the product of `shape` is the length of `data`."""

    name: Annotated[str, Field(max_length=64)]
    shape: Annotated[
        list[Annotated[int, Field(ge=1, le=MAX_NUMBERS)]], Field(min_length=1, max_length=2)
    ]
    datatype: Literal["BYTES", "FP32"]
    data: (
        Annotated[list[str], Field(max_length=MAX_TEXTS)]
        | Annotated[list[float], Field(max_length=MAX_NUMBERS)]
    )


class Wanted(Foreign):
    """An output that is asked for; there is one."""

    name: Literal["logits"]


class Asked(Foreign):
    """An inference request."""

    id: Annotated[str, Field(max_length=255)] | None = None
    inputs: Annotated[list[Tensor], Field(min_length=2, max_length=4)]
    outputs: Annotated[list[Wanted], Field(max_length=1)] | None = None


class Output(Foreign):
    """The scores, (images, texts) row by row; null for what is withheld."""

    name: Literal["logits"]
    shape: list[int]
    datatype: Literal["FP32"]
    data: list[float | None]


class Told(Foreign):
    """An inference answer."""

    model_name: str
    id: str | None = None
    outputs: list[Output]


class Health(Foreign):
    """Whether the server takes requests."""

    live: bool = True
    ready: bool = True


class About(Foreign):
    """Name and shape of a tensor; -1 is any length."""

    name: str
    datatype: str
    shape: list[int]


class Metadata(Foreign):
    """What the model takes and gives."""

    name: str
    platform: str
    inputs: list[About]
    outputs: list[About]


def routes(service: Service) -> APIRouter:
    """The routes that the access level gives."""
    router = new_router("/v2")
    if not service.gives(Access.SCORES, Access.SOFT):
        return router

    @router.post("/models/{model:path}/infer", response_model=Told, responses=PROBLEMS)
    async def infer(
        model: str, asked: Asked, http: HttpRequest, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """Scores for every image and every prompt."""
        service.check_model(model)
        return await service.answer(http, _question(asked, service))

    @router.get("/models/{model:path}", response_model=Metadata, responses=PROBLEMS)
    async def metadata(model: str) -> Metadata:
        """What the model takes and gives; free."""
        service.check_model(model)
        return _metadata(service)

    return router


def health() -> APIRouter:
    """The routes that need no token and no access level."""
    router = new_router("/v2/health")

    @router.get("/live", response_model=Health, responses=PROBLEMS)
    @router.get("/ready", response_model=Health, responses=PROBLEMS)
    async def serving() -> Health:
        """Whether the server takes requests; free, and without a token."""
        return Health()

    return router


def _metadata(service: Service) -> Metadata:
    texts = ("class_names", "template") if service.gives(Access.SOFT) else ()
    inputs = [About(name=n, datatype="BYTES", shape=[-1, 1]) for n in ("image", "prompts", *texts)]
    if (soft := service.offer.soft_prompts) is not None:
        shape = [soft.context_tokens, soft.width]
        inputs.append(About(name="offset", datatype="FP32", shape=shape))
    outputs = [About(name=OUTPUT, datatype="FP32", shape=[-1, -1])]
    return Metadata(
        name=service.offer.model_id, platform="blackbox-vlm", inputs=inputs, outputs=outputs
    )


def _question(asked: Asked, service: Service) -> Question:
    tensors = {tensor.name: tensor for tensor in asked.inputs}
    kinds = [SCORES, SOFT] if service.gives(Access.SOFT) else [SCORES]
    if tensors.keys() not in kinds or len(tensors) != len(asked.inputs):
        wanted = " or ".join(", ".join(sorted(kind)) for kind in kinds)
        raise Refusal(422, f"wanted the inputs {wanted}, each once")
    images = _strings(tensors["image"], MAX_IMAGES, None)
    asks = _asks_soft(tensors, service) if "offset" in tensors else _asks_scores(tensors)

    def write(values: list[Array], usage: Usage) -> dict[str, Any]:
        data = plain(values[0].reshape(-1), service.offer.decimals)
        output = {"name": OUTPUT, "shape": list(values[0].shape), "datatype": "FP32", "data": data}
        named = {} if asked.id is None else {"id": asked.id}
        return {"model_name": service.offer.model_id, **named, "outputs": [output]}

    return Question(images, asks, write)


def _asks_scores(tensors: dict[str, Tensor]) -> Callable[[tuple[Image, ...]], list[Request]]:
    texts = tuple(_strings(tensors["prompts"], MAX_TEXTS, MAX_TEXT))
    return lambda images: [TextScores(images, texts)]


def _asks_soft(
    tensors: dict[str, Tensor], service: Service
) -> Callable[[tuple[Image, ...]], list[Request]]:
    names = tuple(_strings(tensors["class_names"], MAX_TEXTS, MAX_TEXT))
    [template] = _strings(tensors["template"], 1, MAX_TEXT)
    offset = check_offset(_floats(tensors["offset"]), service.offer.soft_prompts)
    template = check_template(template)
    return lambda images: [PromptScores(images, names, template, offset)]


def _strings(tensor: Tensor, most: int, longest: int | None) -> list[str]:
    _check_form(tensor, "BYTES", str)
    data = [text for text in tensor.data if isinstance(text, str)]
    if len(data) > most:
        raise Refusal(422, f"{tensor.name} has {len(data)} entries; wanted at most {most}")
    if not all(data) or (longest is not None and max(map(len, data)) > longest):
        raise Refusal(422, f"{tensor.name} has texts of no, or more than {longest}, characters")
    return data


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    _check_form(tensor, "FP32", float)
    with np.errstate(over="ignore"):
        return np.array(tensor.data, dtype=np.float32).reshape(tensor.shape)


def _check_form(tensor: Tensor, datatype: str, kind: type) -> None:
    size = int(np.prod(tensor.shape))
    typed = tensor.datatype == datatype and all(isinstance(value, kind) for value in tensor.data)
    if not typed or size != len(tensor.data):
        raise Refusal(422, f"{tensor.name} is wanted as flat {datatype}, as many as its shape says")
