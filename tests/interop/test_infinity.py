"""Our embeddings backend against Infinity, which serves a real (tiny, random) CLIP."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from blackbox_vlm.backends.embeddings import Embeddings
from foreign import KEY, KEY_ENV, binaries, free_port, run_script, running
from hosted import metered, spent
from numpy.typing import NDArray

from blackbox_vlm import demo_folder
from blackbox_vlm.backend import ImageEmbeddings, TextEmbeddings
from blackbox_vlm.errors import AuthError, ModelChanged, Refused
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger

TEXTS = ("a photo of a cat", "a photo of a dog", "un café")
MODEL = "tiny-clip"


class Infinity:
    """The running server: its address, and how often it was asked for embeddings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.port = free_port()
        self.origin = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.origin}/embeddings"

    def requests(self) -> int:
        return self.log.read_text(errors="replace").count('"POST /embeddings')

    def backend(self, **options: Any) -> Embeddings:
        given = {"url": self.url, "model": MODEL, "dialect": "infinity", "key_env": KEY_ENV}
        return Embeddings(**{**given, **options})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Infinity]:
    server = Infinity(tmp_path_factory.mktemp("infinity"))
    run_script("infinity", "tiny_clip.py", server.folder / "clip")
    program = [binaries("infinity") / "infinity_emb", "v2"]
    model = ["--model-id", server.folder / "clip", "--served-model-name", MODEL]
    engine = ["--engine", "torch", "--device", "cpu", "--no-bettertransformer"]
    where = ["--host", "127.0.0.1", "--port", server.port, "--api-key", KEY]
    command = [*program, *model, *engine, "--no-model-warmup", *where]
    with running(command, f"{server.origin}/health", server.log):
        yield server


@pytest.fixture(scope="module")
def reference(server: Infinity, emoji: tuple[Image, ...]) -> dict[str, NDArray[np.float32]]:
    """The same vectors by transformers, without a server."""
    texts, out = server.folder / "texts.json", server.folder / "reference.npz"
    texts.write_text(json.dumps(TEXTS))
    paths = [image.path for image in emoji]
    run_script("infinity", "reference.py", server.folder / "clip", out, texts, *paths)
    with np.load(out) as arrays:
        return {name: arrays[name] for name in arrays}


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_the_vectors_are_the_models_own(
    server: Infinity,
    reference: dict[str, NDArray[np.float32]],
    emoji: tuple[Image, ...],
    ledger: Ledger,
    encoding_format: str,
) -> None:
    """33 images are one too many for Infinity: they leave as 32 and 1."""
    before = server.requests()
    backend = server.backend(encoding_format=encoding_format)
    images, texts = metered(backend, ledger, ImageEmbeddings(emoji), TextEmbeddings(TEXTS))
    np.testing.assert_allclose(images, reference["images"], atol=2e-5)
    np.testing.assert_allclose(texts, reference["texts"], atol=2e-5)
    assert spent(ledger) == (3, 0)
    assert ledger.totals().images == 33
    assert server.requests() - before == 3


def test_base64_holds_the_same_numbers(
    server: Infinity, emoji: tuple[Image, ...], tmp_path: Path
) -> None:
    vectors = []
    for encoding_format in ("float", "base64"):
        with Ledger(tmp_path / encoding_format, 2) as ledger:
            backend = server.backend(encoding_format=encoding_format)
            vectors.append(metered(backend, ledger, ImageEmbeddings(emoji[:4])))
    np.testing.assert_array_equal(*vectors)


def test_long_texts_are_cut_without_a_word(server: Infinity, ledger: Ledger) -> None:
    """After 20 tokens, which is no doing of ours and worth knowing; see README.md."""
    letters = "abcdefghijklmnopqrstuvwxyz"  # a token each, and a mark on both sides
    cut, also_cut, shorter = letters[:19], letters[:22], letters[:16]
    [texts] = metered(server.backend(), ledger, TextEmbeddings((cut, also_cut, shorter)))
    np.testing.assert_allclose(texts[1], texts[0], atol=1e-6)
    assert not np.allclose(texts[2], texts[0], atol=1e-3)


def test_another_model_than_asked_is_served_and_noticed(server: Infinity, ledger: Ledger) -> None:
    """Infinity answers 200 to any name while it serves one model."""
    before = server.requests()
    with pytest.raises(ModelChanged, match=f"'clip-vit-large'.*'{MODEL}' answered"):
        metered(server.backend(model="clip-vit-large"), ledger, TextEmbeddings(TEXTS))
    assert spent(ledger) == (1, 1)
    assert server.requests() - before == 1


def test_a_wrong_key_stops_after_one_request_and_is_not_shown(
    server: Infinity, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "sk-of-somebody-else")
    before = server.requests()
    backend = server.backend(refusals_free=True, texts_per_request=1)
    with pytest.raises(AuthError, match="answered 401") as error:
        metered(backend, ledger, TextEmbeddings(TEXTS))
    assert "sk-of-somebody-else" not in str(error.value)
    assert spent(ledger) == (0, 0)
    assert server.requests() - before == 1


def test_a_refusal_that_echoes_the_request_is_cut_short(
    server: Infinity, emoji: tuple[Image, ...], ledger: Ledger
) -> None:
    before = server.requests()
    with pytest.raises(Refused, match="answered 422") as error:
        metered(server.backend(images_per_request=0), ledger, ImageEmbeddings(emoji))
    assert "at most 32 items" in str(error.value)
    assert len(str(error.value)) < 400
    assert spent(ledger) == (1, 0)
    assert server.requests() - before == 1


def test_a_refusal_is_one_however_long_its_echo(
    server: Infinity, ledger: Ledger, tmp_path: Path
) -> None:
    """The echo of 33 photographs is larger than any answer that is read to its end."""
    noise = np.random.default_rng(0).integers(0, 256, (33, 320, 320, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        PIL.Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    images = tuple(Image.from_file(path) for path in sorted(tmp_path.glob("*.png")))
    with pytest.raises(Refused, match="answered 422"):
        metered(server.backend(images_per_request=0), ledger, ImageEmbeddings(images))
    assert spent(ledger) == (1, 0)


def command(*arguments: object) -> dict[str, Any]:
    """Run our own command line in a process of its own; its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "blackbox_vlm", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_tuning_costs_what_the_plan_says(server: Infinity, tmp_path: Path) -> None:
    endpoint, out = tmp_path / "endpoint.toml", tmp_path / "run"
    endpoint.write_text(
        f'protocol = "embeddings"\ndialect = "infinity"\nurl = "{server.url}"\n'
        f'model = "{MODEL}"\nkey_env = "{KEY_ENV}"\nencoding_format = "base64"\n'
        "images_per_request = 4\nconcurrency = 2\ndeterministic = true\n"
    )
    options = ("--backend", endpoint, "--method", "refine", "--shots", 3, "--budget", 40)
    plan = command("tune", demo_folder(), *options, "--dry-run")
    before = server.requests()
    result = command("tune", demo_folder(), *options, "--out", out)
    asked = server.requests() - before
    assert plan["queries"] == result["queries_spent"] == asked
    assert 0 < asked <= 40
