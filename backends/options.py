"""What an endpoint file may hold: the keys that every protocol takes, and how they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blackbox_vlm.backend import Access, ScoreKind, SoftPrompts
from blackbox_vlm.errors import InputError
from blackbox_vlm.secret import Secret

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Usd = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MAX_CONCURRENCY = 256


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
        http2, ca_file, use_env_proxy: see `Transport`.
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
    logit_scale: Scale = 100.0
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

    access: Literal[Access.SOFT, Access.EMBEDDINGS, Access.SCORES, Access.LABEL] | None = None
    context_tokens: Count | None = None
    width: Count | None = None
    token_std: Scale | None = None

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
