"""The whole fault matrix: one id per row, F01 to F56.

Rows 1 to 34 are the public ones of `blackbox_vlm.testing`, on our zero-shot protocol; those that
depend on the form of an answer also on the embeddings protocol.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("faults.books", "faults.inputs")

from faults import books, inputs  # noqa: E402
from faults.remote import HostedEmbeddings, HostedZeroShot  # noqa: E402

from blackbox_vlm.testing import FaultMatrix  # noqa: E402
from blackbox_vlm.testing.matrix import ROWS as REMOTE  # noqa: E402
from blackbox_vlm.testing.matrix import Row  # noqa: E402
from blackbox_vlm.testing.matrix.bench import Bench  # noqa: E402

HERE = books.ROWS | inputs.ROWS
FORM = ("F27", "F30", "F31", "F32")  # need places, or a model's name


class TestZeroShot(HostedZeroShot, FaultMatrix):
    pass


@pytest.mark.parametrize("name", HERE)
def test_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HERE[name](tmp_path, monkeypatch)


@pytest.mark.parametrize("row", [row for row in REMOTE if row.id in FORM], ids=str)
def test_embeddings(row: Row, tmp_path: Path) -> None:
    with Bench(HostedEmbeddings(), tmp_path) as bench:
        row.check(bench)


def test_every_row_is_here_once() -> None:
    names = [str(row) for row in REMOTE] + list(HERE)
    assert [name.split()[0] for name in names] == [f"F{number:02}" for number in range(1, 57)]
