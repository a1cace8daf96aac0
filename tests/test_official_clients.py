"""The clients that others wrote, against our server on a real socket."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from blackbox_vlm.backends.server import ServerSettings, running_server
from scipy.special import softmax
from serving import encoded, picture, world

from blackbox_vlm.backend import Access, Price, TextScores
from blackbox_vlm.secret import Secret

huggingface_hub = pytest.importorskip("huggingface_hub")
openai = pytest.importorskip("openai")

TOKEN = "a-token-for-tests"
SETTINGS = ServerSettings(token=Secret(TOKEN), price=Price(per_request=0.5))
TEXTS = ["a cat", "a dog", "a car"]


@pytest.fixture
def scores() -> Iterator[tuple[Any, str]]:
    backend = world()
    with running_server(backend, SETTINGS) as url:
        yield backend, url


@pytest.fixture
def embeddings() -> Iterator[str]:
    with running_server(world(Access.EMBEDDINGS), SETTINGS) as url:
        yield url


def test_hugging_face_classifies(scores: tuple[Any, str]) -> None:
    backend, url = scores
    client = huggingface_hub.InferenceClient(model=f"{url}/hf", token=TOKEN)
    told = client.zero_shot_image_classification(
        picture(), candidate_labels=TEXTS, hypothesis_template="{}"
    )
    [request] = backend.requests
    assert isinstance(request, TextScores)
    assert request.texts == tuple(TEXTS)
    wanted = dict(zip(TEXTS, softmax(backend.logits(request)[0]), strict=True))
    assert [entry.score for entry in told] == sorted((e.score for e in told), reverse=True)
    for entry in told:
        assert entry.score == pytest.approx(wanted[entry.label], rel=1e-6)


def test_hugging_face_takes_the_path_with_the_model(scores: tuple[Any, str]) -> None:
    _, url = scores
    client = huggingface_hub.InferenceClient(model=f"{url}/models/linear-world-1", token=TOKEN)
    assert len(client.zero_shot_image_classification(picture(), candidate_labels=TEXTS)) == 3


def test_hugging_face_shows_our_refusal(scores: tuple[Any, str]) -> None:
    _, url = scores
    client = huggingface_hub.InferenceClient(model=f"{url}/models/other", token=TOKEN)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="linear-world-1") as error:
        client.zero_shot_image_classification(picture(), candidate_labels=TEXTS)
    assert error.value.response.status_code == 404


def client_of(url: str, token: str = TOKEN) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openai_embeds_texts_and_images(embeddings: str, encoding: str) -> None:
    with client_of(embeddings) as client:
        given = ["a cat", f"data:image/png;base64,{encoded()}"]
        told = client.embeddings.create(
            model="linear-world-1", input=given, encoding_format=encoding
        )
        plain = client.embeddings.create(model="linear-world-1", input=given)
    assert told.model == "linear-world-1"
    assert [entry.index for entry in told.data] == [0, 1]
    vectors = np.array([_vector(entry.embedding) for entry in told.data], np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    usual = np.array([entry.embedding for entry in plain.data], np.float32)
    np.testing.assert_array_equal(vectors, usual)


def _vector(embedding: Any) -> Any:
    """The client decodes base64 itself only where it asked for it of its own accord."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return embedding


def test_openai_raises_its_own_errors(embeddings: str) -> None:
    with client_of(embeddings, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.embeddings.create(model="linear-world-1", input="a cat")
    with client_of(embeddings) as client:
        with pytest.raises(openai.NotFoundError, match="linear-world-1"):
            client.embeddings.create(model="other", input="a cat")
        with pytest.raises(openai.UnprocessableEntityError):
            client.embeddings.create(model="linear-world-1", input="x" * 1001)
