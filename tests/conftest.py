"""Shared by all tests: one thread, so that small numbers are fast on a busy machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # read when numpy and torch are first imported


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """`DualEncoder.load`, which keeps what it has loaded."""
    from blackbox_vlm.backends.dual_encoder import DualEncoder

    return cache(DualEncoder.load)


@pytest.fixture(scope="module")
def few_drawings() -> Iterator[int]:
    """How many there are now: each of the usual 250 costs a model in this process 20 ms."""
    from blackbox_vlm import observing, planner
    from blackbox_vlm.background import background_images

    few = background_images()[:8]
    with pytest.MonkeyPatch.context() as patch:
        for module in (observing, planner):
            patch.setattr(module, "background_images", lambda: few)
        yield len(few)


@pytest.fixture(scope="module")
def one_load(load: Callable[..., Any]) -> Iterator[None]:
    """However many local black boxes are opened, each model is loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blackbox_vlm.backends.dual_encoder.DualEncoder.load", load)
        yield
