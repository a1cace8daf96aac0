"""Zero-shot classification over HTTP: what is sent, and every way in which an answer can be wrong.

The endpoint is a handler in this process that computes real scores with the linear world, from the
bytes that were uploaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from blackbox_vlm.backends._mapping import get, put
from blackbox_vlm.backends.zero_shot import ZeroShot
from doubles import LinearWorld, declare
from hosted import URL, example, noise, outcomes, reply, served, uploaded, values

from blackbox_vlm.backend import Access, Backend, ScoreKind, TextScores
from blackbox_vlm.errors import ContractError, InputError, RateLimited
from blackbox_vlm.images import Image
from blackbox_vlm.testing import BackendConformance

TEXTS = ("a photo of a dog.", "a photo of a cat.", "ein Käfer")

Row = dict[str, Any]


class Server:
    """Answers as Hugging Face does, sorted by score, then `spoil`ed; keeps what it was sent."""

    def __init__(self, spoil: Callable[[Any], Any] = lambda rows: rows, **world: Any) -> None:
        self.world = LinearWorld(declare(**({"score_kind": ScoreKind.SOFTMAX} | world)))
        self.spoil = spoil
        self.bodies: list[Any] = []

    def __call__(self, request: httpx.Request) -> Any:
        assert str(request.url) == URL
        body = json.loads(request.content)
        self.bodies.append(body)
        rows = self.rows(body["inputs"], body["parameters"]["candidate_labels"])
        return self.spoil(rows)

    def rows(self, image: str, texts: list[str]) -> list[Row]:
        scores = self.world.values(TextScores((uploaded(image),), tuple(texts)))[0]
        rows = [
            {"label": text, "score": float(value)}
            for text, value in zip(texts, scores, strict=True)
            if not np.isnan(value)
        ]
        return sorted(rows, key=lambda row: -row["score"])


def backend(server: Callable[[httpx.Request], Any], **options: Any) -> ZeroShot:
    options = {"url": URL, "model": "clip", **options}
    return ZeroShot(inner=served(server), **options)


@pytest.fixture
def picture(tmp_path: Path) -> Image:
    return noise(tmp_path, 1)[0]


@pytest.fixture
def request_(picture: Image) -> TextScores:
    return TextScores((picture,), TEXTS)


def expected(server: Server, endpoint: ZeroShot, request: TextScores) -> Any:
    seen = uploaded(endpoint.uploads.base64(request.images[0]))
    return server.world.values(TextScores((seen,), request.texts))


def test_the_request_is_hugging_faces_with_whole_prompts(request_: TextScores) -> None:
    server = Server()
    endpoint = backend(server)
    values(endpoint, request_)
    assert server.bodies == [
        {
            "inputs": endpoint.uploads.base64(request_.images[0]),
            "parameters": {"hypothesis_template": "{}", "candidate_labels": list(TEXTS)},
        }
    ]


@pytest.mark.parametrize("kind", [ScoreKind.SOFTMAX, ScoreKind.SIGMOID])
@pytest.mark.parametrize(
    "order",
    [
        lambda rows: rows,
        lambda rows: rows[::-1],
        lambda rows: [rows[1], rows[2], rows[0]],
        lambda rows: [rows],  # a batch of one
    ],
)
def test_scores_come_back_in_the_order_of_the_texts(
    request_: TextScores, kind: ScoreKind, order: Callable[[Any], Any]
) -> None:
    server = Server(order, score_kind=kind)
    endpoint = backend(server, score_kind=kind)
    got = values(endpoint, request_)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected(server, endpoint, request_), rtol=1e-6)
    assert endpoint.capabilities.score_kind is kind


def first(**changes: Any) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [rows[0] | changes, *rows[1:]]


FAULTS: dict[str, Callable[[Any], Any]] = {
    "missing": lambda rows: rows[1:],
    "renamed": first(label="a photo of a wolf."),
    "case": first(label=TEXTS[0].upper()),
    "space": first(label=f"{TEXTS[0]} "),
    "doubled": lambda rows: [*rows, rows[0]],
    "instead": lambda rows: [rows[0], rows[0], rows[1]],
    "extra": lambda rows: [*rows, {"label": "a wolf", "score": 0.0}],
    "no label": lambda rows: [{"score": 0.5}, *rows[1:]],
    "no score": lambda rows: [{"label": rows[0]["label"]}, *rows[1:]],
    "label is a number": first(label=3),
    "label is a list": first(label=["cat"]),
    "score is text": first(score="0.5"),
    "score is a boolean": first(score=True),
    "score is null": first(score=None),
    "score is a list": first(score=[0.5]),
    "score is beyond float32": first(score=1e39),
    "NaN": lambda rows: json.dumps(first(score=float("nan"))(rows)).encode(),
    "Infinity": lambda rows: json.dumps(first(score=float("inf"))(rows)).encode(),
    "1e999": lambda rows: b'[{"label":"a photo of a dog.","score":1e999}]',
    "negative": first(score=-0.5),
    "sum of probabilities": lambda rows: [row | {"score": row["score"] * 0.7} for row in rows],
    "no list": lambda rows: rows[0],
    "nothing": lambda rows: [],
    "null": lambda rows: None,
    "an error": lambda rows: {"error": "out of memory"},
    "two images": lambda rows: [rows, rows],
    "no JSON": lambda rows: b"<html>",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_answer_is_refused(request_: TextScores, fault: str) -> None:
    with pytest.raises(ContractError):
        values(backend(Server(FAULTS[fault])), request_)


def test_a_missing_label_is_named(request_: TextScores) -> None:
    with pytest.raises(ContractError, match=r"none named .*'ein Käfer'"):
        values(backend(Server(lambda rows: [r for r in rows if r["label"] != TEXTS[2]])), request_)


def test_top_k_leaves_the_others_unknown(request_: TextScores) -> None:
    server = Server(score_kind=ScoreKind.SOFTMAX, top_k=2)
    endpoint = backend(server, top_k=2)
    got = values(endpoint, request_)
    assert np.isnan(got).sum() == 1
    np.testing.assert_allclose(got, expected(server, endpoint, request_), rtol=1e-6)
    with pytest.raises(ContractError, match="2 finite scores"):
        values(backend(Server(lambda rows: rows[:1]), top_k=2), request_)


def test_rounding_is_declared() -> None:
    assert backend(Server(), decimals=4).capabilities.decimals == 4


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (("a cat", "a cat"), {}, "twice"),
        (("a cat",), {}, "probability 1"),
    ],
)
def test_what_cannot_be_answered_is_not_sent(
    picture: Image, texts: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    server = Server()
    with pytest.raises(InputError, match=message):
        outcomes(backend(server, **options), TextScores((picture,), texts))
    assert server.bodies == []


def test_one_text_is_fine_where_scores_are_independent(picture: Image) -> None:
    endpoint = backend(Server(score_kind=ScoreKind.SIGMOID), score_kind="sigmoid")
    assert values(endpoint, TextScores((picture,), ("a cat",))).shape == (1, 1)


def test_many_long_labels_may_come_back(picture: Image) -> None:
    texts = tuple(f"{index:05}" + "猫" * 300 for index in range(700))

    assert values(backend(Server()), TextScores((picture,), texts)).shape == (1, 700)


# -- custom handlers --------------------------------------------------------------------------


def custom(answer: Callable[[list[Row]], Any], image: str, texts: str) -> Any:
    """A handler with a form of its own, and what it was sent."""
    bodies: list[Any] = []
    server = Server()

    def handle(request: httpx.Request) -> Any:
        bodies.append(json.loads(request.content))
        upload = get(bodies[-1], image).removeprefix("data:image/png;base64,")
        return answer(server.rows(upload, get(bodies[-1], texts)))

    return handle, bodies, server


def in_order(rows: list[Row]) -> list[float]:
    return [next(row["score"] for row in rows if row["label"] == text) for text in TEXTS]


PLAIN = {"image": "inputs", "texts": "texts"}
HANDLERS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[list[Row]], Any], Any]] = {
    "philschmid": (
        {"image": "inputs.image", "texts": "inputs.candiates"},
        {"labels": "*.label", "scores": "*.score"},
        lambda rows: rows,
        {"inputs": {"image": "IMAGE", "candiates": list(TEXTS)}},
    ),
    "KServe v1": (
        {
            "image": "instances.0.image.b64",
            "texts": "instances.0.labels",
            "fixed": {"signature_name": "classify", "instances": [{"labels_form": "text"}]},
        },
        {"scores": "predictions.0"},
        lambda rows: {"predictions": [in_order(rows)]},
        {
            "signature_name": "classify",
            "instances": [
                {"labels_form": "text", "image": {"b64": "IMAGE"}, "labels": list(TEXTS)}
            ],
        },
    ),
    "predictions by name": (
        {"image": "instances.0.image", "texts": "parameters.labels"},
        {"labels": "predictions.0.*.class.name", "scores": "predictions.0.*.p"},
        lambda rows: {
            "predictions": [[{"class": {"name": r["label"]}, "p": r["score"]} for r in rows]]
        },
        {"instances": [{"image": "IMAGE"}], "parameters": {"labels": list(TEXTS)}},
    ),
    "a batch in order": (
        PLAIN,
        {"scores": "0"},
        lambda rows: [in_order(rows)],
        {"inputs": "IMAGE", "texts": list(TEXTS)},
    ),
    "two lists": (
        {"image": "image", "image_form": "data_uri", "texts": "prompts", "fixed": {"top_k": 3}},
        {"labels": "labels", "scores": "scores"},
        lambda rows: {
            "labels": [r["label"] for r in rows],
            "scores": [r["score"] for r in rows],
        },
        {"top_k": 3, "image": "data:image/png;base64,IMAGE", "prompts": list(TEXTS)},
    ),
}


@pytest.mark.parametrize("name", HANDLERS)
def test_custom_handlers(request_: TextScores, name: str) -> None:
    request, response, answer, golden = HANDLERS[name]
    handle, bodies, server = custom(answer, request["image"], request["texts"])
    endpoint = backend(handle, request=request, response=response)
    for _ in range(2):  # the fixed part is not used up
        got = values(endpoint, request_)
        np.testing.assert_allclose(got, expected(server, endpoint, request_), rtol=1e-6)
    image = endpoint.uploads.base64(request_.images[0])
    assert bodies == [json.loads(json.dumps(golden).replace("IMAGE", image))] * 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scores: {"predictions": [scores[:-1]]},
        lambda scores: {"predictions": [[*scores, 0.0]]},
        lambda scores: {"predictions": []},
        lambda scores: {"predictions": {"0": 0.5}},
        lambda scores: {"outputs": [scores]},
    ],
)
def test_scores_without_labels_must_be_as_many_as_texts(
    request_: TextScores, spoil: Callable[[list[float]], Any]
) -> None:
    handle, *_ = custom(lambda rows: spoil(in_order(rows)), "inputs", "texts")
    endpoint = backend(handle, request=PLAIN, response={"scores": "predictions.0"})
    with pytest.raises(ContractError):
        values(endpoint, request_)


def test_labels_and_scores_must_be_as_many(request_: TextScores) -> None:
    def answer(rows: list[Row]) -> Any:
        return {"labels": [r["label"] for r in rows], "scores": [r["score"] for r in rows[1:]]}

    handle, *_ = custom(answer, "inputs", "texts")
    endpoint = backend(handle, request=PLAIN, response={"labels": "labels", "scores": "scores"})
    with pytest.raises(ContractError, match="as many scores"):
        values(endpoint, request_)


def test_a_text_may_come_twice_where_scores_come_in_order(picture: Image) -> None:
    handle, *_ = custom(lambda rows: {"s": [0.5, 0.5]}, "inputs", "texts")
    endpoint = backend(handle, request=PLAIN, response={"scores": "s"})
    np.testing.assert_array_equal(values(endpoint, TextScores((picture,), ("a", "a"))), [[0.5] * 2])


# -- the declaration --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_per_request": 2}, "images_per_request is 2.*should be 1"),
        ({"score_kind": "percent"}, "score_kind is 'percent'"),
        ({"request": {"image": "inputs"}}, r"lacks request\.texts"),
        ({"request": {"image": "a", "texts": "b", "label": "c"}}, r"unknown option request\.label"),
        ({"request": {"image": "a", "texts": "a"}}, "two values for 'a'"),
        ({"request": {"image": "a", "texts": "a.b"}}, r"no place for 'a\.b'"),
        ({"request": {"image": "a.b", "texts": "a"}}, "two values for 'a'"),
        ({"request": {"image": "a.1", "texts": "b"}}, r"no place for 'a\.1'"),
        ({"request": {"image": "a", "texts": "b", "fixed": {"a": 1}}}, "two values for 'a'"),
        ({"request": {"image": "a.0", "texts": "b", "fixed": {"a": 1}}}, r"no place for 'a\.0'"),
        ({"request": {"image": "a", "texts": "b", "fixed": {"c": float("nan")}}}, "finite"),
        ({"request": {"image": "a", "texts": "b", "image_form": "url"}}, "image_form is 'url'"),
        ({"response": {"labels": "label"}}, r"lacks response\.scores"),
        ({"template": "{}"}, "unknown option template"),
    ],
)
def test_a_wrong_declaration_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        backend(Server(), **options)


def test_whatever_changes_an_answer_changes_the_key() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"url": "http://127.0.0.1:1/models/other"},
        {"model": "other"},
        {"score_kind": "sigmoid"},
        {"top_k": 2},
        {"max_image_side": 64},
        {"request": PLAIN},
        {"request": PLAIN | {"image_form": "data_uri"}},
        {"request": PLAIN | {"fixed": {"template": "an {}"}}},
        {"response": {"scores": "scores"}},
    ]
    identities = {backend(Server(), **options).capabilities.identity for options in variants}
    assert len(identities) == len(variants)
    same = [{"a": 1, "b": 2}, {"b": 2, "a": 1}]
    assert len({backend(Server(), request=PLAIN | {"fixed": f}).capabilities for f in same}) == 1


def test_only_texts_are_scored() -> None:
    declared = backend(Server(), texts_per_request=5).capabilities
    assert declared.access is Access.SCORES
    assert (declared.images_per_request, declared.texts_per_request) == (1, 5)


def test_a_model_that_is_being_loaded_means_later(request_: TextScores) -> None:
    def loading(_: httpx.Request) -> httpx.Response:
        body = {"error": "Model clip is currently loading", "estimated_time": 20.0}
        return reply(body, 503, **{"retry-after": "20"})

    [outcome] = outcomes(backend(loading, busy=example("zero-shot")["busy"]), request_)
    assert isinstance(outcome, RateLimited)
    assert outcome.retry_after == 20


# -- dotted paths -----------------------------------------------------------------------------


def test_put_and_get_are_inverse() -> None:
    body: dict[str, Any] = {}
    for path, value in {"a.b": 1, "a.c.0.d": 2, "a.c.1": [3], "0": None}.items():
        put(body, path, value)
        assert get(body, path) == value
    assert body == {"a": {"b": 1, "c": [{"d": 2}, [3]]}, "0": None}


def test_a_star_gathers() -> None:
    data = {"rows": [{"x": [1, 2]}, {"x": [3]}]}
    assert get(data, "rows.*.x.0") == [1, 3]
    assert get(data, "rows.*.x.*") == [[1, 2], [3]]
    assert get(data, "") is data


@pytest.mark.parametrize("path", ["rows.2", "rows.x", "rows.*.y", "x", "rows.0.x.0.z", "rows.-1"])
def test_a_place_that_is_not_there_breaks_the_contract(path: str) -> None:
    with pytest.raises(ContractError):
        get({"rows": [{"x": [1]}, {"x": [3]}]}, path)


# -- examples and conformance -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero-shot", "zero-shot-custom"])
def test_examples_open(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options = example(name)
    assert options.pop("protocol") == "zero-shot"
    with pytest.raises(InputError, match=options["key_env"]):
        ZeroShot(**options)
    monkeypatch.setenv(options["key_env"], "hf_example")
    endpoint = ZeroShot(**options)
    assert endpoint.transport.origin.scheme == "https"
    assert endpoint.capabilities.price is not None
    assert endpoint.capabilities.refusals_free


def test_the_custom_example_speaks_to_its_handler(
    monkeypatch: pytest.MonkeyPatch, request_: TextScores
) -> None:
    options = example("zero-shot-custom")
    del options["protocol"]
    monkeypatch.setenv(options["key_env"], "hf_example")
    handle, bodies, _ = custom(lambda rows: rows, "inputs.image", "inputs.candiates")
    values(ZeroShot(inner=served(handle), **options), request_)
    assert bodies[0]["inputs"].keys() == {"image", "candiates"}


@pytest.mark.parametrize(
    "setting",
    [
        {"score_kind": ScoreKind.SOFTMAX},
        {"score_kind": ScoreKind.SIGMOID, "decimals": 3},
        {"score_kind": ScoreKind.SOFTMAX, "top_k": 2, "texts_per_request": 3},
    ],
    ids=str,
)
class TestConformance(BackendConformance):
    @pytest.fixture(autouse=True)
    def _setting(self, setting: dict[str, Any]) -> None:
        self._options = setting

    def make_backend(self) -> Backend:
        return backend(Server(**self._options), price={"per_image": 0.001}, **self._options)
