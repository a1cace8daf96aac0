"""Hugging Face zero-shot image classification: one image and texts, answered by labels and scores.

The texts are whole prompts, so the server's own sentence around them is turned off
(`hypothesis_template` is "{}"). The answer comes sorted by score and is mapped back by name: a
label that is missing, renamed, doubled or not ours spoils it. CLIP gives softmax probabilities over
the texts of one request, SigLIP one sigmoid per text; `score_kind` says which.

Endpoints with a handler of their own say in `request` and `response` where things are.
"""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue

from blackbox_vlm.backend import Access, Capabilities, ScoreKind
from blackbox_vlm.errors import InputError

from ._mapping import get, put
from .answers import numbers, wrong
from .endpoint import Call, HttpBackend, Reading
from .options import EndpointOptions, Options, ScoringOptions, Text
from .transport import MAX_BODY, Reply


class RequestMapping(Options):
    """Where a request's parts go, as dotted paths (`instances.0.image`).

    Attributes:
        image, texts: where they are put.
        image_form: base64 alone, or `data:image/...;base64,...`.
        fixed: what else the request holds.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    image: Text
    texts: Text
    image_form: Literal["base64", "data_uri"] = "base64"
    fixed: dict[str, JsonValue] = Field(default_factory=dict)


class ResponseMapping(Options):
    """Where an answer's parts are, as dotted paths; `*` stands for every element of a list.

    Attributes:
        scores: where the list of scores is.
        labels: where the list of their labels is; None where scores come in the order of the texts.
    """

    scores: Text
    labels: Text | None = None


HF_REQUEST = RequestMapping(
    image="inputs",
    texts="parameters.candidate_labels",
    fixed={"parameters": {"hypothesis_template": "{}"}},
)
HF_RESPONSE = ResponseMapping(scores="*.score", labels="*.label")


class ZeroShotOptions(ScoringOptions):
    """The keys of `protocol = "zero-shot"`; `url` is what is posted to.

    Attributes:
        request, response: of a custom handler; left out, both are Hugging Face's.
    """

    images_per_request: Literal[1] = 1
    request: RequestMapping = HF_REQUEST
    response: ResponseMapping = HF_RESPONSE


class ZeroShot(HttpBackend):
    """An endpoint for zero-shot image classification. Options: `ZeroShotOptions`."""

    Options: ClassVar[type[EndpointOptions]] = ZeroShotOptions

    def declare(self) -> Capabilities:
        """Scores; the mapping is part of every query's key."""
        self._body("image", ("text",))  # places that exclude each other are refused now
        mapping = self.options.model_dump(include={"request", "response"})
        conditions = json.dumps(mapping, sort_keys=True)
        return self.declared(access=Access.SCORES, conditions=conditions)

    def encode(self, request: Any) -> Call:
        """Raises InputError: a text twice, or a single one against a softmax."""
        self._check_texts(request.texts)
        [image] = request.images
        data_uri = self.options.request.image_form == "data_uri"
        upload = self.uploads.data_uri(image) if data_uri else self.uploads.base64(image)
        beside = MAX_BODY + _bytes_of_labels(request.texts)
        return Call(self._body(upload, request.texts), beside=beside)

    def decode(self, reply: Reply, request: Any) -> Reading:
        """Scores in the order of the texts, NaN for those that top-k left out."""
        mapping = self.options.response
        data = _of_one_image(reply.data) if mapping == HF_RESPONSE else reply.data
        scores = get(data, mapping.scores)
        if mapping.labels is not None:
            found = _by_name(get(data, mapping.labels), scores, request.texts)
            if len(found) < request.n_texts and self.options.top_k is None:
                missing = [text for text in request.texts if text not in found]
                raise wrong("the labels", f"{request.n_texts} of them", f"none named {missing}")
            scores = [found.get(text) for text in request.texts]
        return Reading(numbers([scores], request.answer_shape, "the scores"))

    def _body(self, image: str, texts: tuple[str, ...]) -> dict[str, Any]:
        mapping = self.options.request
        body: dict[str, Any] = deepcopy(mapping.fixed)
        put(body, mapping.image, image)
        put(body, mapping.texts, list(texts))
        return body

    def _check_texts(self, texts: tuple[str, ...]) -> None:
        if self.options.response.labels is not None and len(set(texts)) < len(texts):
            raise InputError(
                "a text appears twice in one request, and this endpoint answers by name; send "
                "every text once"
            )
        if len(texts) == 1 and self.options.score_kind is ScoreKind.SOFTMAX:
            raise InputError("one text alone has softmax probability 1; send two or more")


def _of_one_image(data: object) -> object:
    """Some servers answer a batch, here of one: `[[...]]`."""
    if isinstance(data, list) and len(data) == 1 and isinstance(data[0], list):
        return data[0]
    return data


def _by_name(labels: object, scores: object, texts: tuple[str, ...]) -> dict[str, object]:
    """Text -> its score.

    Raises:
        ContractError: a label is not one of the texts, or comes twice, or lacks a score.
    """
    if not isinstance(labels, list) or not isinstance(scores, list) or len(labels) != len(scores):
        raise wrong("the answer", "a list of labels and as many scores", "something else")
    known, found = set(texts), dict[str, object]()
    for label, score in zip(labels, scores, strict=True):
        if not isinstance(label, str) or label not in known or label in found:
            raise wrong("the labels", "each text once, as it was sent", repr(label))
        found[label] = score
    return found


def _bytes_of_labels(texts: tuple[str, ...]) -> int:
    """They come back, each character escaped at worst."""
    return sum(12 * len(text) + 64 for text in texts)
