"""Fixtures of the fault matrix."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of `faults.remote`."""
    monkeypatch.setenv("MATRIX_KEY", "zq-matrix/9c==")
