"""Our KServe V2 backend against MLServer, which Seldon wrote, around a model of a few lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from blackbox_vlm.backends.kserve import KServe
from foreign import HERE, binaries, free_port, running
from hosted import metered, spent
from numpy.typing import NDArray

from blackbox_vlm.backend import PromptScores, TextScores
from blackbox_vlm.errors import ModelChanged, Refused, UnknownOutcome
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger

NAMES = ("cat", "dog", "a café", "ship", "plane", "fruit", "drink", "face", "hand", "star")
TEXTS = tuple(f"a photo of {name}" for name in NAMES)
SOFT = {"context_tokens": 4, "width": 5, "token_std": 0.01}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    ports = {"MLSERVER_HTTP_PORT": str(port), "MLSERVER_GRPC_PORT": str(free_port())}
    command = [binaries("mlserver") / "mlserver", "start", HERE / "servers" / "mlserver"]
    log = tmp_path_factory.mktemp("mlserver") / "log"
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/v2/health/ready", log, environment=ports):
        yield url


def expected(
    images: Sequence[Image], texts: Sequence[str], offset: NDArray[np.float32] | None = None
) -> NDArray[np.float64]:
    """What `servers/mlserver/model.py` should answer."""
    colours = [np.asarray(image.load()).mean(axis=(0, 1)) / 255 for image in images]
    digests = [np.frombuffer(hashlib.sha256(t.encode()).digest()[:3], np.uint8) for t in texts]
    shift = 0 if offset is None else offset.mean(axis=0)[:3]
    return np.array(colours) @ (np.array(digests) / 25.5 + shift).T


def test_images_and_texts_are_scored_in_real_batches(
    url: str, emoji: tuple[Image, ...], ledger: Ledger
) -> None:
    backend = KServe(url=url, model="colours", images_per_request=4)
    [logits] = metered(backend, ledger, TextScores(emoji[:6], TEXTS))
    np.testing.assert_allclose(logits, expected(emoji[:6], TEXTS), rtol=1e-5)
    assert spent(ledger) == (2, 0)


def test_a_soft_prompt_travels_as_an_fp32_tensor(
    url: str, emoji: tuple[Image, ...], ledger: Ledger
) -> None:
    offset = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    backend = KServe(url=url, model="colours", version="3", images_per_request=3, **SOFT)
    request = PromptScores(emoji[:3], NAMES, "a photo of {}", offset)
    soft, plain = metered(backend, ledger, request, TextScores(emoji[:3], TEXTS))
    np.testing.assert_allclose(soft, expected(emoji[:3], TEXTS, offset), rtol=1e-5)
    np.testing.assert_allclose(plain, expected(emoji[:3], TEXTS), rtol=1e-5)
    assert spent(ledger) == (2, 0)


@pytest.mark.parametrize("wrong", [{"model": "nope"}, {"model": "colours", "version": "4"}])
def test_a_model_that_is_not_there_stops_the_run_after_one_request(
    url: str, emoji: tuple[Image, ...], ledger: Ledger, wrong: dict[str, str]
) -> None:
    backend = KServe(url=url, **wrong)
    with pytest.raises(Refused, match=r"answered 404.*not found"):
        metered(backend, ledger, *(TextScores((image,), TEXTS) for image in emoji[:3]))
    assert spent(ledger) == (1, 0)


def test_an_answer_under_another_name_is_not_taken(
    url: str, emoji: tuple[Image, ...], ledger: Ledger
) -> None:
    backend = KServe(url=url, model="colours", answered_model="clip")
    with pytest.raises(ModelChanged, match="'colours' answered"):
        metered(backend, ledger, TextScores(emoji[:1], TEXTS))
    assert spent(ledger) == (1, 1)


def test_a_model_that_fails_is_not_asked_again(
    url: str, emoji: tuple[Image, ...], ledger: Ledger
) -> None:
    backend = KServe(url=url, model="colours", text_input="labels")
    with pytest.raises(UnknownOutcome, match="answered 500: Internal Server Error"):
        metered(backend, ledger, TextScores(emoji[:1], TEXTS))
    assert spent(ledger) == (1, 1)
    [logits] = metered(KServe(url=url, model="colours"), ledger, TextScores(emoji[:1], TEXTS))
    np.testing.assert_allclose(logits, expected(emoji[:1], TEXTS), rtol=1e-5)
