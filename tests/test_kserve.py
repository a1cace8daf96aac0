"""Tensors over HTTP (V2 inference protocol): batches, soft prompts, embeddings, broken answers."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from blackbox_vlm.backends.kserve import KServe
from doubles import SOFT_PROMPTS, LinearWorld, declare
from hosted import EXAMPLES, example, noise, outcomes, served, uploaded, values

from blackbox_vlm.backend import (
    Access,
    Backend,
    ImageEmbeddings,
    PromptScores,
    Request,
    ScoreKind,
    SoftPrompts,
    TextEmbeddings,
    TextScores,
    query_key,
)
from blackbox_vlm.errors import ContractError, InputError, ModelChanged
from blackbox_vlm.images import Image
from blackbox_vlm.testing import BackendConformance

ROOT = "http://127.0.0.1:1/models"
SOFT = {"context_tokens": 4, "width": 6, "token_std": 0.02}
TEXTS = ("a photo of a cat.", "a photo of a dog.", "ein Käfer")
WORLD = LinearWorld(declare(Access.SOFT))

Spoil = Callable[[Any], Any]


class Server:
    """A model server over the linear world; keeps the requests it was sent."""

    def __init__(self, spoil: Spoil = lambda answer: answer, **said: Any) -> None:
        self.spoil = spoil
        self.said = said
        self.paths: list[str] = []
        self.bodies: list[Any] = []

    def __call__(self, request: httpx.Request) -> Any:
        self.paths.append(request.url.raw_path.decode())
        body = json.loads(request.content)
        self.bodies.append(body)
        name = body["outputs"][0]["name"]
        values = WORLD.values(read(body["inputs"]))
        output = {
            "name": name,
            "shape": list(values.shape),
            "datatype": "FP32",
            "data": values.ravel().tolist(),
        }
        answer = {"model_name": "clip", "id": body["id"], "outputs": [output], **self.said}
        return self.spoil(answer)


def read(inputs: list[Any]) -> Request:
    """The question that the tensors ask, by their names alone."""
    tensors = {tensor["name"]: tensor for tensor in inputs}
    for tensor in tensors.values():
        assert len(tensor["data"]) == np.prod(tensor["shape"])
    data = {name: tensor["data"] for name, tensor in tensors.items()}
    pictures = tuple(map(uploaded, data.get("image", [])))
    if "offset" in data:
        offset = np.array(data["offset"], np.float32).reshape(tensors["offset"]["shape"])
        [template] = data["template"]
        return PromptScores(pictures, tuple(data["class_names"]), template, offset)
    if "prompts" not in data:
        return ImageEmbeddings(pictures)
    texts = tuple(data["prompts"])
    return TextScores(pictures, texts) if pictures else TextEmbeddings(texts)


def backend(server: Server, **options: Any) -> KServe:
    options = {"url": ROOT, "model": "clip", "images_per_request": 0, **options}
    return KServe(inner=served(server), **options)


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Image, ...]:
    return noise(tmp_path, 2)


@pytest.fixture
def request_(pictures: tuple[Image, ...]) -> TextScores:
    return TextScores(pictures, TEXTS)


@pytest.fixture
def prompt(pictures: tuple[Image, ...]) -> PromptScores:
    shape = (SOFT_PROMPTS.context_tokens, SOFT_PROMPTS.width)
    offset = np.random.default_rng(2).normal(0, 0.1, shape).astype(np.float32)
    return PromptScores(pictures, ("cat", "dog", "Käfer"), "a photo of a {}.", offset)


def seen(endpoint: KServe, images: tuple[Image, ...]) -> tuple[Image, ...]:
    return tuple(uploaded(endpoint.uploads.base64(image)) for image in images)


# -- what is sent -----------------------------------------------------------------------------


def texts(name: str, values: tuple[str, ...]) -> Any:
    return {"name": name, "shape": [len(values), 1], "datatype": "BYTES", "data": list(values)}


def test_images_times_texts_are_one_request(request_: TextScores) -> None:
    server = Server()
    endpoint = backend(server)
    got = values(endpoint, request_)
    uploads = tuple(endpoint.uploads.base64(image) for image in request_.images)
    assert server.paths == ["/models/v2/models/clip/infer"]
    assert server.bodies == [
        {
            "id": query_key(request_, endpoint.capabilities.identity),
            "inputs": [texts("image", uploads), texts("prompts", TEXTS)],
            "outputs": [{"name": "logits"}],
        }
    ]
    assert got.dtype == np.float32
    assert got.shape == (2, 3)
    expected = WORLD.values(TextScores(seen(endpoint, request_.images), TEXTS))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert endpoint.capabilities.score_kind is ScoreKind.LOGITS


def test_a_soft_prompt_is_a_tensor(prompt: PromptScores) -> None:
    server = Server()
    endpoint = backend(server, **SOFT)
    got = values(endpoint, prompt)
    assert endpoint.capabilities.access is Access.SOFT
    assert endpoint.capabilities.soft_prompts == SoftPrompts(4, 6, 0.02)
    [body] = server.bodies
    assert body["inputs"][1:] == [
        texts("class_names", ("cat", "dog", "Käfer")),
        texts("template", ("a photo of a {}.",)),
        {
            "name": "offset",
            "shape": [4, 6],
            "datatype": "FP32",
            "data": [float(x) for x in prompt.offset.ravel()],  # every bit of a float32
        },
    ]
    images = seen(endpoint, prompt.images)
    asked = PromptScores(images, prompt.class_names, prompt.template, prompt.offset)
    np.testing.assert_allclose(got, WORLD.values(asked), rtol=1e-6)
    assert values(endpoint, TextScores(prompt.images, TEXTS)).shape == (2, 3)


@pytest.mark.parametrize("shape", [(4, 5), (6, 4), (24,)])
def test_an_offset_of_another_shape_is_not_sent(
    prompt: PromptScores, shape: tuple[int, ...]
) -> None:
    server = Server()
    offset = np.zeros(shape, np.float32)
    other = PromptScores(prompt.images, prompt.class_names, prompt.template, offset)
    with pytest.raises(InputError, match=r"takes \[4, 6\]"):
        outcomes(backend(server, **SOFT), prompt, other)
    assert server.bodies == [], "nor is what came before it in the batch"


def test_embeddings_have_an_output_for_each_side(pictures: tuple[Image, ...]) -> None:
    server = Server()
    endpoint = backend(server, access="embeddings", text_output="t")
    images = values(endpoint, ImageEmbeddings(pictures))
    of_texts = values(endpoint, TextEmbeddings(TEXTS))
    assert [body["outputs"] for body in server.bodies] == [
        [{"name": "image_embeddings"}],
        [{"name": "t"}],
    ]
    assert [[t["name"] for t in body["inputs"]] for body in server.bodies] == [
        ["image"],
        ["prompts"],
    ]
    expected = WORLD.values(ImageEmbeddings(seen(endpoint, pictures)))
    np.testing.assert_allclose(images, expected, rtol=1e-6)
    np.testing.assert_allclose(of_texts, WORLD.values(TextEmbeddings(TEXTS)), rtol=1e-6)


def test_tensors_have_the_declared_names(prompt: PromptScores) -> None:
    names = {
        "image_input": "i",
        "class_input": "c",
        "template_input": "t",
        "offset_input": "o",
        "output": "y",
    }
    server = Server()
    endpoint = backend(server, **SOFT, **names)
    [call] = [endpoint.encode(prompt)]
    assert [tensor["name"] for tensor in call.body["inputs"]] == ["i", "c", "t", "o"]
    assert call.body["outputs"] == [{"name": "y"}]
    call = backend(server, text_input="p").encode(TextScores(prompt.images, TEXTS))
    assert [tensor["name"] for tensor in call.body["inputs"]] == ["image", "p"]


def test_version_and_name_are_in_the_path(request_: TextScores) -> None:
    server = Server(model_name="clip/b 32", model_version="7")
    values(backend(server, model="clip/b 32", version="7"), request_)
    assert server.paths == ["/models/v2/models/clip%2Fb%2032/versions/7/infer"]


def test_a_large_answer_is_read(pictures: tuple[Image, ...]) -> None:
    names = tuple(f"thing {index}" for index in range(25_000))
    server = Server(lambda answer: data(lambda flat: [-1.2345678901234567e-30] * len(flat))(answer))
    assert values(backend(server), TextScores(pictures, names)).shape == (2, 25_000)


# -- what is answered -------------------------------------------------------------------------


def output(**changes: Any) -> Spoil:
    """A change of the one output."""
    return lambda answer: answer | {"outputs": [answer["outputs"][0] | changes]}


def data(change: Spoil) -> Spoil:
    return lambda answer: output(data=change(answer["outputs"][0]["data"]))(answer)


def without(name: str) -> Spoil:
    return lambda answer: {key: value for key, value in answer.items() if key != name}


def lacking(name: str) -> Spoil:
    return lambda answer: answer | {"outputs": [without(name)(answer["outputs"][0])]}


def raw(text: str) -> Spoil:
    return lambda answer: (
        json.dumps(data(lambda d: [0.12345, *d[1:]])(answer)).replace("0.12345", text).encode()
    )


@pytest.mark.parametrize(
    "spoil",
    [
        data(lambda flat: [flat[:3], flat[3:]]),  # nested
        output(datatype="FP64"),
        output(datatype="FP16"),
        lambda answer: answer | {"outputs": [{"name": "other"}, *answer["outputs"]]},
        without("id"),
        lambda answer: answer | {"id": ""},
        lambda answer: answer | {"model_version": None},
        lambda answer: answer | {"parameters": {}},
    ],
)
def test_what_the_protocol_leaves_open_is_read(request_: TextScores, spoil: Spoil) -> None:
    np.testing.assert_array_equal(
        values(backend(Server(spoil)), request_), values(backend(Server()), request_)
    )


FAULTS: dict[str, Spoil] = {
    "too short": data(lambda d: d[:-1]),
    "too long": data(lambda d: [*d, 0.0]),
    "empty": data(lambda d: []),
    "text": data(lambda d: ["0.5", *d[1:]]),
    "boolean": data(lambda d: [True, *d[1:]]),
    "null": data(lambda d: [None, *d[1:]]),
    "NaN": raw("NaN"),
    "Infinity": raw("Infinity"),
    "1e999": raw("1e999"),
    "beyond float32": raw("-1e39"),
    "base64": data(lambda d: "AAAA"),
    "ragged": data(lambda d: [d[:2], d[2:]]),
    "nested the other way": data(lambda d: [d[:2], d[2:4], d[4:]]),
    "partly nested": data(lambda d: [d[0], d[1:]]),
    "shape is text": output(shape="2,3"),
    "no shape": lacking("shape"),
    "integers": output(datatype="INT64"),
    "BYTES": output(datatype="BYTES"),
    "no datatype": lacking("datatype"),
    "no data": lacking("data"),
    "another name": output(name="probs"),
    "no name": lacking("name"),
    "output twice": lambda a: a | {"outputs": a["outputs"] * 2},
    "no outputs": without("outputs"),
    "outputs by name": lambda a: a | {"outputs": {"logits": a["outputs"][0]}},
    "output is a list": lambda a: a | {"outputs": [[1.0]]},
    "another request's id": lambda a: a | {"id": "0" * 64},
    "id is a number": lambda a: a | {"id": 1},
    "no model": without("model_name"),
    "model is a number": lambda a: a | {"model_name": 3},
    "version is a number": lambda a: a | {"model_version": 1},
    "an error": lambda a: {"error": "out of memory"},
    "a list": lambda a: [a],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_answer_is_refused(request_: TextScores, fault: str) -> None:
    with pytest.raises(ContractError):
        values(backend(Server(FAULTS[fault])), request_)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ([3, 2], 6),
        ([1, 3], 3),
        ([2, 2], 4),
        ([2, 4], 8),
        ([6], 6),
        ([2, 3, 1], 6),
        ([2.0, 3.0], 6),
        ([2, True], 2),
        ([], 1),
    ],
)
def test_another_shape_is_refused(request_: TextScores, shape: list[Any], count: int) -> None:
    server = Server(output(shape=shape, data=[0.5] * count))
    with pytest.raises(ContractError, match=r"the output's shape: wanted \(2, 3\)"):
        values(backend(server), request_)


def test_answers_swapped_between_requests_are_refused(request_: TextScores) -> None:
    server = Server()
    endpoint = backend(server)
    values(endpoint, request_)
    stale = server.bodies[0]["id"]
    server.spoil = lambda answer: answer | {"id": stale}
    with pytest.raises(ContractError, match="another request"):
        values(endpoint, TextScores(request_.images[::-1], TEXTS))
    values(endpoint, request_)


@pytest.mark.parametrize(
    ("shape", "flat"), [([2, 0], []), ([0, 16], []), ([2, 16, 1], [0.5] * 32), ([2, -16], [0.5])]
)
def test_embeddings_of_no_width_are_refused(
    pictures: tuple[Image, ...], shape: list[int], flat: list[float]
) -> None:
    server = Server(output(shape=shape, data=flat))
    with pytest.raises(ContractError, match="shape"):
        values(backend(server, access="embeddings"), ImageEmbeddings(pictures))


def test_another_model_is_noticed(request_: TextScores) -> None:
    with pytest.raises(ModelChanged):
        values(backend(Server(model_name="clip-2")), request_)
    values(backend(Server(model_name="clip-2"), answered_model="clip-2"), request_)


def test_another_version_is_noticed(request_: TextScores) -> None:
    with pytest.raises(ModelChanged, match="version '2'") as caught:
        values(backend(Server(model_version="2"), version="1"), request_)
    assert caught.value.final
    server = Server(model_version="1")
    endpoint = backend(server)  # the first that answers counts
    values(endpoint, request_)
    server.said["model_version"] = "2"
    with pytest.raises(ModelChanged, match="'1' was asked for or answered before"):
        values(endpoint, request_)


# -- the declaration --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"access": "soft"}, "wanted access 'soft' with context_tokens, width and token_std"),
        ({"access": "scores", **SOFT}, "or another access without them"),
        ({"access": "embeddings", **SOFT}, "or another access without them"),
        ({"context_tokens": 4, "width": 6}, r"got .*\(4, 6, None\); wanted all three or none"),
        ({"access": "soft", "token_std": 0.02}, "wanted all three or none"),
        ({"access": "label"}, "access is 'label'"),
        ({**SOFT, "token_std": 0}, "token_std is 0"),
        ({"version": 1}, "version is 1"),
        ({"output": ""}, "output is ''"),
        ({"outputs": ["logits"]}, "unknown option outputs"),
    ],
)
def test_a_wrong_declaration_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        backend(Server(), **options)


@pytest.mark.parametrize(
    ("options", "access"),
    [
        ({}, Access.SCORES),
        ({"access": "scores"}, Access.SCORES),
        (SOFT, Access.SOFT),
        ({"access": "soft", **SOFT}, Access.SOFT),
        ({"access": "embeddings"}, Access.EMBEDDINGS),
    ],
)
def test_access_follows_from_the_options(options: dict[str, Any], access: Access) -> None:
    assert backend(Server(), **options).capabilities.access is access


def test_whatever_changes_an_answer_changes_the_key() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"model": "other"},
        {"version": "1"},
        {"version": "2"},
        {"score_kind": "cosine"},
        {"image_input": "x"},
        {"text_input": "x"},
        {"output": "x"},
    ]
    identities = {backend(Server(), **options).capabilities.identity for options in variants}
    assert len(identities) == len(variants)


# -- example and conformance ------------------------------------------------------------------


def test_the_example_opens_and_asks(monkeypatch: pytest.MonkeyPatch, request_: TextScores) -> None:
    options = example("kserve")
    assert options.pop("protocol") == "kserve"
    with pytest.raises(InputError, match=options["key_env"]):
        KServe(**options)
    monkeypatch.setenv(options["key_env"], "key-4711")
    endpoint = KServe(inner=served(Server(model_version="1")), **options)
    assert endpoint.transport.origin.scheme == "https"
    assert endpoint.capabilities.price is not None
    assert endpoint.capabilities.images_per_request == 32
    assert values(endpoint, request_).shape == (2, 3)


def test_the_examples_soft_prompt_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (EXAMPLES / "kserve.toml").read_text(encoding="utf-8")
    for line in ("context_tokens", "width", "token_std", "offset_input"):
        assert f"\n# {line} = " in text
        text = text.replace(f"\n# {line} = ", f"\n{line} = ")
    options = tomllib.loads(text)
    monkeypatch.setenv(options["key_env"], "key-4711")
    del options["protocol"]
    assert KServe(**options).capabilities.access is Access.SOFT


@pytest.mark.parametrize(
    "setting",
    [{"images_per_request": 1, "texts_per_request": 2}, SOFT, {"access": "embeddings"}],
    ids=["scores", "soft", "embeddings"],
)
class TestConformance(BackendConformance):
    @pytest.fixture(autouse=True)
    def _setting(self, setting: dict[str, Any]) -> None:
        self._options = setting

    def make_backend(self) -> Backend:
        options = {"price": {}, "idempotency_header": "key", **self._options}
        return backend(Server(), **options)
