"""Our hosted protocols in front of the scripted server: what the matrix is run on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
from blackbox_vlm.backends.embeddings import Embeddings
from blackbox_vlm.backends.zero_shot import ZeroShot

from blackbox_vlm.backend import Backend, Capabilities, TextScores
from blackbox_vlm.images import Image
from blackbox_vlm.testing.matrix.bench import FaultHooks


class BatchedZeroShot(ZeroShot):
    """Takes a batch, so that one of it can fail alone."""

    def declare(self) -> Capabilities:
        return replace(super().declare(), requests_per_batch=32)


class HostedZeroShot(FaultHooks):
    """Hugging Face's zero-shot protocol."""

    client_class: type[ZeroShot] = BatchedZeroShot

    def make_remote(
        self,
        url: str,
        timeout: float,
        ca_file: Path | None = None,
        *,
        key_env: str = "MATRIX_KEY",
    ) -> Backend:
        return self.client_class(
            url=f"{url}/models/clip",
            model="clip",
            timeout=timeout,
            ca_file=ca_file,
            concurrency=8,
            idempotency_header="Idempotency-Key",
            key_env=key_env,
        )

    def good_answer(self, body: bytes) -> bytes:
        labels = json.loads(body)["parameters"]["candidate_labels"]
        scores = np.arange(len(labels), 0, -1) / np.arange(len(labels) + 1).sum()
        rows = zip(labels, scores, strict=True)
        return json.dumps([{"label": label, "score": score} for label, score in rows]).encode()


class HostedEmbeddings(FaultHooks):
    """OpenAI's embeddings protocol, whose answers name their model and their places."""

    def make_remote(self, url: str, timeout: float, ca_file: Path | None = None) -> Backend:
        return Embeddings(url=f"{url}/v1/embeddings", model="clip", timeout=timeout)

    def good_answer(self, body: bytes) -> bytes:
        rows = [
            {"object": "embedding", "index": index, "embedding": [0.5, 0.25 * index, -1.5, 0.125]}
            for index, _ in enumerate(json.loads(body)["input"])
        ]
        usage = {"prompt_tokens": 9, "total_tokens": 9}
        return json.dumps({"data": rows, "model": "clip", "usage": usage}).encode()


def picture(folder: Path, side: int = 8) -> Image:
    """A picture on the disk."""
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(folder / f"{side}.png")
    return Image.from_file(folder / f"{side}.png")


def question(image: Image, name: object) -> TextScores:
    """One of many different questions about a picture."""
    return TextScores((image,), (f"a cat of kind {name}", "a dog"))
