"""Find out by a handful of queries what an endpoint really does, and how to declare it.

Every question goes through a meter and a ledger, so that no probe can cost more than was allowed.
Whether a request sent again under its idempotency key is billed again shows on the bill alone, and
is not probed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from blackbox_vlm.backend import (
    NO_LABEL,
    Access,
    Backend,
    ImageEmbeddings,
    Labels,
    Request,
    TextEmbeddings,
    TextScores,
)
from blackbox_vlm.endpoint import Endpoint, closing
from blackbox_vlm.errors import (
    AuthError,
    BackendError,
    BudgetError,
    ContractError,
    InputError,
    NotSent,
    QuotaError,
    RateLimited,
    Refused,
    UnknownOutcome,
)
from blackbox_vlm.evidence import (
    Finding,
    Seen,
    label_order,
    lengths,
    model_name,
    rate_limits,
    rounding,
    score_kind,
)
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.running import run_sync
from blackbox_vlm.witness import Witness

MAX_QUERIES = 12  # enough for every question, where nothing has to be sent again
MOST_IMAGES = 8
NO_MODEL = "blackbox-vlm-probe-no-such-model"
_NOUNS = """
bird building dessert flower fruit insect mammal guitar fish vegetable car drink chair table lamp
clock book shoe hat coat key door window bridge road river mountain beach forest desert cloud star
moon boat train bicycle airplane bottle cup plate spoon knife bowl bread cheese egg cake apple
banana lemon carrot onion mushroom leaf tree horse sheep cow elephant spider butterfly snake frog
bear
"""
TEXTS = tuple(f"a photo of a {noun}" for noun in _NOUNS.split())
TEXT_SIZES = (8, 16, 32, len(TEXTS))
IMAGE_SIZES = (2, 4, MOST_IMAGES)

# What no other question would change.
_ENDS = (BudgetError, RateLimited, AuthError, QuotaError, NotSent)


@dataclass(frozen=True, slots=True)
class Report:
    """What a probe found.

    Attributes:
        endpoint: the declaration that follows; it can be opened.
        findings: one per question.
        queries: that were spent.
        stopped: why not everything was asked; empty if it was.
    """

    endpoint: Endpoint
    findings: tuple[Finding, ...]
    queries: int
    stopped: str = ""


def probe(
    endpoint: Endpoint, images: Sequence[Image], ledger: Path, max_queries: int = MAX_QUERIES
) -> Report:
    """Ask an endpoint what it does.

    Args:
        endpoint: the protocol, its URL and whatever else is known.
        images: up to `MOST_IMAGES` different ones are shown; one at least.
        ledger: a new file, which counts.
        max_queries: that may be spent, refused ones included.

    Raises:
        InputError: the endpoint cannot be opened as declared; nothing was sent.
        BackendError: the first question was not answered.
        BudgetError: the first question could not be paid for.
    """
    loose, shown = _loosened(endpoint), tuple(images[:MOST_IMAGES])
    with closing(loose.open()) as backend, Ledger(ledger, max_queries) as book:
        findings, stopped = run_sync(_Prober(endpoint, backend, shown, book).ask_all())
        spent = book.spent()
    found = {name: value for finding in findings for name, value in finding.declares.items()}
    return Report(endpoint.accepting(found), tuple(findings), spent, stopped)


class _Prober:
    """The questions, in the order of their worth; each is one query or a few."""

    def __init__(
        self, endpoint: Endpoint, backend: Backend, images: tuple[Image, ...], ledger: Ledger
    ) -> None:
        self._endpoint = endpoint
        self._witness = Witness(backend)
        self._meter = Meter(self._witness, ledger)
        self._images = images
        self._ledger = ledger
        self._noise = 0.0

    async def ask_all(self) -> tuple[list[Finding], str]:
        """The findings, and why not everything was asked."""
        access = self._witness.limits.access
        self._first = await self._ask_first(access)
        findings, stopped = [model_name(self._model, self._first)], ""
        try:
            for question in (self._repeat, *self._questions(access), self._ask_no_model):
                findings += await question()
        except (BackendError, BudgetError, InputError) as error:
            stopped = str(error)
        return [*findings, *self._conclusions(access), rate_limits(self._answers)], stopped

    def _questions(self, access: Access) -> list[Callable[[], Awaitable[list[Finding]]]]:
        if access is Access.EMBEDDINGS:
            return [self._embed_image, self._most_texts, self._most_images]
        if access is Access.LABEL:
            return [self._more_labels]
        return [self._two_texts, self._most_texts, self._most_images]

    def _conclusions(self, access: Access) -> list[Finding]:
        if access is Access.EMBEDDINGS:
            return [lengths(self._answers)]
        if access is Access.LABEL:
            return [_valid(self._answers)]
        kind = score_kind(self._answers, self._noise)
        return [kind, rounding(self._answers), label_order(self._answers)]

    # -- questions ----------------------------------------------------------------------------

    async def _ask_first(self, access: Access) -> Seen:
        """The question that must be answered; fewer texts where four are too many."""
        most = min(4, self._witness.limits.texts_per_request or 4)
        fewer = 1 if access is Access.EMBEDDINGS else 2
        try:
            return await self._ask(_request(access, self._images[:1], TEXTS[:most]))
        except Refused as error:
            if isinstance(error, _ENDS) or most <= fewer:
                raise
            try:
                return await self._ask(_request(access, self._images[:1], TEXTS[:fewer]))
            except (BackendError, BudgetError):
                raise error from None

    async def _repeat(self) -> list[Finding]:
        self._noise = await self._meter.canary(self._first.request, "probe")
        if self._noise:
            return [Finding("asked twice", f"differs by up to {self._noise:.3g}", 2)]
        return [Finding("asked twice", "the same answer", 2, {"deterministic": True})]

    async def _two_texts(self) -> list[Finding]:
        """Fewer texts beside the same image: evidence for what the scores are."""
        await self._ask(TextScores(self._images[:1], TEXTS[:2]))
        return []

    async def _embed_image(self) -> list[Finding]:
        await self._ask(ImageEmbeddings(self._images[:1]))
        return []

    async def _more_labels(self) -> list[Finding]:
        for image in self._images[1:4]:
            await self._ask(Labels((image,), TEXTS[:4]))
        return []

    async def _most_texts(self) -> list[Finding]:
        access = self._witness.limits.access

        def make(count: int) -> Request:
            return _request(access, self._images[:1], TEXTS[:count])

        alone = self._first if access is Access.EMBEDDINGS else None
        least = self._first.request.n_texts
        return await self._most("texts_per_request", least, TEXT_SIZES, make, alone)

    async def _most_images(self) -> list[Finding]:
        alone = self._first
        if self._witness.limits.access is Access.EMBEDDINGS:
            alone = self._witness.seen[ImageEmbeddings(self._images[:1])]

        def make(count: int) -> Request:
            images = self._images[:count]
            if isinstance(alone.request, TextScores):
                return TextScores(images, alone.request.texts)
            return ImageEmbeddings(images)

        sizes = [size for size in IMAGE_SIZES if size <= len(self._images)]
        return await self._most("images_per_request", 1, sizes, make, alone)

    async def _most(
        self,
        option: str,
        least: int,
        sizes: Sequence[int],
        make: Callable[[int], Request],
        alone: Seen | None,
    ) -> list[Finding]:
        """How many of something one request may carry: the most first, then by halves.

        An answer whose first row is not what was answered to one `alone` counts as a refusal.
        """
        limit = getattr(self._witness.limits, option)
        if limit == 1:
            return [Finding(option, "1, as the protocol is", 0)]
        sizes = [size for size in sizes if limit is None or size <= limit]
        low, high, asked, said = 0, len(sizes), 0, ""
        at = high - 1
        while low < high:
            asked += 1
            said_now = await self._refusal(make(sizes[at]), alone)
            if said_now is None:
                low = at + 1
            else:
                high, said = at, said_now
            at = (low + high) // 2
        most = sizes[low - 1] if low else least
        if low == len(sizes):
            declares = {option: most} if option == "images_per_request" else {}
            return [Finding(option, f"{most} taken, more were not tried", asked, declares)]
        found = f"{most} taken, {sizes[low]} not ({_short(said)})"
        return [Finding(option, found, asked, {option: most})]

    async def _refusal(self, request: Request, alone: Seen | None) -> str | None:
        """What speaks against a request; None if it was answered, and rightly."""
        try:
            answer = await self._ask(request)
        except _ENDS:
            raise
        except (BackendError, InputError) as error:
            return str(error)
        slack = max(3 * self._noise, 1e-4)
        if alone and not np.allclose(answer.values[0], alone.values[0], rtol=0.02, atol=slack):
            return "it gets other answers than one alone"
        return None

    async def _ask_no_model(self) -> list[Finding]:
        """Whether a model that does not exist is refused, or silently replaced."""
        about, request = "unknown model", self._first.request
        async with aclosing(_loosened(self._endpoint, model=NO_MODEL).open()) as other:
            if not _differ(self._witness.inner, other, request):
                return [Finding(about, "not asked: requests do not name a model", 0)]
            witness = Witness(other)
            try:
                await Meter(witness, self._ledger).observe([request], "probe")
            except Refused as error:
                if isinstance(error, RateLimited | QuotaError):
                    raise
                return [Finding(about, f"refused ({_short(error)})", 1)]
            except (UnknownOutcome, ContractError) as error:
                return [Finding(about, f"not answered ({_short(error)})", 1)]
        name = model_name(NO_MODEL, witness.seen[request])
        return [Finding(about, f"ANSWERED all the same: {name.found}", 1)]

    # -- asking -------------------------------------------------------------------------------

    @property
    def _model(self) -> str:
        return str(self._endpoint.options["model"])

    @property
    def _answers(self) -> list[Seen]:
        return list(self._witness.seen.values())

    async def _ask(self, request: Request) -> Seen:
        await self._meter.observe([request], "probe")
        return self._witness.seen[request]


def _request(access: Access, images: tuple[Image, ...], texts: tuple[str, ...]) -> Request:
    if access is Access.EMBEDDINGS:
        return TextEmbeddings(texts)
    return Labels(images, texts) if access is Access.LABEL else TextScores(images, texts)


def _valid(answers: Sequence[Seen]) -> Finding:
    good = sum(int(answer.values[0] != NO_LABEL) for answer in answers)
    return Finding("labels", f"{good} of {len(answers)} answers are one of the texts", len(answers))


def _short(said: object) -> str:
    text = " ".join(str(said).split())
    return text if len(text) <= 160 else f"{text[:160]}..."


def _differ(backend: Backend, other: Backend, request: Request) -> bool:
    """Whether two backends send different requests; taken for granted where they do not show it."""
    encode, encode_other = getattr(backend, "encode", None), getattr(other, "encode", None)
    if encode is None or encode_other is None:
        return True
    return bool(encode(request) != encode_other(request))


def _loosened(endpoint: Endpoint, **options: object) -> Endpoint:
    """The endpoint, with other options, without what would hide how it behaves."""
    hidden = ("answered_model", "idempotency_header")  # a repeated answer would look deterministic
    kept = {name: value for name, value in endpoint.options.items() if name not in hidden}
    plain = replace(endpoint, options=kept | options)
    return plain.accepting({"images_per_request": 0, "texts_per_request": 0})
