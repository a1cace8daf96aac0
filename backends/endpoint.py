"""What the HTTP protocols share: the declaration of an endpoint, and one request as one POST.

A protocol is a subclass of `HttpBackend` in a file of its own: `declare` says what it gives,
`encode` writes a request, `decode` reads an answer. It never sees a socket, a key or a budget.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blackbox_vlm.backend import (
    Access,
    Answer,
    Array,
    Capabilities,
    Outcome,
    Price,
    Request,
    ScoreKind,
    SoftPrompts,
    query_key,
)
from blackbox_vlm.errors import BackendError, InputError
from blackbox_vlm.secret import Secret

from ._answers import wrong
from ._images import Uploads
from .transport import MAX_BODY, Reply, Transport

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MAX_CONCURRENCY = 256
MOST_BILLED = 1e9  # tokens or USD of one answer


class Options(BaseModel):
    """Base of everything that an endpoint file may hold: unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PriceOptions(Options):
    """See `blackbox_vlm.backend.Price`."""

    per_request: Usd = 0.0
    per_image: Usd = 0.0
    per_text: Usd = 0.0
    per_million_tokens: Usd = 0.0
    most_tokens: Annotated[int, Field(ge=0)] = 0


class EndpointOptions(Options):
    """The keys that every protocol takes.

    Attributes:
        url: of the endpoint; http only on this machine.
        model: what is asked for.
        answered_model: what the answers call it, where that differs.
        key_env, key_file: where the key is; at most one of them.
        key_header, key_prefix: how it is sent.
        headers: sent with every request; no secrets, this is printed.
        timeout: seconds for one request in all.
        concurrency: requests in flight, at most.
        images_per_request, texts_per_request: what one request may carry; 0 for no limit.
        max_image_side: pixels; larger pictures are reduced before they are uploaded.
        busy: statuses that mean "not now", with nothing done and nothing billed but as refusals.
        refusals_free: whether a complete 4xx answer, and the statuses in `busy`, are not billed.
        idempotency_header: the header under which the endpoint takes a key and does, and bills,
            a request sent again under it once.
        deterministic: whether the same question gets the same answer.
        price: what is billed; left out, it is unknown.
    """

    url: Text
    model: Text
    answered_model: Text | None = None
    key_env: Text | None = None
    key_file: Path | None = None
    key_header: Text = "Authorization"
    key_prefix: str = "Bearer "
    headers: dict[str, str] = Field(default_factory=dict)
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0
    concurrency: Annotated[int, Field(ge=1, le=MAX_CONCURRENCY)] = 1
    images_per_request: Annotated[int, Field(ge=0)] = 1
    texts_per_request: Annotated[int, Field(ge=0)] = 0
    max_image_side: Count | None = None
    busy: frozenset[Annotated[int, Field(ge=400, le=599)]] = frozenset({429})
    refusals_free: bool = False
    idempotency_header: Text | None = None
    deterministic: bool = False
    http2: bool = False
    ca_file: Path | None = None
    use_env_proxy: bool = False
    price: PriceOptions | None = None

    def key(self) -> Secret | None:
        """The key, read now. Raises InputError: both places are named, or it cannot be had."""
        if self.key_env is not None and self.key_file is not None:
            raise InputError("got key_env and key_file; wanted one of them")
        if self.key_env is not None:
            return Secret.from_env(self.key_env)
        return None if self.key_file is None else Secret.from_file(self.key_file.expanduser())


class ScoringOptions(EndpointOptions):
    """The keys of a protocol that returns scores; see `blackbox_vlm.backend.Capabilities`."""

    score_kind: ScoreKind = ScoreKind.SOFTMAX
    logit_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    decimals: Annotated[int, Field(ge=0, le=12)] | None = None
    top_k: Count | None = None


class SoftOptions(ScoringOptions):
    """The keys of a protocol that takes soft prompts.

    Attributes:
        access: what the endpoint gives; left out, it is soft where soft prompts are declared, and
            scores elsewhere.
        context_tokens, width, token_std: all three or none; see
            `blackbox_vlm.backend.SoftPrompts`.
    """

    access: Access | None = None
    context_tokens: Count | None = None
    width: Count | None = None
    token_std: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def soft_access(self) -> tuple[Access, SoftPrompts | None]:
        """The access level, and what the soft prompts are.

        Raises:
            InputError: soft prompts are declared in part, or beside another access level.
        """
        shape = (self.context_tokens, self.width, self.token_std)
        if None in shape and shape != (None, None, None):
            raise InputError(
                f"got context_tokens, width and token_std {shape}; wanted all three or none"
            )
        soft = None if None in shape else SoftPrompts(*shape)  # type: ignore[arg-type]
        access = self.access or (Access.SOFT if soft else Access.SCORES)
        if (access is Access.SOFT) != (soft is not None):
            raise InputError(
                f"got access {access.value!r} and {soft or 'no soft prompts'}; wanted access "
                "'soft' with context_tokens, width and token_std, or another access without them"
            )
        return access, soft


@dataclass(frozen=True, slots=True)
class Call:
    """A request as the protocol writes it.

    Attributes:
        body: JSON values; or bytes, with their content type among the headers.
        path: appended to the endpoint's URL.
        headers: of this request.
        most: bytes that its answer may have.
    """

    body: Any
    path: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    most: int = MAX_BODY


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer as the protocol reads it.

    Attributes:
        values: in the request's `answer_shape`.
        model_id: which model spoke; None where the protocol does not say.
        tokens: that the owner bills, where the answer reports them.
        cost: USD, where the answer reports it.
    """

    values: Array
    model_id: str | None = None
    tokens: int | None = None
    cost: float | None = None


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
            check_limits(request, self.capabilities)
        return [await self._outcome(request) for request in requests]

    async def aclose(self) -> None:
        """Close the connections; the next request opens new ones."""
        await self.transport.aclose()

    async def _outcome(self, request: Request) -> Outcome:
        try:
            return await self._answer(request)
        except BackendError as error:
            return error

    async def _answer(self, request: Request) -> Answer:
        call = self.encode(request)
        headers = {**call.headers, **self._idempotency(request)}
        reply = await self.transport.post(
            call.body, path=call.path, headers=headers, most=call.most
        )
        if self.observer is not None:
            self.observer(reply)
        reading = self.decode(reply, request)
        model = self.capabilities.model_id if reading.model_id is None else reading.model_id
        return Answer(reading.values, model, self._cost(request, reading), reply.quota)

    def _idempotency(self, request: Request) -> dict[str, str]:
        header = self.options.idempotency_header
        return {header: query_key(request, self.capabilities.identity)} if header else {}

    def _cost(self, request: Request, reading: Reading) -> float | None:
        for what, said in (("tokens", reading.tokens), ("cost", reading.cost)):
            if said is not None and not 0 <= said <= MOST_BILLED:  # less than nothing would refund
                raise wrong(f"the answer's {what}", f"0 to {MOST_BILLED:g}", "another number")
        if reading.cost is not None or self.capabilities.price is None:
            return reading.cost
        return self.capabilities.price.of(request, reading.tokens)

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


def read_options(kind: type[EndpointOptions], options: Mapping[str, Any]) -> EndpointOptions:
    """Check options against a protocol's.

    Raises:
        InputError: names the first option that is wrong, what was got and what was wanted.
    """
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, first["loc"])) or "the declaration"
    if first["type"] == "missing":
        raise InputError(f"the endpoint's declaration lacks {name}; add it")
    if first["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields)
        raise InputError(f"unknown option {name}; this protocol takes {known}")
    raise InputError(f"{name} is {repr(first['input'])[:200]}: {first['msg']}; correct it")


def check_limits(request: Request, capabilities: Capabilities) -> None:
    """Refuse a request that the endpoint does not take, before anything is sent.

    Raises:
        InputError: another access level, nothing to answer, or more images or texts than one
            request may carry.
    """
    if not capabilities.takes(request):
        raise InputError(
            f"{type(request).__name__} needs {request.access.value!r} access; this endpoint gives "
            f"{capabilities.access.value!r}"
        )
    if 0 in request.answer_shape:
        raise InputError(f"{type(request).__name__} of nothing; give images and texts")
    for count, limit, what in (
        (request.n_images, capabilities.images_per_request, "images"),
        (request.n_texts, capabilities.texts_per_request, "texts"),
    ):
        if limit is not None and count > limit:
            raise InputError(f"{count} {what} in one request; this endpoint takes {limit}")


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
