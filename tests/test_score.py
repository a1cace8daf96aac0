"""Image against texts over HTTP, in vLLM's and Roboflow's dialect, and their broken answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from blackbox_vlm.backends.score import Score
from doubles import LinearWorld, declare
from hosted import answers, example, noise, served, uploaded, values

from blackbox_vlm.backend import Access, Backend, Price, ScoreKind, TextScores
from blackbox_vlm.errors import ContractError, InputError, ModelChanged
from blackbox_vlm.testing import BackendConformance

URL = {"vllm": "http://127.0.0.1:1/v1/score", "roboflow": "http://127.0.0.1:1/clip/compare"}
DIALECTS = sorted(URL)
TEXTS = ("a photo of a cat.", "a photo of a dog.", "a photo of a cat.")  # one of them twice
WORLD = LinearWorld(declare(score_kind=ScoreKind.COSINE))

Spoil = Callable[[Any], Any]


def cosines(upload: str, texts: list[str]) -> list[float]:
    """What the linear world gives for the bytes that were uploaded."""
    rows = WORLD.values(TextScores((uploaded(upload),), tuple(texts)))
    return [float(value) for value in rows[0]]


def vllm(body: Any) -> Any:
    [part] = body["queries"]["content"]
    upload = part["image_url"]["url"].removeprefix("data:image/png;base64,")
    texts = body["documents"]
    rows = [
        {"index": index, "object": "score", "score": score}
        for index, score in enumerate(cosines(upload, texts))
    ]
    usage = {"prompt_tokens": 11 * len(texts), "total_tokens": 11 * len(texts)}
    return {"id": "score-1", "model": body["model"], "data": rows, "usage": usage}


def roboflow(body: Any) -> Any:
    similarity = cosines(body["subject"]["value"], body["prompt"])
    return {"similarity": similarity, "time": 0.01, "inference_id": "1"}


SERVERS: dict[str, Spoil] = {"vllm": vllm, "roboflow": roboflow}


def backend(
    dialect: str,
    spoil: Spoil = lambda data: data,
    bodies: list[httpx.Request] | None = None,
    **options: Any,
) -> Score:
    def serve(request: httpx.Request) -> Any:
        assert str(request.url) == URL[dialect]
        if bodies is not None:
            bodies.append(request)
        return spoil(SERVERS[dialect](json.loads(request.content)))

    options = {"url": URL[dialect], "model": "clip", "dialect": dialect, **options}
    return Score(inner=served(serve), **options)


@pytest.fixture
def request_(tmp_path: Path) -> TextScores:
    return TextScores(noise(tmp_path, 1), TEXTS)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_request_is_the_dialects(request_: TextScores, dialect: str) -> None:
    sent: list[httpx.Request] = []
    endpoint = backend(dialect, bodies=sent)
    answers(endpoint, request_)
    image = endpoint.uploads.base64(request_.images[0])
    golden = {
        "vllm": {
            "model": "clip",
            "queries": {
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
                ]
            },
            "documents": list(TEXTS),
        },
        "roboflow": {
            "subject": {"type": "base64", "value": image},
            "subject_type": "image",
            "prompt": list(TEXTS),
            "prompt_type": "text",
            "clip_version_id": "clip",
        },
    }
    assert [json.loads(request.content) for request in sent] == [golden[dialect]]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_scores_are_cosines_in_the_order_of_the_texts(request_: TextScores, dialect: str) -> None:
    endpoint = backend(dialect)
    upload = endpoint.uploads.base64(request_.images[0])
    got = values(endpoint, request_)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [cosines(upload, list(TEXTS))], rtol=1e-6)
    declared = endpoint.capabilities
    assert (declared.score_kind, declared.logit_scale) == (ScoreKind.COSINE, 100.0)
    assert (declared.access, declared.images_per_request) == (Access.SCORES, 1)


def test_rows_are_put_in_order_by_their_index(request_: TextScores) -> None:
    def turn(answer: Any) -> Any:
        first, *rest = answer["data"]
        return answer | {"data": [*rest, first]}

    straight = values(backend("vllm"), request_)
    np.testing.assert_array_equal(values(backend("vllm", turn), request_), straight)
    assert straight[0, 0] != straight[0, 1]


def test_the_answer_to_very_many_texts_is_read(request_: TextScores) -> None:
    """vLLM has no limit, and its rows are long."""
    texts = tuple(f"thing {index}" for index in range(40_000))

    def serve(request: httpx.Request) -> Any:
        row = {"object": "score", "score": 0.12345678901234567}
        return {"model": "clip", "data": [row | {"index": index} for index in range(len(texts))]}

    endpoint = Score(url=URL["vllm"], model="clip", inner=served(serve))
    assert values(endpoint, TextScores(request_.images, texts)).shape == (1, len(texts))


def first(**changes: Any) -> Spoil:
    return lambda data: data | {"data": [data["data"][0] | changes, *data["data"][1:]]}


def without(name: str) -> Spoil:
    return lambda data: {key: value for key, value in data.items() if key != name}


def raw(text: str) -> Spoil:
    """The first score as JSON text, which may be none."""
    return lambda data: json.dumps(first(score=0.12345)(data)).replace("0.12345", text).encode()


def similarity(change: Spoil) -> Spoil:
    return lambda data: data | {"similarity": change(data["similarity"])}


FAULTS: list[tuple[str, str, Spoil]] = [
    ("vllm", "too short", lambda d: d | {"data": d["data"][1:]}),
    ("vllm", "too long", lambda d: d | {"data": [*d["data"], {"index": 3, "score": 0.1}]}),
    ("vllm", "doubled row", lambda d: d | {"data": [*d["data"], d["data"][0]]}),
    ("vllm", "index twice", first(index=1)),
    ("vllm", "index beyond", first(index=3)),
    ("vllm", "index negative", first(index=-1)),
    ("vllm", "index is text", first(index="0")),
    ("vllm", "index is a boolean", first(index=False)),
    ("vllm", "no index", lambda d: d | {"data": [{"score": 0.1}, *d["data"][1:]]}),
    ("vllm", "no score", lambda d: d | {"data": [{"index": 0}, *d["data"][1:]]}),
    ("vllm", "score is text", first(score="0.5")),
    ("vllm", "score is a boolean", first(score=True)),
    ("vllm", "score is null", first(score=None)),
    ("vllm", "score is a list", first(score=[0.1])),
    ("vllm", "NaN", raw("NaN")),
    ("vllm", "Infinity", raw("-Infinity")),
    ("vllm", "1e999", raw("1e999")),
    ("vllm", "beyond float32", raw("1e39")),
    ("vllm", "no data", without("data")),
    ("vllm", "data is an object", lambda d: d | {"data": {"0": 0.5}}),
    ("vllm", "no model", without("model")),
    ("vllm", "another answer", lambda d: [d]),
    ("roboflow", "too short", similarity(lambda s: s[1:])),
    ("roboflow", "too long", similarity(lambda s: [*s, 0.1])),
    ("roboflow", "by name", similarity(lambda s: {"a": s[0]})),
    ("roboflow", "text", similarity(lambda s: ["0.5", *s[1:]])),
    ("roboflow", "boolean", similarity(lambda s: [False, *s[1:]])),
    ("roboflow", "null", similarity(lambda s: [None, *s[1:]])),
    ("roboflow", "nested", similarity(lambda s: [s])),
    ("roboflow", "a number", similarity(lambda s: s[0])),
    ("roboflow", "nothing", without("similarity")),
    ("roboflow", "NaN", lambda d: json.dumps(similarity(lambda s: [np.nan] * 3)(d)).encode()),
]


@pytest.mark.parametrize(
    ("dialect", "spoil"),
    [(dialect, spoil) for dialect, _, spoil in FAULTS],
    ids=[f"{dialect}: {name}" for dialect, name, _ in FAULTS],
)
def test_a_broken_answer_is_refused(request_: TextScores, dialect: str, spoil: Spoil) -> None:
    with pytest.raises(ContractError):
        answers(backend(dialect, spoil, price={"per_million_tokens": 1.0}), request_)


def test_another_model_is_noticed(request_: TextScores) -> None:
    def other(data: Any) -> Any:
        return data | {"model": "clip-2"}

    with pytest.raises(ModelChanged):
        answers(backend("vllm", other), request_)
    assert (
        answers(backend("vllm", other, answered_model="clip-2"), request_)[0].model_id == "clip-2"
    )


def test_the_tokens_of_the_answer_are_what_is_billed(request_: TextScores) -> None:
    price = {"per_million_tokens": 2.0, "most_tokens": 1000}
    [counted] = answers(backend("vllm", price=price), request_)
    assert counted.cost == pytest.approx(33 * 2e-6)
    for spoil in (without("usage"), lambda data: data | {"usage": {"total_tokens": -1}}):
        [silent] = answers(backend("vllm", spoil, price=price), request_)
        assert silent.cost == pytest.approx(1000 * 2e-6)
    assert backend("vllm", price=price).capabilities.price == Price(**price)  # type: ignore[arg-type]


def test_the_key_is_a_bearer_token_and_in_no_body(
    monkeypatch: pytest.MonkeyPatch, request_: TextScores
) -> None:
    monkeypatch.setenv("ROBOFLOW_API_KEY", "rf-4711")
    sent: list[httpx.Request] = []
    answers(backend("roboflow", bodies=sent, key_env="ROBOFLOW_API_KEY"), request_)
    [request] = sent
    assert request.headers["authorization"] == "Bearer rf-4711"
    assert b"rf-4711" not in request.content
    assert "rf-4711" not in str(request.url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_per_request": 0}, "images_per_request is 0.*should be 1"),
        ({"dialect": "jina"}, "dialect is 'jina'"),
        ({"logit_scale": 0}, "logit_scale is 0"),
        ({"request": {}}, "unknown option request"),
    ],
)
def test_a_wrong_declaration_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Score(**({"url": URL["vllm"], "model": "clip"} | options))


def test_whatever_changes_an_answer_changes_the_key() -> None:
    variants = [
        backend("vllm"),
        backend("roboflow"),
        backend("vllm", model="other"),
        backend("vllm", score_kind="sigmoid"),
    ]
    assert len({variant.capabilities.identity for variant in variants}) == len(variants)


@pytest.mark.parametrize(("name", "dialect"), [("score", "vllm"), ("roboflow", "roboflow")])
def test_examples_open(monkeypatch: pytest.MonkeyPatch, name: str, dialect: str) -> None:
    options = example(name)
    assert options.pop("protocol") == "score"
    with pytest.raises(InputError, match=options["key_env"]):
        Score(**options)
    monkeypatch.setenv(options["key_env"], "key-4711")
    endpoint = Score(**options)
    assert endpoint.options.dialect == dialect
    assert endpoint.transport.origin.scheme == "https"
    assert endpoint.capabilities.price is not None


@pytest.mark.parametrize("dialect", DIALECTS)
class TestConformance(BackendConformance):
    @pytest.fixture(autouse=True)
    def _setting(self, dialect: str) -> None:
        self._dialect = dialect

    def make_backend(self) -> Backend:
        price = {"per_request": 0.001}
        return backend(self._dialect, price=price, texts_per_request=3, idempotency_header="key")
