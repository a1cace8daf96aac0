"""What the HTTP protocols share: one request is one POST, and its answer is read with suspicion.

A protocol is a subclass of `HttpBackend` in a file of its own: `declare` says what it gives,
`encode` writes a request, `decode` reads an answer. It never sees a socket, a key or a budget.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from blackbox_vlm.backend import (
    Answer,
    Array,
    Capabilities,
    Outcome,
    Price,
    Request,
    query_key,
)
from blackbox_vlm.errors import BackendError
from blackbox_vlm.secret import Secret

from ._images import Uploads
from .answers import billed
from .options import EndpointOptions, ScoringOptions, read_options
from .transport import MAX_BODY, Reply, Transport

MAX_DIM = 4096  # of an embedding; only bounds how many bytes of an answer are read
BYTES_PER_NUMBER = 32  # as JSON text, at most


@dataclass(frozen=True, slots=True)
class Call:
    """A request as the protocol writes it.

    Attributes:
        body: JSON values; or bytes, with their content type among the headers.
        path: appended to the endpoint's URL.
        headers: of this request.
        beside: bytes that its answer may have beside its numbers.
    """

    body: Any
    path: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    beside: int = MAX_BODY


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer as the protocol reads it.

    Attributes:
        values: in the request's `answer_shape`.
        model_id: which model spoke; None where the protocol does not say.
        tokens, cost: that the owner bills (cost in USD), as the answer reports them. What is no
            amount counts as not reported: then what was reserved stays charged.
    """

    values: Array
    model_id: str | None = None
    tokens: object = None
    cost: object = None


class HttpBackend(ABC):
    """A backend that answers each request by one POST of JSON. See `blackbox_vlm.backend.Backend`.

    Args:
        inner: an httpx transport in place of the network, for tests.
        options: the fields of the class's `Options`.

    Raises:
        InputError: an option is unknown, missing or not what is wanted, or the key cannot be had.
    """

    Options: ClassVar[type[EndpointOptions]] = EndpointOptions

    def __init__(self, *, inner: Any = None, **options: Any) -> None:
        self.options: Any = read_options(self.Options, options)
        self.uploads = Uploads(self.options.max_image_side)
        self.transport = _transport(self.options, inner)
        self.capabilities = self.declare()
        self.observer: Callable[[Reply], None] | None = None  # `probe` looks at raw replies

    @abstractmethod
    def declare(self) -> Capabilities:
        """What the endpoint gives, by its options; start from `declared`."""

    @abstractmethod
    def encode(self, request: Request) -> Call:
        """Write a request; the access level and the limits have been checked."""

    @abstractmethod
    def decode(self, reply: Reply, request: Request) -> Reading:
        """Read the answer to a request.

        Raises:
            ContractError: the answer does not have the protocol's form.
        """

    async def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        """Post each request once. See `blackbox_vlm.backend.Backend.answer`."""
        for request in requests:
            self.capabilities.check(request)
        calls = [self.encode(request) for request in requests]  # nothing leaves if one is refused
        pairs = zip(calls, requests, strict=True)
        return [await self._outcome(call, request) for call, request in pairs]

    async def aclose(self) -> None:
        """Close the connections; the next request opens new ones."""
        await self.transport.aclose()

    def query_key(self, request: Request) -> str:
        """What tells a request from every other one: the same when it is sent again."""
        return query_key(request, self.capabilities.identity)

    async def _outcome(self, call: Call, request: Request) -> Outcome:
        try:
            return await self._answer(call, request)
        except BackendError as error:
            error.args = (self.transport.scrub(str(error)),)  # an answer may repeat the key
            return error

    async def _answer(self, call: Call, request: Request) -> Answer:
        header = self.options.idempotency_header
        headers = {**call.headers, header: self.query_key(request)} if header else call.headers
        most = call.beside + _bytes_of_numbers(request)
        reply = await self.transport.post(call.body, path=call.path, headers=headers, most=most)
        if self.observer is not None:
            self.observer(reply)
        reading = self.decode(reply, request)
        model = self.capabilities.model_id if reading.model_id is None else reading.model_id
        named = self.transport.scrub(model)
        return Answer(reading.values, named, self._cost(request, reading), reply.quota)

    def _cost(self, request: Request, reading: Reading) -> float | None:
        cost, price = billed(reading.cost), self.capabilities.price
        if cost is not None or price is None:
            return cost
        return price.of(request, billed(reading.tokens))

    def declared(self, **more: Any) -> Capabilities:
        """The capabilities that follow from the options that every protocol takes.

        Args:
            more: what the protocol adds, `access` at least; `conditions` is added to the others.
        """
        options = self.options
        conditions = (
            f"{self.transport.route} {type(self).__name__} side={options.max_image_side}",
            more.pop("conditions", ""),
        )
        if isinstance(options, ScoringOptions):
            for name in ("score_kind", "logit_scale", "decimals", "top_k"):
                more.setdefault(name, getattr(options, name))
        given: dict[str, Any] = {
            "model_id": options.answered_model or options.model,
            "images_per_request": options.images_per_request or None,
            "texts_per_request": options.texts_per_request or None,
            "price": None if options.price is None else Price(**options.price.model_dump()),
            "idempotent": options.idempotency_header is not None,
            "refusals_free": options.refusals_free,
            "concurrency": options.concurrency,
            "deterministic": options.deterministic,
            "conditions": " ".join(filter(None, conditions)),
        }
        return Capabilities(**(given | more))


def _bytes_of_numbers(request: Request) -> int:
    lengths = (MAX_DIM if length is None else length for length in request.answer_shape)
    return BYTES_PER_NUMBER * math.prod(lengths)


def _transport(options: EndpointOptions, inner: Any) -> Transport:
    key = options.key()
    headers: dict[str, str | Secret] = dict(options.headers)
    if key is not None:
        headers[options.key_header] = key.prefixed(options.key_prefix)
    return Transport(
        options.url,
        headers=headers,
        timeout=options.timeout,
        connections=options.concurrency,
        busy=options.busy,
        http2=options.http2,
        ca_file=options.ca_file,
        use_env_proxy=options.use_env_proxy,
        inner=inner,
    )
