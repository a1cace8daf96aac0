"""A language model behind `/chat/completions` that writes text: OpenAI's protocol, without images.

It sees no image and scores nothing; a run may ask it for templates. The prompt is one message of
the user, the answer is the text of the first and only choice, whatever it says: who asks decides
what of it is usable.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, JsonValue

from blackbox_vlm.backend import Access, Capabilities
from blackbox_vlm.errors import ContractError, InputError

from ._mapping import optional
from .answers import member, wrong
from .chat import check_failure, model_of
from .endpoint import Call, HttpBackend, Reading
from .options import Count, EndpointOptions
from .transport import Reply

OWN = ("model", "messages", "n", "stream", "max_tokens", "max_completion_tokens", "temperature")


class WriterOptions(EndpointOptions):
    """The keys of `protocol = "writer"`; `url` is what is posted to.

    Attributes:
        temperature: left out, the endpoint's own; reasoning models take no other.
        token_limit: what the endpoint calls the limit on the tokens of an answer.
        answer_tokens: that limit.
        body: more members of every request, such as `seed`; no secrets, this is printed.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    images_per_request: Literal[0] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    answer_tokens: Count = 1024
    body: dict[str, JsonValue] = Field(default_factory=dict)


class Writer(HttpBackend):
    """A language model that completes prompts. Options: `WriterOptions`."""

    Options: ClassVar[type[EndpointOptions]] = WriterOptions

    def declare(self) -> Capabilities:
        """Text access; whatever a request holds is part of every query's key.

        Raises:
            InputError: `body` would replace a member that another option decides.
        """
        taken = sorted(set(OWN) & self.options.body.keys())
        if taken:
            raise InputError(f"body holds {taken[0]!r}, which other options decide; remove it")
        conditions = json.dumps(self._settings(), sort_keys=True)
        return self.declared(access=Access.TEXT, conditions=conditions)

    def encode(self, request: Any) -> Call:
        """One message that holds the prompt."""
        message = {"role": "user", "content": request.prompt}
        return Call({"model": self.options.model, "messages": [message], **self._settings()})

    def decode(self, reply: Reply, request: Any) -> Reading:
        """The text, as bytes."""
        check_failure(reply.data)
        choices = member(reply.data, "choices", list)
        if len(choices) != 1:
            raise wrong("the answer's 'choices'", "one", str(len(choices)))
        text = _text(choices[0]).encode("utf-8", "replace")  # JSON may hold half a character
        return Reading(
            np.frombuffer(text, dtype=np.uint8),
            model_id=model_of(reply.data),
            tokens=optional(reply.data, "usage.total_tokens"),
            cost=optional(reply.data, "usage.cost"),
        )

    def _settings(self) -> dict[str, Any]:
        options = self.options
        settings: dict[str, Any] = {options.token_limit: options.answer_tokens}
        if options.temperature is not None:
            settings["temperature"] = options.temperature
        return {**settings, **options.body}


def _text(choice: object) -> str:
    """What was written, also where it was cut off: the lines before the cut are whole.

    Raises:
        ContractError: nothing was.
    """
    message = member(choice, "message", dict)
    content = message.get("content")
    if content is None or content == "":
        raise ContractError(
            "the model wrote nothing: it refused, or spent its tokens before it answered; raise "
            "answer_tokens, or turn its reasoning down"
        )
    if not isinstance(content, str):
        raise wrong("the answer's content", "text", type(content).__name__)
    return content
