"""Our backends against vLLM, with a tiny random CLIP and a tiny random LLaVA. See README.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blackbox_vlm.backends.chat import Chat
from blackbox_vlm.backends.embeddings import Embeddings
from blackbox_vlm.backends.score import Score
from foreign import KEY, KEY_ENV, binaries, free_port, run_script, running
from hosted import metered, spent
from numpy.typing import NDArray

from blackbox_vlm.backend import ImageEmbeddings, Labels, TextEmbeddings, TextScores
from blackbox_vlm.errors import AuthError, Refused
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.running import run_sync

TEXTS = ("a photo of a cat", "a photo of a dog", "un café")
CLASSES = tuple(f"class {number}" for number in range(12))
LETTER_A = 37  # its token in `servers/tiny_llava.py`: after 5 marks and the bytes 33 to 64
VOCABULARY = 384
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@contextmanager
def serving(folder: Path, script: str, name: str, *options: object) -> Iterator[str]:
    """Make a tiny model and serve it while the block lasts; the URL up to `/v1`."""
    run_script("vllm", script, folder / "model")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    model = [folder / "model", "--served-model-name", name, "--dtype", "float32"]
    where = ["--host", "127.0.0.1", "--port", port, "--api-key", KEY]
    program = [binaries("vllm") / "vllm", "serve", *model, "--enforce-eager", *where, *options]
    with running(program, f"{url}/health", folder / "log", environment=ENVIRONMENT, patience=400):
        yield f"{url}/v1"


# -- CLIP ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Iterator[str]:
    with serving(clip_folder, "tiny_clip.py", "tiny-clip", "--runner", "pooling") as url:
        yield url


@pytest.fixture(scope="module")
def reference(
    clip: str, clip_folder: Path, emoji: tuple[Image, ...]
) -> dict[str, NDArray[np.float32]]:
    """The vectors of the first five drawings and of the texts, by transformers itself."""
    texts, out = clip_folder / "texts.json", clip_folder / "reference.npz"
    texts.write_text(json.dumps(TEXTS))
    paths = [image.path for image in emoji[:5]]
    run_script("vllm", "reference.py", clip_folder / "model", out, texts, *paths)
    with np.load(out) as arrays:
        return {name: arrays[name] for name in arrays}


def score(url: str, **options: Any) -> Score:
    given = {"url": f"{url}/score", "model": "tiny-clip", "key_env": KEY_ENV, "logit_scale": 10.0}
    return Score(**{**given, **options})


def test_scores_are_the_models_cosines(
    clip: str,
    reference: dict[str, NDArray[np.float32]],
    emoji: tuple[Image, ...],
    ledger: Ledger,
) -> None:
    [logits] = metered(score(clip, concurrency=2), ledger, TextScores(emoji[:5], TEXTS))
    np.testing.assert_allclose(logits, 10 * reference["images"] @ reference["texts"].T, atol=1e-3)
    assert spent(ledger) == (5, 0)


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_the_vectors_are_the_models_own(
    clip: str,
    reference: dict[str, NDArray[np.float32]],
    emoji: tuple[Image, ...],
    ledger: Ledger,
    encoding_format: str,
) -> None:
    """One image per request, any number of texts."""
    backend = Embeddings(
        url=f"{clip}/embeddings",
        model="tiny-clip",
        dialect="vllm",
        key_env=KEY_ENV,
        encoding_format=encoding_format,
    )
    images, texts = metered(backend, ledger, ImageEmbeddings(emoji[:5]), TextEmbeddings(TEXTS))
    np.testing.assert_allclose(images, reference["images"], atol=2e-5)
    np.testing.assert_allclose(texts, reference["texts"], atol=2e-5)
    assert spent(ledger) == (6, 0)


def test_a_text_beyond_77_tokens_is_refused(
    clip: str, emoji: tuple[Image, ...], ledger: Ledger
) -> None:
    with pytest.raises(Refused, match=r"answered 400.*maximum context length is 77 tokens"):
        metered(score(clip), ledger, TextScores(emoji[:2], ("short", "x" * 100)))
    assert spent(ledger) == (1, 0)


def test_an_unknown_model_and_a_wrong_key_are_refused(
    clip: str, emoji: tuple[Image, ...], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match=r"answered 404.*does not exist"):
        metered(score(clip, model="nope"), ledger, TextScores(emoji[:2], TEXTS))
    monkeypatch.setenv(KEY_ENV, "sk-of-somebody-else")
    with pytest.raises(AuthError, match="answered 401"):
        metered(score(clip), ledger, TextScores(emoji[:2], TEXTS))
    assert spent(ledger) == (2, 0)


# -- LLaVA ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    limits = ("--max-model-len", 2048, "--max-logprobs", VOCABULARY)
    folder = tmp_path_factory.mktemp("llava")
    with serving(folder, "tiny_llava.py", "tiny-llava", *limits) as url:
        yield url


def chat(url: str, **options: Any) -> Chat:
    given = {"url": f"{url}/chat/completions", "model": "tiny-llava", "key_env": KEY_ENV}
    return Chat(**{**given, **options})


def shares(backend: Chat, request: TextScores) -> NDArray[np.float32]:
    [outcome] = run_sync(backend.answer([request]))
    assert not isinstance(outcome, Exception), outcome
    values: NDArray[np.float32] = outcome.values
    return values


def test_letters_are_scored_alike_by_their_names_and_by_their_ids(
    llava: str, emoji: tuple[Image, ...]
) -> None:
    """By name from the log-probabilities of the whole vocabulary; by id as vLLM alone can."""
    request = TextScores(emoji[:1], CLASSES)
    names = shares(chat(llava, top_logprobs=VOCABULARY), request)
    ids = tuple(range(LETTER_A, LETTER_A + len(CLASSES)))
    numbers = shares(chat(llava, mode="token-ids", letter_token_ids=ids), request)
    np.testing.assert_allclose(names, numbers, atol=1e-5)
    assert names.sum() == pytest.approx(1, abs=1e-5)
    assert np.ptp(names) > 1e-3


def test_letters_beyond_the_best_tokens_are_censored_and_bounded(
    llava: str, emoji: tuple[Image, ...]
) -> None:
    request = TextScores(emoji[:1], CLASSES)
    [complete] = shares(chat(llava, top_logprobs=VOCABULARY), request)
    [censored] = shares(chat(llava, top_logprobs=120), request)
    shown = np.isfinite(censored)
    assert 0 < shown.sum() < len(CLASSES)
    assert complete[shown].min() >= complete[~shown].max()
    ratio = censored[shown] / complete[shown]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert (1 - censored[shown].sum()) / (~shown).sum() >= censored[shown][0] * (
        complete[~shown].max() / complete[shown][0]
    ) * (1 - 1e-4)


def test_a_class_is_named_in_words(llava: str, emoji: tuple[Image, ...], ledger: Ledger) -> None:
    """A random model says anything; vLLM can be told what the choices are."""
    body = {"structured_outputs": {"choice": list(CLASSES)}}
    backend = chat(llava, mode="labels", body=body)
    [labels] = metered(backend, ledger, Labels(emoji[:3], CLASSES))
    assert all(0 <= label < len(CLASSES) for label in labels)
    assert spent(ledger) == (3, 0)
