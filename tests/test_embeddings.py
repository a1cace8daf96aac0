"""The embeddings backend against an endpoint that takes apart what it is sent."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from blackbox_vlm.backends._images import encode
from blackbox_vlm.backends.embeddings import Embeddings
from blackbox_vlm.backends.endpoint import BYTES_PER_NUMBER, MAX_DIM
from blackbox_vlm.backends.transport import MAX_BODY
from doubles import DIM, LinearWorld
from hosted import answers, outcomes, reply, served

from blackbox_vlm.backend import (
    Access,
    Answer,
    Backend,
    ImageEmbeddings,
    Request,
    TextEmbeddings,
    TextScores,
)
from blackbox_vlm.batching import join, split
from blackbox_vlm.contract import check_answer
from blackbox_vlm.errors import ContractError, InputError, ModelChanged, Refused, UnknownOutcome
from blackbox_vlm.images import Image
from blackbox_vlm.testing import BackendConformance

WORLD = LinearWorld()
MODEL = "clip-of-hashes"
URL = "http://127.0.0.1:7997/v1/embeddings"
TEXTS = ("a photo of a cat.", "$model", 'quotes " and \u00fcmlauts')
FREE: dict[str, float] = {}


def vectors_of_bytes(uploads: Sequence[bytes]) -> np.ndarray:
    """What the endpoint makes of uploaded files: it knows nothing of the ones on our disk."""
    images = tuple(Image(Path("upload"), hashlib.sha256(data).hexdigest()) for data in uploads)
    return WORLD.values(ImageEmbeddings(images))


def expected(request: Request) -> np.ndarray:
    if isinstance(request, ImageEmbeddings):
        return vectors_of_bytes([encode(image) for image in request.images])
    return WORLD.values(request)


def read_data_uri(uri: str) -> bytes:
    kind, data = uri.split(",", 1)
    raw = base64.b64decode(data, validate=True)
    assert kind == f"data:image/{PIL.Image.open(io.BytesIO(raw)).format.lower()};base64"
    return raw


class Endpoint:
    """OpenAI's route as Infinity, vLLM and plain servers speak it; refuses what they do not know.

    `spoil` changes an answer before it is written; `write` writes it.
    """

    def __init__(
        self,
        dialect: str = "infinity",
        spoil: Callable[[dict[str, Any]], Any] = lambda answer: answer,
        write: Callable[[Any], str] = json.dumps,
    ) -> None:
        self.dialect, self.spoil, self.write = dialect, spoil, write
        self.bodies: list[dict[str, Any]] = []
        self.uploads: list[bytes] = []

    def __call__(self, request: httpx.Request) -> bytes:
        assert (request.method, str(request.url)) == ("POST", URL)
        body = json.loads(request.content)
        self.bodies.append(dict(body))
        assert body.pop("model") == MODEL
        form = body.pop("encoding_format")
        body.pop("dimensions", None)  # and is not obeyed, as so often
        vectors = getattr(self, f"_{self.dialect}")(body)
        assert not body, f"unknown members {body}"
        return self.write(self.spoil(self._answer(vectors, form))).encode()

    def _answer(self, vectors: np.ndarray, form: str) -> dict[str, Any]:
        rows = vectors.tolist()
        if form == "base64":
            rows = [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in vectors]
        data = [{"object": "embedding", "index": i, "embedding": r} for i, r in enumerate(rows)]
        usage = {"prompt_tokens": 7 * len(rows), "total_tokens": 7 * len(rows)}
        return {"object": "list", "data": data, "model": MODEL, "usage": usage}

    def _openai(self, body: dict[str, Any]) -> np.ndarray:
        inputs = body.pop("input")
        if inputs[0].startswith("data:"):
            return self._images(inputs)
        return WORLD.values(TextEmbeddings(tuple(inputs)))

    def _infinity(self, body: dict[str, Any]) -> np.ndarray:
        inputs, modality = body.pop("input"), body.pop("modality")
        assert len(inputs) <= {"image": 32, "text": 2048}[modality]
        if modality == "image":
            return self._images(inputs)
        return WORLD.values(TextEmbeddings(tuple(inputs)))

    def _vllm(self, body: dict[str, Any]) -> np.ndarray:
        if "input" in body:
            return WORLD.values(TextEmbeddings(tuple(body.pop("input"))))
        [message] = body.pop("messages")
        [part] = message["content"]
        assert (message["role"], part["type"]) == ("user", "image_url")
        return self._images([part["image_url"]["url"]])

    def _images(self, uris: Sequence[str]) -> np.ndarray:
        uploads = [read_data_uri(uri) for uri in uris]
        self.uploads += uploads
        return vectors_of_bytes(uploads)


def open_backend(endpoint: Endpoint, **options: Any) -> Embeddings:
    given = {"url": URL, "model": MODEL, "dialect": endpoint.dialect, "price": FREE, **options}
    return Embeddings(inner=served(endpoint), **given)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, ...]:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(3).integers(0, 256, (33, 8, 8, 3), dtype=np.uint8)
    suffixes = ["png", "jpg"] * 17
    for index, (pixels, suffix) in enumerate(zip(noise, suffixes, strict=False)):
        PIL.Image.fromarray(pixels).save(folder / f"{index}.{suffix}")
    return tuple(Image.from_file(folder / f"{i}.{suffixes[i]}") for i in range(len(noise)))


# -- what it does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize("dialect", ["openai", "infinity", "vllm"])
def test_images_and_texts_are_embedded_in_one_space(
    dialect: str, form: str, pictures: tuple[Image, ...]
) -> None:
    endpoint = Endpoint(dialect)
    backend = open_backend(endpoint, encoding_format=form)
    requests = [
        ImageEmbeddings(pictures[:1]),
        ImageEmbeddings(pictures[1:2]),
        TextEmbeddings(TEXTS),
    ]
    for request, answer in zip(requests, answers(backend, *requests), strict=True):
        assert answer.values.dtype == np.float32
        np.testing.assert_array_equal(answer.values, expected(request))
    for upload, image in zip(endpoint.uploads, pictures, strict=False):
        seen = np.asarray(PIL.Image.open(io.BytesIO(upload)).convert("RGB"))
        np.testing.assert_array_equal(seen, np.asarray(image.load()))


def test_base64_and_lists_of_numbers_are_the_same_bits(pictures: tuple[Image, ...]) -> None:
    request = ImageEmbeddings(pictures[:5])
    lists, base = (
        answers(open_backend(Endpoint(), encoding_format=form), request)[0].values
        for form in ("float", "base64")
    )
    assert lists.tobytes() == base.tobytes()
    assert lists.shape == (5, DIM)


def test_a_server_may_answer_in_the_other_form(pictures: tuple[Image, ...]) -> None:
    """LitServe, for one, knows no base64."""

    def as_lists(answer: dict[str, Any]) -> dict[str, Any]:
        for item in answer["data"]:
            data = base64.b64decode(item["embedding"])
            item["embedding"] = np.frombuffer(data, dtype="<f4").tolist()
        return answer

    request = ImageEmbeddings(pictures[:2])
    backend = open_backend(Endpoint(spoil=as_lists), encoding_format="base64")
    np.testing.assert_array_equal(answers(backend, request)[0].values, expected(request))


def test_33_images_are_32_and_one(pictures: tuple[Image, ...]) -> None:
    endpoint = Endpoint("infinity")
    backend = open_backend(endpoint)
    whole = ImageEmbeddings(pictures)
    parts = split(whole, backend.capabilities)
    values = join(whole, [a.values for a in answers(backend, *parts)], backend.capabilities)
    assert [len(body["input"]) for body in endpoint.bodies] == [32, 1]
    np.testing.assert_array_equal(values, expected(whole))


def test_vectors_are_placed_by_their_index(pictures: tuple[Image, ...]) -> None:
    def shuffle(answer: dict[str, Any]) -> dict[str, Any]:
        answer["data"] = [answer["data"][i] for i in (2, 0, 3, 1)]
        return answer

    request = ImageEmbeddings(pictures[:4])
    [answer] = answers(open_backend(Endpoint(spoil=shuffle)), request)
    np.testing.assert_array_equal(answer.values, expected(request))


def test_the_request_is_what_the_protocol_says(pictures: tuple[Image, ...]) -> None:
    endpoint = Endpoint("openai")
    answers(open_backend(endpoint), ImageEmbeddings(pictures[:1]), TextEmbeddings(("a", "b")))
    data = base64.b64encode(encode(pictures[0])).decode()
    assert endpoint.bodies == [
        {
            "model": MODEL,
            "input": [f"data:image/png;base64,{data}"],
            "encoding_format": "float",
        },
        {"model": MODEL, "input": ["a", "b"], "encoding_format": "float"},
    ]


def test_larger_pictures_are_reduced_first(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (40, 20), "red").save(tmp_path / "large.png")
    endpoint = Endpoint()
    backend = open_backend(endpoint, max_image_side=10)
    answers(backend, ImageEmbeddings((Image.from_file(tmp_path / "large.png"),)))
    assert PIL.Image.open(io.BytesIO(endpoint.uploads[0])).size == (10, 5)


def test_tokens_are_what_is_billed() -> None:
    price = {"per_million_tokens": 2.0, "most_tokens": 1000, "per_request": 0.5}
    [told] = answers(open_backend(Endpoint(), price=price), TextEmbeddings(TEXTS))
    assert told.cost == pytest.approx(0.5 + 21 * 2e-6)


@pytest.mark.parametrize(
    "usage", [None, {}, [], *({"total_tokens": odd} for odd in (-1, "7", True, None, 10**350))]
)
def test_a_bill_that_is_none_leaves_what_was_reserved(usage: Any) -> None:
    price = {"per_million_tokens": 2.0, "most_tokens": 1000}
    endpoint = Endpoint(spoil=member(usage=usage))
    [answer] = answers(open_backend(endpoint, price=price), TextEmbeddings(TEXTS))
    assert answer.cost == pytest.approx(1000 * 2e-6)


# -- what it declares -----------------------------------------------------------------------------


def test_the_dialect_knows_the_limits_unless_the_file_does() -> None:
    def limits(endpoint: Endpoint, **options: Any) -> tuple[int | None, int | None]:
        declared = open_backend(endpoint, **options).capabilities
        assert declared.access is Access.EMBEDDINGS
        return declared.images_per_request, declared.texts_per_request

    assert limits(Endpoint("infinity")) == (32, 2048)
    assert limits(Endpoint("vllm")) == (1, None)
    assert limits(Endpoint("infinity"), images_per_request=1, texts_per_request=0) == (1, None)
    assert limits(Endpoint("openai"), images_per_request=0) == (None, 2048)


def test_more_than_one_request_carries_is_refused_before_it_leaves(
    pictures: tuple[Image, ...],
) -> None:
    endpoint = Endpoint("vllm")
    with pytest.raises(InputError, match="2 images in one request; this endpoint takes 1"):
        outcomes(open_backend(endpoint), ImageEmbeddings(pictures[:2]))
    with pytest.raises(InputError, match="'scores' access"):
        outcomes(open_backend(endpoint), TextScores(pictures[:1], TEXTS))
    assert endpoint.bodies == []


def test_a_limit_that_the_dialect_has_no_place_for_is_refused() -> None:
    with pytest.raises(InputError, match="images_per_request is 2; this dialect has place for one"):
        open_backend(Endpoint("vllm"), images_per_request=2)


def test_what_changes_an_answer_is_part_of_the_identity() -> None:
    def identity(**options: Any) -> str:
        return open_backend(Endpoint("openai"), **options).capabilities.identity

    others = {
        identity(),
        identity(dimensions=8),
        identity(dialect="infinity"),
        identity(url=URL + "2"),  # some services name the model there
        identity(model="another"),
    }
    assert len(others) == 5
    assert identity() == identity(encoding_format="base64")  # the same numbers
    assert identity() != identity(url=URL + "?model-version=2")
    assert "key" not in identity(url=URL + "?key=1")  # a query string may hold what is not shown


def test_the_scale_of_the_cosines_is_an_option() -> None:
    assert open_backend(Endpoint(), logit_scale=112.5).capabilities.logit_scale == 112.5


# -- what can go wrong ----------------------------------------------------------------------------


def entry(place: int, /, **changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A fault in one entry of `data`; a value of None removes the member."""

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        item = {**answer["data"][place], **changes}
        answer["data"][place] = {name: value for name, value in item.items() if value is not None}
        return answer

    return change


def number(value: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A fault in one number of one embedding."""

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        answer["data"][1]["embedding"][3] = value
        return answer

    return change


def member(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda answer: {**answer, **changes}


def width(*sizes: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        for item, size in zip(answer["data"], sizes, strict=True):
            item["embedding"] = [0.5] * size
        return answer

    return change


def data(change: Callable[[list[Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda answer: {**answer, "data": change(answer["data"])}


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "25-nan": (number(float("nan")), "NaN"),
    "25-infinity": (number(float("inf")), "Infinity"),
    "25-beyond-float32": (number(1e300), "finite numbers"),
    "25-null": (number(None), "finite numbers"),
    "25-text": (number("0.5"), "numbers, got str"),
    "25-boolean": (number(True), "numbers, got bool"),
    "25-base64-nan": (entry(1, embedding=b64(np.full(DIM, np.nan, "<f4").tobytes())), "finite"),
    "25-half-a-number": (entry(1, embedding=b64(b"12345")), "base64 of float32, got 5 bytes"),
    "25-no-base64": (entry(1, embedding="0.5, 0.5"), "numbers or base64"),
    "25-text-beyond-ascii": (entry(1, embedding="\u00fcber"), "numbers or base64"),
    "26-too-few": (data(lambda d: d[:-1]), "3 embeddings, got 2"),
    "26-too-many": (data(lambda d: [*d, d[0]]), "3 embeddings, got 4"),
    "26-none": (data(lambda d: []), "3 embeddings, got 0"),
    "26-ragged": (width(DIM, DIM, DIM + 1), r"one width above zero, got \[16, 17\]"),
    "26-empty": (width(0, 0, 0), "one width above zero"),
    "28-no-index": (entry(1, index=None), "'index'"),
    "28-index-twice": (entry(1, index=0), "0 to 2, each once"),
    "28-index-beyond": (entry(1, index=3), "0 to 2, each once"),
    "28-index-text": (entry(1, index="1"), "0 to 2, each once"),
    "28-index-boolean": (entry(1, index=True), "0 to 2, each once"),
    "30-no-embedding": (entry(1, embedding=None), "'embedding'"),
    "30-no-data": (lambda answer: {"detail": "busy"}, "'data'"),
    "30-data-no-list": (data(lambda d: d[0]), "a list for .*, got dict"),
    "30-a-list": (lambda answer: [answer], "'data', got list"),
    "31-no-model": (lambda answer: answer | {"model": None}, "a name, got NoneType"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_not_what_was_asked_is_refused(fault: str) -> None:
    spoil, message = FAULTS[fault]
    endpoint = Endpoint(spoil=spoil)
    [outcome] = outcomes(open_backend(endpoint), TextEmbeddings(TEXTS))
    with pytest.raises(ContractError, match=message):
        raise outcome
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    "text", ["", "<html>oops</html>", "\ufeff{}", '{"data": [{"index": 0, "embedding": [1e999]}]}']
)
def test_an_answer_that_is_no_json_of_ours_is_refused(text: str) -> None:
    [outcome] = outcomes(open_backend(Endpoint(write=lambda answer: text)), TextEmbeddings(("a",)))
    assert isinstance(outcome, ContractError)


def test_minus_zero_and_whole_numbers_are_numbers() -> None:
    endpoint = Endpoint(spoil=entry(0, embedding=[-0.0, 1] + [0.5] * (DIM - 2)))
    [answer] = answers(open_backend(endpoint), TextEmbeddings(("a",)))
    assert answer.values[0, :2].tolist() == [0.0, 1.0]


def test_a_silently_substituted_model_is_named_in_the_answer() -> None:
    backend = open_backend(Endpoint(spoil=member(model="another")))
    request = TextEmbeddings(("a",))
    [answer] = outcomes(backend, request)
    with pytest.raises(ModelChanged, match="'another' answered"):
        check_answer(request, answer, backend.capabilities)


def test_a_model_may_be_answered_under_another_name() -> None:
    endpoint = Endpoint(spoil=member(model="clip@r2"))
    answers(open_backend(endpoint, answered_model="clip@r2"), TextEmbeddings(("a",)))


def test_images_and_texts_have_one_width(pictures: tuple[Image, ...]) -> None:
    def shorter_texts(answer: dict[str, Any]) -> dict[str, Any]:
        return width(DIM - 1)(answer) if len(endpoint.bodies) == 2 else answer

    endpoint = Endpoint(spoil=shorter_texts)
    backend = open_backend(endpoint)
    requests = ImageEmbeddings(pictures[:1]), TextEmbeddings(("a",)), ImageEmbeddings(pictures[1:2])
    first, second, third = outcomes(backend, *requests)
    assert isinstance(first, Answer)
    with pytest.raises(ContractError, match="16 dimensions as before, got 15"):
        raise second
    assert isinstance(third, Answer)


def test_a_width_that_was_asked_for_is_wanted_from_the_start() -> None:
    endpoint = Endpoint("openai")
    [outcome] = outcomes(open_backend(endpoint, dimensions=8), TextEmbeddings(("a",)))
    assert endpoint.bodies[0]["dimensions"] == 8
    with pytest.raises(ContractError, match="8 dimensions as before, got 16"):
        raise outcome


def test_one_bad_answer_in_a_batch_leaves_the_others() -> None:
    def second_is_bad(answer: dict[str, Any]) -> dict[str, Any]:
        return member(data=[])(answer) if len(endpoint.bodies) == 2 else answer

    endpoint = Endpoint(spoil=second_is_bad)
    requests = [TextEmbeddings((text,)) for text in TEXTS]
    found = outcomes(open_backend(endpoint), *requests)
    assert [type(outcome) for outcome in found] == [Answer, ContractError, Answer]
    np.testing.assert_array_equal(found[2].values, expected(requests[2]))


def test_an_answer_is_no_longer_than_what_was_asked() -> None:
    def padded(answer: dict[str, Any]) -> str:
        text = json.dumps(answer)
        return text + " " * (size - len(text))

    size = MAX_BODY + 2 * MAX_DIM * BYTES_PER_NUMBER
    backend = open_backend(Endpoint(write=padded))
    answers(backend, TextEmbeddings(("a", "b")))
    size += 1
    [outcome] = outcomes(backend, TextEmbeddings(("a", "b")))
    assert isinstance(outcome, UnknownOutcome)


def test_a_refusal_longer_than_any_answer_is_still_a_refusal() -> None:
    """Infinity's 422 echoes the whole input, megabytes of it."""

    def refuse(request: httpx.Request) -> httpx.Response:
        return reply(b"x" * 2**20, 422)

    options = {"url": URL, "model": MODEL, "price": FREE}
    [outcome] = outcomes(Embeddings(inner=served(refuse), **options), TextEmbeddings(("a",)))
    assert isinstance(outcome, Refused)
    assert len(str(outcome)) < 500


# -- what the meter relies on ---------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["openai", "infinity", "vllm"])
class TestConformance(BackendConformance):
    @pytest.fixture(autouse=True)
    def _setting(self, dialect: str) -> None:
        self._dialect = dialect

    def make_backend(self) -> Backend:
        return open_backend(Endpoint(self._dialect), encoding_format="base64")
