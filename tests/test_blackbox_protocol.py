"""Our own protocol: the client against our server in-process, and against answers made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from blackbox_vlm.backends.blackbox import Blackbox
from blackbox_vlm.backends.server import ServerSettings, create_app, declaration
from serving import URL, world

from blackbox_vlm.backend import (
    Access,
    Answer,
    Array,
    Backend,
    ImageEmbeddings,
    Labels,
    Outcome,
    Price,
    PromptScores,
    Request,
    TextEmbeddings,
    TextScores,
    open_backend,
    query_key,
)
from blackbox_vlm.demo import demo_folder
from blackbox_vlm.endpoint import Endpoint
from blackbox_vlm.errors import ContractError, InputError
from blackbox_vlm.images import Image
from blackbox_vlm.running import run_sync
from blackbox_vlm.testing import BackendConformance

EXAMPLE = Path(__file__).parent.parent / "examples" / "blackbox.toml"


def over_http(backend: Backend, settings: ServerSettings | None = None) -> Blackbox:
    """A client of a server of that backend, in-process."""
    settings = settings or ServerSettings()
    options = declaration("blackbox", URL, backend.capabilities, settings)
    return Blackbox(inner=httpx.ASGITransport(create_app(backend, settings)), **options)


def ask(backend: Backend, request: Request) -> Outcome:
    async def once() -> Outcome:
        [outcome] = await backend.answer([request])
        return outcome

    return run_sync(once())


def answer(backend: Backend, request: Request) -> Answer:
    outcome = ask(backend, request)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@pytest.mark.parametrize("access", Access)
class TestOverHttp(BackendConformance):
    @pytest.fixture(autouse=True)
    def _setting(self, access: Access) -> None:
        self._access = access

    def make_backend(self) -> Backend:
        return over_http(world(self._access, images_per_request=2, texts_per_request=3))


# -- the same numbers as without HTTP ---------------------------------------------------------


@pytest.fixture(scope="module")
def emoji() -> tuple[Image, ...]:
    return tuple(map(Image.from_file, sorted(demo_folder().rglob("*.png"))[::150][:3]))


TEXTS = ("a photo of a cat.", "a photo of a clock.")
OFFSET = np.random.default_rng(0).normal(0, 0.02, (4, 192)).astype(np.float32)
QUESTIONS: list[tuple[str, list[Callable[[tuple[Image, ...]], Request]]]] = [
    (
        "soft",
        [
            lambda images: TextScores(images, TEXTS),
            lambda images: PromptScores(images, ("cat", "clock"), "a photo of a {}.", OFFSET),
        ],
    ),
    ("embeddings", [ImageEmbeddings, lambda images: TextEmbeddings(TEXTS)]),
]


@pytest.mark.parametrize(("access", "questions"), QUESTIONS)
def test_numbers_survive_http_to_the_bit(
    access: str, questions: list[Any], emoji: tuple[Image, ...]
) -> None:
    local = open_backend("local", model="nano", access=access)
    remote = over_http(local)  # which keeps vectors by the hash of a file, and an upload is another
    for question in questions:
        here, there = (answer(backend, question(emoji)) for backend in (local, remote))
        assert here.values.dtype == there.values.dtype
        np.testing.assert_array_equal(here.values, there.values)
        assert here.model_id == there.model_id


def test_scores_that_are_withheld_arrive_as_nan(tmp_path: Path) -> None:
    inner = world(top_k=1, decimals=3)
    images = tuple(BackendConformance().make_images(tmp_path))
    request = TextScores(images, ("cat", "dog", "car"))
    values = answer(over_http(inner), request).values
    np.testing.assert_array_equal(values, inner.values(request))
    assert np.isnan(values).sum() == 4


def test_the_answer_says_what_it_cost(tmp_path: Path) -> None:
    price = Price(per_request=0.01, per_image=0.003, per_text=0.0001)
    client = over_http(world(), ServerSettings(price=price))
    request = TextScores(tuple(BackendConformance().make_images(tmp_path)), ("cat", "dog", "car"))
    assert client.capabilities.price == price
    assert answer(client, request).cost == price.of(request) == pytest.approx(0.0163)


# -- what is sent -----------------------------------------------------------------------------


class Written:
    """Answers as told, and keeps what was sent."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.seen: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        sent = json.loads(request.content)
        usage = {"queries": 1, "images": 1, "texts": 2, "usd": 0.0}
        told = {"id": sent["id"], "model": "m", "values": [[1.5, -2.0]], "usage": usage}
        content = json.dumps({**told, **self.changes}).encode()
        return httpx.Response(200, stream=httpx.ByteStream(content))


def client_of(server: Written, **options: Any) -> Blackbox:
    return Blackbox(inner=httpx.MockTransport(server), url=URL, model="m", **options)


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Image, ...]:
    return (BackendConformance().make_images(tmp_path)[0],)


def test_a_request_has_an_id_and_an_idempotency_key(picture: tuple[Image, ...]) -> None:
    server, request = Written(), TextScores(picture, ("cat", "dog"))
    client = client_of(server)
    answer(client, request)
    [sent] = server.seen
    key = query_key(request, client.capabilities.identity)
    assert sent.headers["idempotency-key"] == json.loads(sent.content)["id"] == key
    assert str(sent.url) == f"{URL}/blackbox/v1/scores"


def test_the_servers_bill_counts_and_not_the_declared_price(picture: tuple[Image, ...]) -> None:
    server = Written(usage={"queries": 1, "images": 1, "texts": 2, "usd": 0.25})
    client = client_of(server, price={"per_request": 1.0})
    assert answer(client, TextScores(picture, ("cat", "dog"))).cost == 0.25


def test_it_trusts_its_server_to_bill_a_request_once() -> None:
    declared = client_of(Written()).capabilities
    assert (declared.idempotent, declared.refusals_free, declared.deterministic) == (True,) * 3
    assert declared.price is None
    assert not client_of(Written(), idempotency_header=None).capabilities.idempotent


# -- what is not believed ---------------------------------------------------------------------

USAGE = {"queries": 1, "images": 1, "texts": 2}
SPOILT: list[tuple[dict[str, Any], str]] = [
    ({"id": "another"}, "id"),
    ({"id": None}, "id"),
    ({"model": 3}, "model"),
    ({"usage": None}, "usage"),
    ({"usage": USAGE}, "usd"),
    ({"usage": {**USAGE, "usd": -0.5}}, "usd"),
    ({"usage": {**USAGE, "usd": True}}, "usd"),
    ({"usage": {**USAGE, "usd": "0.5"}}, "usd"),
    ({"values": [[1.0]]}, "values"),
    ({"values": [[1.0, "2"]]}, "values"),
    ({"values": [1.0, 2.0]}, "values"),
]


@pytest.mark.parametrize(("changes", "named"), SPOILT, ids=lambda value: str(value)[:40])
def test_a_spoilt_answer_breaks_the_contract(
    changes: dict[str, Any], named: str, picture: tuple[Image, ...]
) -> None:
    outcome = ask(client_of(Written(**changes)), TextScores(picture, ("cat", "dog")))
    assert isinstance(outcome, ContractError)
    assert named in str(outcome)


@pytest.mark.parametrize("values", [[2], [-2], [True], [0.0], ["0"], [0, 1], []])
def test_a_label_is_a_place_among_the_texts(values: Array, picture: tuple[Image, ...]) -> None:
    client = client_of(Written(values=values), access="label")
    assert isinstance(ask(client, Labels(picture, ("cat", "dog"))), ContractError)


def test_no_label_is_an_answer(picture: tuple[Image, ...]) -> None:
    client = client_of(Written(values=[-1]), access="label")
    assert answer(client, Labels(picture, ("cat", "dog"))).values.tolist() == [-1]


# -- how it is declared -----------------------------------------------------------------------


def test_the_example_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLACKBOX_TOKEN", "not-a-real-token")
    declared = Endpoint.from_file(EXAMPLE).open().capabilities
    assert (declared.access, declared.images_per_request) == (Access.SCORES, 64)
    assert declared.price == Price(per_image=0.0001)


WRONG: list[dict[str, Any]] = [
    {"access": "soft"},
    {"access": "soft", "context_tokens": 4, "width": 8},
    {"access": "scores", "context_tokens": 4, "width": 8, "token_std": 0.1},
    {"access": "everything"},
    {"access": "soft", "context_tokens": 0, "width": 8, "token_std": 0.1},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_a_wrong_declaration_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"wanted|correct"):
        Blackbox(url=URL, model="m", **options)
