"""An image against texts in one request, answered by raw cosines.

Two dialects: `/v1/score` of vLLM with a CLIP or SigLIP model, and `/clip/compare` of Roboflow's
inference server, which takes the key as a bearer token like the others.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from blackbox_vlm.backend import Access, Capabilities, ScoreKind

from ._mapping import optional
from .answers import member, numbers, wrong
from .endpoint import Call, HttpBackend, Reading
from .options import EndpointOptions, ScoringOptions
from .transport import MAX_BODY, Reply

ROW_BYTES = 96  # of vLLM's answer for each text, beside the score itself


class ScoreOptions(ScoringOptions):
    """The keys of `protocol = "score"`; `url` is what is posted to.

    Attributes:
        dialect: whose form the request and the answer have.
    """

    images_per_request: Literal[1] = 1
    score_kind: ScoreKind = ScoreKind.COSINE
    dialect: Literal["vllm", "roboflow"] = "vllm"


class Score(HttpBackend):
    """An endpoint that compares an image with texts. Options: `ScoreOptions`."""

    Options: ClassVar[type[EndpointOptions]] = ScoreOptions

    def declare(self) -> Capabilities:
        """Scores, cosines unless the declaration says otherwise."""
        return self.declared(access=Access.SCORES, conditions=self.options.dialect)

    def encode(self, request: Any) -> Call:
        """Write the image and the texts in the endpoint's dialect."""
        [image] = request.images
        if self.options.dialect == "roboflow":
            return Call(self._compare(self.uploads.base64(image), request.texts))
        part = {"type": "image_url", "image_url": {"url": self.uploads.data_uri(image)}}
        queries = {"content": [part]}
        documents = list(request.texts)
        body = {"model": self.options.model, "queries": queries, "documents": documents}
        return Call(body, beside=MAX_BODY + ROW_BYTES * len(documents))

    def decode(self, reply: Reply, request: Any) -> Reading:
        """Scores in the order of the texts, with the model and the tokens where they are told."""
        if self.options.dialect == "roboflow":
            scores, model = member(reply.data, "similarity"), None
        else:
            scores = _by_index(member(reply.data, "data", list), request.n_texts)
            model = member(reply.data, "model", str)
        values = numbers([scores], request.answer_shape, "the scores")
        return Reading(values, model, tokens=optional(reply.data, "usage.total_tokens"))

    def _compare(self, image: str, texts: tuple[str, ...]) -> dict[str, Any]:
        return {
            "subject": {"type": "base64", "value": image},
            "subject_type": "image",
            "prompt": list(texts),
            "prompt_type": "text",
            "clip_version_id": self.options.model,
        }


def _by_index(rows: list[object], count: int) -> list[object]:
    """The scores in the order of their `index`, which must be 0 to `count` - 1, each once."""
    scores = {member(row, "index", int): member(row, "score") for row in rows}
    if len(rows) != count or sorted(scores) != list(range(count)):
        got = f"{len(rows)} rows, indices {sorted(scores)}"
        raise wrong("the answer's 'data'", f"an index from 0 to {count - 1}, each once", got)
    return [scores[index] for index in range(count)]
