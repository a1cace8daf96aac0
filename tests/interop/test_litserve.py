"""Our embeddings backend against LitServe's OpenAI embeddings, around a model of a few lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from blackbox_vlm.backends.embeddings import Embeddings
from foreign import HERE, KEY, KEY_ENV, binaries, free_port, running
from hosted import metered, spent

from blackbox_vlm.backend import ImageEmbeddings, TextEmbeddings
from blackbox_vlm.errors import AuthError, Refused
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger

TEXTS = ("a photo of a cat", "a photo of a dog", "un café")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    script = HERE / "servers" / "litserve_colours.py"
    log = tmp_path_factory.mktemp("litserve") / "log"
    url = f"http://127.0.0.1:{port}"
    command = [binaries("litserve") / "python", script, port]
    with running(command, f"{url}/health", log, environment={"LIT_SERVER_API_KEY": KEY}):
        yield f"{url}/v1/embeddings"


def backend(url: str, **options: Any) -> Embeddings:
    """LitServe wants its key in a header of its own, without a prefix."""
    key = {"key_env": KEY_ENV, "key_header": "X-API-Key", "key_prefix": ""}
    return Embeddings(**{"url": url, "model": "colours", **key, **options})


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_images_and_texts_become_the_models_vectors(
    url: str, emoji: tuple[Image, ...], ledger: Ledger, encoding_format: str
) -> None:
    asked = backend(url, encoding_format=encoding_format, images_per_request=20)
    images, texts = metered(asked, ledger, ImageEmbeddings(emoji), TextEmbeddings(TEXTS))
    colours = [np.asarray(image.load()).mean(axis=(0, 1)) / 255 for image in emoji]
    digests = [np.frombuffer(hashlib.sha256(t.encode()).digest()[:3], np.uint8) for t in TEXTS]
    np.testing.assert_allclose(images, colours, rtol=1e-6)
    np.testing.assert_allclose(texts, np.array(digests) / 255, rtol=1e-6)
    assert spent(ledger) == (3, 0)


def test_a_wrong_key_is_refused_and_not_shown(
    url: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "sk-of-somebody-else")
    with pytest.raises(AuthError, match=r"answered 401.*Invalid API Key") as error:
        metered(backend(url, texts_per_request=1), ledger, TextEmbeddings(TEXTS))
    assert "sk-of-somebody-else" not in str(error.value)
    assert spent(ledger) == (1, 0)


def test_another_route_stops_the_run_after_one_request(url: str, ledger: Ledger) -> None:
    wrong = backend(url.removesuffix("/v1/embeddings"), texts_per_request=1)
    with pytest.raises(Refused, match=r"answered 40[45]"):
        metered(wrong, ledger, TextEmbeddings(TEXTS))
    assert spent(ledger) == (1, 0)
