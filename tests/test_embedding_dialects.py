"""Every dialect with the request that its service documents and an answer in the service's form.

The endpoint files in `examples/` are what is opened, so that they are tested with it.
"""

from __future__ import annotations

import base64
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from blackbox_vlm.backends._dialects import Dialect, find, named
from blackbox_vlm.backends._images import encode
from blackbox_vlm.backends.embeddings import Embeddings
from hosted import EXAMPLES, outcomes, served

from blackbox_vlm.backend import Answer, ImageEmbeddings, Outcome, Request, TextEmbeddings
from blackbox_vlm.endpoint import Endpoint
from blackbox_vlm.errors import ContractError, InputError
from blackbox_vlm.images import Image

KEY = "sk-0123456789abcdef"
UNTOLD = 99  # tokens that are reserved, where the answer does not say


def b64(*numbers: float) -> str:
    return base64.b64encode(np.array(numbers, dtype="<f4").tobytes()).decode()


def ramp(width: int, sign: float = 1.0) -> list[float]:
    return [sign * number / 2 for number in range(1, width + 1)]


@dataclass(frozen=True)
class Exchange:
    """A request and its answer; BASE64 and DATA_URI in the request stand for the picture."""

    body: Any
    answer: Any
    values: list[list[float]]
    path: str = ""
    tokens: int = UNTOLD


@dataclass(frozen=True)
class Case:
    file: str
    dialect: str
    limits: tuple[int | None, int | None]
    url: str
    images: Exchange
    texts: Exchange
    header: str = "authorization"
    model_at: str | None = "model"  # where the answer names it


def openai_shape(model: str, tokens: int, *embeddings: Any, **more: Any) -> dict[str, Any]:
    data = [{"object": "embedding", "index": i, "embedding": e} for i, e in enumerate(embeddings)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage, **more}


CLIP = "openai/clip-vit-base-patch32"
TWO = [[0.5, 1.0], [-0.5, -1.0]]

CASES = [
    Case(
        file="embeddings.toml",
        dialect="infinity",
        limits=(32, 2048),
        url="http://127.0.0.1:7997/embeddings",
        images=Exchange(
            body={
                "model": CLIP,
                "input": ["DATA_URI", "DATA_URI"],
                "modality": "image",
                "encoding_format": "base64",
            },
            answer=openai_shape(CLIP, 12, b64(0.5, 1), b64(-0.5, -1), id="infinity-1", created=1),
            values=TWO,
            tokens=12,
        ),
        texts=Exchange(
            body={
                "model": CLIP,
                "input": ["a cat", "a dog"],
                "modality": "text",
                "encoding_format": "base64",
            },
            answer=openai_shape(CLIP, 10, b64(0.5, 1), b64(-0.5, -1), id="infinity-2", created=1),
            values=TWO,
            tokens=10,
        ),
    ),
    Case(
        file="nv-clip.toml",
        dialect="nv-clip",
        limits=(8, 64),
        url="https://integrate.api.nvidia.com/v1/embeddings",
        images=Exchange(
            body={
                "model": "nvidia/nvclip",
                "input": ["DATA_URI", "DATA_URI"],
                "encoding_format": "float",
            },
            answer=openai_shape("nvidia/nvclip", 0, *TWO)
            | {"usage": {"num_images": 2, "prompt_tokens": 0, "total_tokens": 0}},
            values=TWO,
            tokens=0,
        ),
        texts=Exchange(
            body={
                "model": "nvidia/nvclip",
                "input": ["a cat", "a dog"],
                "encoding_format": "float",
            },
            answer=openai_shape("nvidia/nvclip", 8, *TWO),
            values=TWO,
            tokens=8,
        ),
    ),
    Case(
        file="vllm-embeddings.toml",
        dialect="vllm",
        limits=(1, None),
        url="http://127.0.0.1:8000/v1/embeddings",
        images=Exchange(
            body={
                "model": CLIP,
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "DATA_URI"}}],
                    }
                ],
                "encoding_format": "base64",
            },
            answer=openai_shape(CLIP, 50, b64(0.5, 1), id="embd-1", created=1)
            | {"usage": {"prompt_tokens": 50, "total_tokens": 50, "completion_tokens": 0}},
            values=TWO[:1],
            tokens=50,
        ),
        texts=Exchange(
            body={"model": CLIP, "input": ["a cat", "a dog"], "encoding_format": "base64"},
            answer=openai_shape(CLIP, 8, b64(0.5, 1), b64(-0.5, -1), id="embd-2", created=1),
            values=TWO,
            tokens=8,
        ),
    ),
    Case(
        file="jina.toml",
        dialect="jina",
        limits=(8, 512),
        url="https://api.jina.ai/v1/embeddings",
        images=Exchange(
            body={
                "model": "jina-clip-v2",
                "input": [{"image": "BASE64"}, {"image": "BASE64"}],
                "embedding_type": "base64",
                "dimensions": 512,
                "normalized": True,
            },
            answer=openai_shape("jina-clip-v2", 8000, b64(*ramp(512)), b64(*ramp(512, -1))),
            values=[ramp(512), ramp(512, -1)],
            tokens=8000,
        ),
        texts=Exchange(
            body={
                "model": "jina-clip-v2",
                "input": [{"text": "a cat"}, {"text": "a dog"}],
                "embedding_type": "base64",
                "dimensions": 512,
                "normalized": True,
            },
            answer=openai_shape("jina-clip-v2", 14, b64(*ramp(512)), b64(*ramp(512, -1))),
            values=[ramp(512), ramp(512, -1)],
            tokens=14,
        ),
    ),
    Case(
        file="cohere.toml",
        dialect="cohere",
        limits=(1, 96),
        url="https://api.cohere.com/v2/embed",
        images=Exchange(
            body={
                "model": "embed-v4.0",
                "input_type": "image",
                "embedding_types": ["float"],
                "images": ["DATA_URI"],
                "output_dimension": 1024,
            },
            answer={
                "id": "5807ee2e",
                "embeddings": {"float": [ramp(1024)]},
                "texts": [],
                "images": [{"width": 2, "height": 2, "format": "png", "bit_depth": 24}],
                "meta": {
                    "api_version": {"version": "2"},
                    "billed_units": {"images": 1, "image_tokens": 258.0},
                },
                "response_type": "embeddings_by_type",
            },
            values=[ramp(1024)],
            tokens=258,
        ),
        texts=Exchange(
            body={
                "model": "embed-v4.0",
                "input_type": "search_query",
                "embedding_types": ["float"],
                "texts": ["a cat", "a dog"],
                "output_dimension": 1024,
            },
            answer={
                "id": "da6e531f",
                "embeddings": {"float": [ramp(1024), ramp(1024, -1)]},
                "texts": ["a cat", "a dog"],
                "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 4}},
                "response_type": "embeddings_by_type",
            },
            values=[ramp(1024), ramp(1024, -1)],
            tokens=4,
        ),
        model_at=None,
    ),
    Case(
        file="voyage.toml",
        dialect="voyage",
        limits=(16, 1000),
        url="https://api.voyageai.com/v1/multimodalembeddings",
        images=Exchange(
            body={
                "model": "voyage-multimodal-3",
                "inputs": [
                    {"content": [{"type": "image_base64", "image_base64": "DATA_URI"}]},
                    {"content": [{"type": "image_base64", "image_base64": "DATA_URI"}]},
                ],
                "truncation": False,
            },
            answer=openai_shape("voyage-multimodal-3", 0, *TWO)
            | {"usage": {"text_tokens": 0, "image_pixels": 1120, "total_tokens": 2}},
            values=TWO,
            tokens=2,
        ),
        texts=Exchange(
            body={
                "model": "voyage-multimodal-3",
                "inputs": [
                    {"content": [{"type": "text", "text": "a cat"}]},
                    {"content": [{"type": "text", "text": "a dog"}]},
                ],
                "truncation": False,
            },
            answer=openai_shape("voyage-multimodal-3", 0, *TWO)
            | {"usage": {"text_tokens": 6, "image_pixels": 0, "total_tokens": 6}},
            values=TWO,
            tokens=6,
        ),
    ),
    Case(
        file="vertex.toml",
        dialect="vertex",
        limits=(1, 1),
        url="https://us-central1-aiplatform.googleapis.com/v1/projects/PROJECT/locations/"
        "us-central1/publishers/google/models/multimodalembedding@001:predict",
        images=Exchange(
            body={
                "instances": [{"image": {"bytesBase64Encoded": "BASE64"}}],
                "parameters": {"dimension": 512},
            },
            answer={"predictions": [{"imageEmbedding": ramp(512)}], "deployedModelId": "42"},
            values=[ramp(512)],
        ),
        texts=Exchange(
            body={"instances": [{"text": "a cat"}], "parameters": {"dimension": 512}},
            answer={"predictions": [{"textEmbedding": ramp(512)}], "deployedModelId": "42"},
            values=[ramp(512)],
        ),
        model_at=None,
    ),
    Case(
        file="azure-vision.toml",
        dialect="azure-vision",
        limits=(1, 1),
        url="https://resource.cognitiveservices.azure.com/computervision{}"
        "?api-version=2024-02-01&model-version=2023-04-15",
        images=Exchange(
            body="BYTES",
            answer={"modelVersion": "2023-04-15", "vector": ramp(1024)},
            values=[ramp(1024)],
            path="/retrieval:vectorizeImage",
        ),
        texts=Exchange(
            body={"text": "a cat"},
            answer={"modelVersion": "2023-04-15", "vector": ramp(1024)},
            values=[ramp(1024)],
            path="/retrieval:vectorizeText",
        ),
        header="ocp-apim-subscription-key",
        model_at="modelVersion",
    ),
    Case(
        file="titan.toml",
        dialect="titan",
        limits=(1, 1),
        url="https://bedrock-runtime.us-east-1.amazonaws.com/model/amazon.titan-embed-image-v1/invoke",
        images=Exchange(
            body={"inputImage": "BASE64", "embeddingConfig": {"outputEmbeddingLength": 1024}},
            answer={"embedding": ramp(1024), "inputTextTokenCount": None, "message": None},
            values=[ramp(1024)],
        ),
        texts=Exchange(
            body={"inputText": "a cat", "embeddingConfig": {"outputEmbeddingLength": 1024}},
            answer={"embedding": ramp(1024), "inputTextTokenCount": 3, "message": None},
            values=[ramp(1024)],
            tokens=3,
        ),
        model_at=None,
    ),
]


class Recorder:
    """Answers one request with what it was given, and keeps the request."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.seen: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> object:
        self.seen.append(request)
        return self.answer


def read_example(file: str) -> dict[str, Any]:
    endpoint = Endpoint.from_file(EXAMPLES / file)
    assert endpoint.protocol == "embeddings"
    return dict(endpoint.options)


def ask(options: dict[str, Any], endpoint: Recorder, request: Request) -> Outcome:
    [outcome] = outcomes(Embeddings(inner=served(endpoint), **options), request)
    return outcome


def with_picture(body: Any, data: bytes) -> Any:
    """The golden request with the picture in place of its names."""
    text = base64.b64encode(data).decode()
    written = json.dumps(body).replace("DATA_URI", f"data:image/png;base64,{text}")
    return json.loads(written.replace("BASE64", text))


@pytest.fixture
def picture(tmp_path: Path) -> Image:
    PIL.Image.new("RGB", (2, 2), "red").save(tmp_path / "red.png")
    return Image.from_file(tmp_path / "red.png")


def request_for(exchange: Exchange, kind: str, picture: Image) -> Request:
    count = len(exchange.values)
    if kind == "images":
        return ImageEmbeddings((picture,) * count)
    return TextEmbeddings(("a cat", "a dog")[:count])


def options_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The example as it stands, with a key, and a price that shows the tokens in USD."""
    options = read_example(case.file)
    monkeypatch.setenv(options["key_env"], KEY)
    return options | {"price": {"per_million_tokens": 1e6, "most_tokens": UNTOLD}}


@pytest.mark.parametrize("kind", ["images", "texts"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.dialect)
def test_request_and_answer_are_as_documented(
    case: Case, kind: str, picture: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange: Exchange = getattr(case, kind)
    options = options_of(case, monkeypatch)
    endpoint = Recorder(exchange.answer)
    outcome = ask(options, endpoint, request_for(exchange, kind, picture))
    [sent] = endpoint.seen

    assert str(sent.url) == case.url.format(exchange.path)
    assert sent.headers[case.header].removeprefix("Bearer ") == KEY
    if exchange.body == "BYTES":
        assert sent.headers.get_list("content-type") == ["application/octet-stream"]
        assert sent.content == encode(picture)
    else:
        assert sent.headers.get_list("content-type") == ["application/json"]
        assert json.loads(sent.content) == with_picture(exchange.body, encode(picture))

    assert isinstance(outcome, Answer), outcome
    assert outcome.values.tolist() == exchange.values
    assert outcome.model_id == options["model"]
    assert outcome.cost == pytest.approx(exchange.tokens)


@pytest.mark.parametrize("kind", ["images", "texts"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.dialect)
def test_a_substituted_model_is_seen_where_the_answer_names_it(
    case: Case, kind: str, picture: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange: Exchange = getattr(case, kind)
    options = options_of(case, monkeypatch)
    answer = exchange.answer | {case.model_at or "model": "another"}
    outcome = ask(options, Recorder(answer), request_for(exchange, kind, picture))
    assert isinstance(outcome, Answer), outcome
    assert outcome.model_id == ("another" if case.model_at else options["model"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.dialect)
def test_every_example_opens_and_declares_the_documented_limits(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (EXAMPLES / case.file).read_text(encoding="utf-8")
    assert text.startswith("# ")
    options = read_example(case.file)
    assert options["dialect"] == case.dialect
    with pytest.raises(InputError, match=options["key_env"]):
        Embeddings(**options)
    monkeypatch.setenv(options["key_env"], KEY)
    declared = Endpoint.from_file(EXAMPLES / case.file).open().capabilities
    assert (declared.images_per_request, declared.texts_per_request) == case.limits
    assert declared.model_id == options["model"]
    assert (declared.price is not None) == ("price" in options)


def test_every_dialect_has_a_case() -> None:
    with pytest.raises(ValueError, match="wanted one of") as refusal:
        named("nothing")
    known = str(refusal.value).removeprefix("wanted one of ").split(", ")
    assert {case.dialect for case in CASES} | {"openai"} == set(known[:-1])


# -- what the templates can say -------------------------------------------------------------------

PLAIN = {"url": "http://127.0.0.1:1/embed", "model": "m"}


def test_an_option_that_is_not_set_leaves_no_trace() -> None:
    for dialect, body in (
        ("vertex", {"instances": [{"text": "a"}]}),
        ("titan", {"inputText": "a"}),
    ):
        endpoint = Recorder({})
        ask({**PLAIN, "dialect": dialect}, endpoint, TextEmbeddings(("a",)))
        assert json.loads(endpoint.seen[0].content) == body


@pytest.mark.parametrize(
    ("dialect", "option"),
    [
        ("nv-clip", {"dimensions": 512}),
        ("azure-vision", {"dimensions": 512}),
        ("voyage", {"encoding_format": "base64"}),
        ("titan", {"encoding_format": "float"}),
    ],
)
def test_an_option_without_a_place_is_refused(dialect: str, option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"no place for {next(iter(option))}; leave it out"):
        Embeddings(**PLAIN, dialect=dialect, **option)


@pytest.mark.parametrize("dialect", ["vllm", "vertex", "azure-vision", "titan"])
def test_one_item_stays_one_item(dialect: str) -> None:
    with pytest.raises(InputError, match="images_per_request is 2; this dialect has place for one"):
        Embeddings(**PLAIN, dialect=dialect, images_per_request=2)


CUSTOM = """
url = "http://127.0.0.1:1/clip?api_key=k"
model = "ViT-B-16"

[dialect.images]
path = "/embed_image"
per_request = 4
body = { clip_version_id = "$model", image = { "$each" = { type = "base64", value = "$base64" } } }
vectors = "embeddings.*"
index = ""
model = ""
tokens = ""

[dialect.texts]
path = "/embed_text"
per_request = 0
body = { clip_version_id = "$model", text = { "$each" = "$text" }, flags = [1, "x", true] }
vectors = "embeddings.*"
index = ""
model = ""
tokens = ""
"""


def test_an_endpoint_file_may_hold_a_dialect_of_its_own(picture: Image) -> None:
    options = tomllib.loads(CUSTOM)
    endpoint = Recorder({"embeddings": TWO, "time": 0.1})
    outcome = ask(options, endpoint, ImageEmbeddings((picture, picture)))
    assert isinstance(outcome, Answer)
    assert outcome.values.tolist() == TWO
    assert outcome.model_id == "ViT-B-16"
    [sent] = endpoint.seen
    assert str(sent.url) == "http://127.0.0.1:1/clip/embed_image?api_key=k"
    item = {"type": "base64", "value": "BASE64"}
    golden = {"clip_version_id": "ViT-B-16", "image": [item, item]}
    assert json.loads(sent.content) == with_picture(golden, encode(picture))

    ask(options, endpoint, TextEmbeddings(("$model", "$each")))
    assert json.loads(endpoint.seen[1].content) == {
        "clip_version_id": "ViT-B-16",
        "text": ["$model", "$each"],  # what is put in is not read again
        "flags": [1, "x", True],
    }
    declared = Embeddings(**options).capabilities
    assert (declared.images_per_request, declared.texts_per_request) == (4, None)


def tables(images: Any, texts: Any) -> dict[str, Any]:
    return {"images": {"body": images}, "texts": {"body": texts}}


IMAGE, TEXT = {"image": "$base64"}, {"text": "$text"}
MISTAKES = {
    "unknown name": ("clip-as-a-service", "wanted one of openai, infinity"),
    "no texts": ({"images": {"body": IMAGE}}, "lacks dialect.texts"),
    "unknown field": ({**tables(IMAGE, TEXT), "audio": {}}, "unknown option dialect.audio"),
    "text with an image": (tables({**IMAGE, "text": "$text"}, TEXT), r"\$text cannot be in"),
    "image with a text": (tables(IMAGE, {**TEXT, "image": "$data_uri"}), r"\$data_uri cannot be"),
    "bytes inside": (tables({"image": "$bytes"}, TEXT), r"\$bytes cannot be in the body of images"),
    "bytes for texts": (tables(IMAGE, "$bytes"), r"\$bytes cannot be in the body of texts"),
    "unknown marker": (tables(IMAGE, {**TEXT, "n": "$size"}), r"\$size cannot be in"),
    "no image": (tables({"image": "x"}, TEXT), r"wants \$base64 or \$data_uri somewhere"),
    "no text": (tables(IMAGE, {"model": "$model"}), r"wants \$text somewhere"),
    "each and more": (tables({"a": {"$each": "$base64", "b": 1}}, TEXT), "stands alone"),
    "no json": (tables(IMAGE, {**TEXT, "day": tomllib.loads("d = 2026-11-22")["d"]}), "dialect"),
    "negative": ({**tables(IMAGE, TEXT), "images": {"body": IMAGE, "per_request": -1}}, "images"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_dialect_that_cannot_work_is_refused_when_it_is_opened(mistake: str) -> None:
    dialect, message = MISTAKES[mistake]
    with pytest.raises(InputError, match=message):
        Embeddings(**PLAIN, dialect=dialect)


def test_places_in_an_answer() -> None:
    data = {"a": [{"b": 1}, {"b": 2}], "c": {"d": [[1, 2], [3]]}}
    assert find(data, "a.*.b") == [1, 2]
    assert find(data, "c.d.*") == [[1, 2], [3]]
    assert find(data, "c.d.1.*") == [3]
    assert find([[1], [2]], "*") == [[1], [2]]
    assert find(data, "c.d") == [[[1, 2], [3]]]
    for path in ("a.b", "c.*", "x", "a.*.x"):
        with pytest.raises(ContractError):
            find(data, path)


def test_the_table_of_dialects_is_installed_with_the_package() -> None:
    dialect = named("openai")
    assert isinstance(dialect, Dialect)
    assert dialect.markers == {"$model", "$encoding_format", "$dimensions"}
