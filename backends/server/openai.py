"""The OpenAI embeddings shape: `/v1/embeddings`, for texts and for images as data URIs."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from blackbox_vlm.backend import Access, Array, ImageEmbeddings, Request, TextEmbeddings
from blackbox_vlm.images import Image

from .billing import Usage
from .refusal import Refusal
from .service import Question, Service
from .settings import MAX_IMAGES, MAX_TEXT, MAX_TEXTS
from .wire import Foreign, IdempotencyKey, new_router, problems

Input = Annotated[str, Field(min_length=1)]
_URI = ("data:image/", ";base64")
_PROBLEMS = problems(
    {"type": "object", "required": ["message"], "properties": {"message": {"type": "string"}}}
)


class Asked(Foreign):
    """Texts, and images as `data:image/...;base64,...`, in any order."""

    model: str
    input: Input | Annotated[list[Input], Field(min_length=1, max_length=MAX_TEXTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=0, le=0, description="Vectors are not cut.")] | None = None
    modality: Literal["text", "image"] | None = None


class Embedding(Foreign):
    """A vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Tokens(Foreign):
    """Nothing is billed by tokens here; both are 0."""

    prompt_tokens: int
    total_tokens: int


class Told(Foreign):
    """The vectors, in the order of the input."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Tokens


def routes(service: Service) -> APIRouter:
    """The route, where the access level gives it."""
    router = new_router()
    if not service.gives(Access.EMBEDDINGS):
        return router

    @router.post("/v1/embeddings", response_model=Told, responses=_PROBLEMS)
    async def embeddings(
        asked: Asked, http: HttpRequest, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """Unit vectors of texts and images."""
        service.check_model(asked.model)
        return await service.answer(http, _question(asked, service.offer.model_id))

    return router


def _question(asked: Asked, model: str) -> Question:
    inputs = [asked.input] if isinstance(asked.input, str) else asked.input
    uploads = [_upload(text, asked.modality) for text in inputs]
    texts = tuple(_checked(t) for t, u in zip(inputs, uploads, strict=True) if u is None)
    images = [upload for upload in uploads if upload is not None]
    if len(images) > MAX_IMAGES:
        raise Refusal(422, f"{len(images)} images in one request; this endpoint takes {MAX_IMAGES}")

    def ask(pictures: tuple[Image, ...]) -> list[Request]:
        both: tuple[Request, ...] = (ImageEmbeddings(pictures), TextEmbeddings(texts))
        return [request for request in both if request.n_images + request.n_texts]

    def write(values: list[Array], usage: Usage) -> dict[str, Any]:
        vectors = iter(np.concatenate(values))  # the images', then the texts'
        of_images = [next(vectors) for _ in images]
        queues = {True: iter(of_images), False: vectors}
        rows = [next(queues[upload is not None]) for upload in uploads]
        return {
            "object": "list",
            "model": model,
            "data": [_written(row, at, asked.encoding_format) for at, row in enumerate(rows)],
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
        }

    return Question(images, ask, write)


def _upload(text: str, modality: str | None) -> str | None:
    """The base64 of an image; None for a text. No URL is ever fetched."""
    head, comma, data = text.partition(",")
    if comma and head.startswith(_URI[0]) and head.endswith(_URI[1]):
        return data
    if modality == "image":
        raise Refusal(422, "an image is taken as data:image/...;base64,... and never as a URL")
    return None


def _checked(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise Refusal(422, f"a text has {len(text)} characters; wanted at most {MAX_TEXT}")
    return text


def _written(row: Array, index: int, encoding: str) -> dict[str, Any]:
    data = row.astype("<f4").tobytes()
    vector = base64.b64encode(data).decode("ascii") if encoding == "base64" else row.tolist()
    return {"object": "embedding", "index": index, "embedding": vector}
