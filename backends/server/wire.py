"""What all protocols of the server share: bounded JSON, bounded texts, and how errors look."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from blackbox_vlm.backend import SoftPrompts

from .._json import parse_json
from .refusal import Refusal
from .settings import MAX_IMAGES, MAX_TEXT, MAX_TEXTS

Encoded = Annotated[
    str,
    Field(
        min_length=1,
        description="A picture's bytes (JPEG, PNG, ...) in base64.",
        json_schema_extra={"format": "byte"},
    ),
]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Images = Annotated[list[Encoded], Field(min_length=1, max_length=MAX_IMAGES)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
IdempotencyKey = Annotated[
    str | None, Header(max_length=255, description="Sent again under it, a request is free.")
]


class Own(BaseModel):
    """Content of our own protocol: unknown names are refused, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Foreign(BaseModel):
    """Content of a protocol that others define: names that we do not know are left alone."""

    model_config = ConfigDict(extra="ignore", strict=True)


_STATUSES = {
    400: "no JSON, or the wrong Host",
    401: "the token is missing or wrong",
    404: "no such path or model here",
    408: "the body arrived too slowly",
    413: "the body is too large",
    422: "the content is not what is wanted",
    429: "the quota is used, or too much is in work; not billed",
    431: "the headers are too large",
    500: "the server failed; billed",
    502: "the backend behind this server failed",
    503: "not now; not billed",
}


def problems(error: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """How refusals are described; `error` is the schema of the member of that name."""
    schema = {"type": "object", "required": ["error"], "properties": {"error": error}}
    content = {"application/json": {"schema": {**schema, "additionalProperties": False}}}
    return {status: {"description": t, "content": content} for status, t in _STATUSES.items()}


PROBLEMS = problems({"type": "string"})


class StrictRoute(APIRoute):
    """A route whose JSON is bounded before it is used, as our own client bounds an answer's."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        """The handler that FastAPI calls."""
        handler = super().get_route_handler()

        async def bounded(request: HttpRequest) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return bounded


class _StrictRequest(HttpRequest):
    async def json(self) -> Any:
        try:
            return parse_json(await self.body())
        except ValueError as error:
            said = str(error)
        raise _Unreadable(said)


class _Unreadable(Refusal):
    def __init__(self, said: str) -> None:
        super().__init__(400, f"the body is no JSON that is read here: {said}")


def new_router(prefix: str = "") -> APIRouter:
    """Routes of one protocol."""
    return APIRouter(prefix=prefix, route_class=StrictRoute)


def check_offset(offset: NDArray[np.float32], soft: SoftPrompts | None) -> NDArray[np.float32]:
    """The offset itself. Raises Refusal: another shape than the model's, or not finite."""
    wanted = (soft.context_tokens, soft.width) if soft else None
    if offset.shape != wanted:
        raise Refusal(422, f"the offset has shape {offset.shape}; this model takes {wanted}")
    if not np.isfinite(offset).all():
        raise Refusal(422, "the offset holds NaN or infinity; wanted finite numbers")
    return offset


def check_template(template: str) -> str:
    """The template itself. Raises Refusal: it has no one place for the class name."""
    if template.count("{}") != 1:
        raise Refusal(422, "the template needs {} once, where the class name goes")
    return template
