"""What the tests against foreign servers share; see README.md here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from foreign import KEY, KEY_ENV

from blackbox_vlm import demo_folder
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)


@pytest.fixture(scope="session")
def emoji() -> tuple[Image, ...]:
    """33 different drawings: one more than Infinity takes in a request."""
    paths = sorted((demo_folder() / "test").glob("*/*.png"))[:33]
    return tuple(Image.from_file(path) for path in paths)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite", 100) as ledger:
        yield ledger
