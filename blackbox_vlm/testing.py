"""A test suite for backends: subclass it, say how to make yours, and pytest does the rest.

    from blackbox_vlm.testing import BackendConformance

    class TestMyBackend(BackendConformance):
        def make_backend(self):
            return MyBackend(endpoint="http://127.0.0.1:8000")

Every test opens a backend of its own and closes it. A whole run sends about thirty requests, so
point it at an endpoint that is there for tests.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from blackbox_vlm.backend import (
    Access,
    Array,
    Backend,
    ImageEmbeddings,
    Labels,
    PromptScores,
    Request,
    ScoreKind,
    TextEmbeddings,
    TextScores,
)
from blackbox_vlm.errors import InputError, Refused
from blackbox_vlm.images import Image
from blackbox_vlm.meter import check_answer
from blackbox_vlm.running import run_sync

TOLERANCE = 1e-3  # relative: a batch may be computed in another order than a single request


class BackendConformance:
    """What the meter relies on, as tests. Override `make_backend`; name the subclass `Test...`."""

    def make_backend(self) -> Backend:
        """A fresh backend, in the setting under test."""
        raise NotImplementedError("override make_backend")

    def make_images(self, folder: Path) -> Sequence[Image]:
        """At least two different pictures; override it where noise will not do."""
        noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        for index, pixels in enumerate(noise):
            PIL.Image.fromarray(pixels).save(folder / f"{index}.png")
        return [Image.from_file(folder / f"{index}.png") for index in range(len(noise))]

    def test_capabilities_are_sane_and_constant(self, tmp_path: Path) -> None:
        with self._backend() as backend:
            declared = backend.capabilities
            assert isinstance(declared.access, Access)
            assert isinstance(declared.score_kind, ScoreKind)
            assert isinstance(declared.model_id, str)
            assert declared.model_id
            assert 0 < declared.logit_scale < math.inf
            for name in ("images_per_request", "texts_per_request", "top_k"):
                limit = getattr(declared, name)
                assert limit is None or limit >= 1, f"{name} is {limit}; None means no limit"
            assert declared.decimals is None or declared.decimals >= 0
            assert min(declared.requests_per_batch, declared.concurrency) >= 1
            price = declared.price
            for usd in (price.per_request, price.per_image, price.per_text):
                assert 0 <= usd < math.inf
            assert (declared.soft_prompts is not None) == (declared.access is Access.SOFT)
            self._ask_each(backend, self._requests(backend, tmp_path)[:1])
            assert backend.capabilities == declared

    def test_answers_have_the_model_shape_and_type_of_the_seam(self, tmp_path: Path) -> None:
        with self._backend() as backend:
            requests = self._requests(backend, tmp_path)
            for request, values in zip(requests, self._ask_each(backend, requests), strict=True):
                assert values.dtype == (np.int64 if isinstance(request, Labels) else np.float32)

    def test_an_idempotent_backend_repeats_itself(self, tmp_path: Path) -> None:
        import pytest

        with self._backend() as backend:
            if not backend.capabilities.idempotent:
                pytest.skip("not declared idempotent")
            requests = self._requests(backend, tmp_path)
            again = self._ask_each(backend, requests)
            for first, second in zip(self._ask_each(backend, requests), again, strict=True):
                np.testing.assert_array_equal(first, second)

    def test_a_batch_is_answered_in_order(self, tmp_path: Path) -> None:
        import pytest

        with self._backend() as backend:
            capabilities = backend.capabilities
            if min(capabilities.requests_per_batch, 2) < 2:
                pytest.skip("takes one request at a time")
            requests = self._requests(backend, tmp_path)[: capabilities.requests_per_batch]
            for batch in (requests, requests[::-1]):
                answers = run_sync(backend.answer(batch))
                assert len(answers) == len(batch)
                for alone, answer in zip(self._ask_each(backend, batch), answers, strict=True):
                    np.testing.assert_allclose(answer.values, alone, TOLERANCE, TOLERANCE)

    def test_limits_are_enforced(self, tmp_path: Path) -> None:
        import pytest

        with self._backend() as backend:
            limits, pictures = backend.capabilities, tuple(self.make_images(tmp_path))
            texts = _texts(min(2, limits.texts_per_request or 2))
            beyond: list[tuple[int | None, tuple[Image, ...], tuple[str, ...]]] = [
                (limits.images_per_request, pictures * (limits.images_per_request or 0), texts),
                (limits.texts_per_request, pictures, _texts((limits.texts_per_request or 0) + 1)),
            ]
            for limit, many_images, many_texts in beyond:
                for request in _every_kind(backend, many_images, many_texts):
                    over = request.n_images > len(pictures) or request.n_texts > len(texts)
                    if limit is None or not limits.takes(request) or not over:
                        continue
                    with pytest.raises((InputError, Refused)):
                        run_sync(backend.answer([request]))
