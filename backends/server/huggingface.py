"""The Hugging Face shape of zero-shot image classification: `/hf` and `/models/{model}`.

As the pipeline does it, the texts are softmax-ed over the request (or are independent
probabilities, where the model is a sigmoid one), and the answer is sorted by score.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from pydantic import Field
from scipy.special import softmax
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from blackbox_vlm.backend import Access, Array, Capabilities, ScoreKind, TextScores

from .billing import Usage
from .service import Question, Service, plain
from .wire import (
    PROBLEMS,
    Encoded,
    Foreign,
    IdempotencyKey,
    Text,
    Texts,
    check_template,
    new_router,
)

DEFAULT_TEMPLATE = "This is a photo of {}."  # of the pipeline, where a request names none


class Parameters(Foreign):
    """`candidate_labels` are put into `hypothesis_template` at its {}."""

    candidate_labels: Texts
    hypothesis_template: Text | None = None


class Asked(Foreign):
    """One image, and labels for it."""

    inputs: Encoded
    parameters: Parameters


class Scored(Foreign):
    """A label and its probability."""

    label: str
    score: Annotated[float, Field(ge=0, le=1)]


def gives_probabilities(offer: Capabilities) -> bool:
    """Whether probabilities can be had: not from logits of which a part is withheld."""
    whole = offer.top_k is None and offer.decimals is None
    return whole or offer.score_kind in (ScoreKind.SOFTMAX, ScoreKind.SIGMOID)


def routes(service: Service) -> APIRouter:
    """The routes, where the access level and the kind of scores allow them."""
    router = new_router()
    if not (service.gives(Access.SCORES, Access.SOFT) and gives_probabilities(service.offer)):
        return router

    @router.post("/hf", response_model=list[Scored], responses=PROBLEMS)
    async def zero_shot(
        asked: Asked, http: HttpRequest, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """The labels with their probabilities, the best first."""
        return await service.answer(http, _question(asked, service.offer))

    @router.post("/models/{model:path}", response_model=list[Scored], responses=PROBLEMS)
    async def zero_shot_of_model(
        model: str, asked: Asked, http: HttpRequest, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """The same under the model's name."""
        service.check_model(model)
        return await service.answer(http, _question(asked, service.offer))

    return router


def _question(asked: Asked, offer: Capabilities) -> Question:
    labels = asked.parameters.candidate_labels
    template = check_template(asked.parameters.hypothesis_template or DEFAULT_TEMPLATE)
    texts = tuple(template.replace("{}", label) for label in labels)

    def write(values: list[Array], usage: Usage) -> list[dict[str, Any]]:
        scores = plain(_probabilities(values[0][0], offer), offer.decimals)
        pairs = [pair for pair in zip(labels, scores, strict=True) if pair[1] is not None]
        pairs.sort(key=lambda pair: -pair[1])
        return [{"label": label, "score": score} for label, score in pairs]

    return Question([asked.inputs], lambda images: [TextScores(images, texts)], write)


def _probabilities(row: Array, offer: Capabilities) -> Array:
    if offer.score_kind in (ScoreKind.SOFTMAX, ScoreKind.SIGMOID):
        return row
    scale = offer.logit_scale if offer.score_kind is ScoreKind.COSINE else 1.0
    return np.asarray(softmax(scale * row.astype(np.float64)), dtype=np.float32)
