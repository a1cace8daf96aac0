"""The benchmark of access levels: its arithmetic, its grid, and a small run of the whole script."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blackbox_vlm import demo_folder

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules of the benchmark, which lie beside its script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("_cells", "_figures", "_grid", "_tables", "access")
        yield SimpleNamespace(**{name.strip("_"): import_module(name) for name in names})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four training and four test images of each of three classes."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        for name in ("bird", "drink", "flower"):
            (folder / split / name).mkdir(parents=True)
            for file in sorted((demo_folder() / split / name).iterdir())[:4]:
                shutil.copy(file, folder / split / name)
    return str(folder)


def a_cell(bench: Any, **changes: Any) -> Any:
    cell = bench.cells.Cell("data", "softmax", "planner", 2, 0, 8000, 1, "nano", "-")
    return cell._replace(**changes)


def test_differences_are_paired_and_averages_are_over_data_sets(bench: Any) -> None:
    one = {("a", 0): 50.0, ("a", 1): 60.0, ("b", 0): 30.0}
    other = {("a", 0): 49.0, ("a", 1): 57.0, ("c", 0): 99.0}
    gain = bench.tables.paired(one, other)
    assert (gain.mean, gain.error, gain.n) == (2.0, pytest.approx(1.0), 2)
    assert bench.tables.average(one) == pytest.approx((55 + 30) / 2)  # not the mean of three
    assert bench.tables.average(one, "b") == 30
    base = dict.fromkeys(one, 20.0)
    assert bench.tables.share(other, one, base) == pytest.approx((29 + 37) / (30 + 40))


def test_the_guard_counts_what_fell_below_zero_shot(bench: Any) -> None:
    rows = [
        {
            "cell": list(a_cell(bench, data=data, seed=seed)),
            "accuracy": accuracy,
            "zero_shot": 50.0,
        }
        for data, figures in {"a": (60.0, 49.0), "b": (47.0, 45.0), "c": (49.0, 50.5)}.items()
        for seed, accuracy in enumerate(figures)
    ]
    text = bench.tables.guard(bench.tables.Rows(rows, 8000))
    assert "| softmax | 6 | 4 | -2.5 | -5.0 | 1 of 3 | -4.0 ± 1.0 (b at 2) |" in text


def double(cell: tuple[int, int]) -> dict[str, Any]:
    """A cell's work, for the grid; it runs in a process of its own."""
    return {"cell": list(cell), "twice": 2 * cell[0]}


def test_finished_cells_are_kept_and_a_cut_line_is_done_again(bench: Any, tmp_path: Path) -> None:
    results = tmp_path / "deep" / "results.jsonl"
    results.parent.mkdir()
    results.write_text('{"cell": [1, 0], "twice": "kept"}\n{"cell": [2, 0], "tw')
    rows = bench.grid.run_all([[(1, 0), (2, 0)], [(3, 0)]], double, results, jobs=1)
    assert [row["twice"] for row in rows] == ["kept", 4, 6]
    assert {tuple(row["cell"]) for row in bench.grid.read(results)} == {(1, 0), (2, 0), (3, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embeddings", "softmax", "64 texts"])
def test_one_image_per_request_tunes_to_the_same(bench: Any, data: str, kind: str) -> None:
    """What a hosted endpoint would answer is what a whole batch at once is answered."""
    alone = bench.cells.run(a_cell(bench, data=data, kind=kind))
    together = bench.cells.run(a_cell(bench, data=data, kind=kind, images_per_request=0))
    same = ("accuracy", "zero_shot", "strategy", "out_of_fold", "images", "n_train", "n_test")
    assert {k: alone[k] for k in same} == {k: together[k] for k in same}
    assert alone["ece"] == pytest.approx(together["ece"], abs=1e-3)
    assert alone["queries"] >= alone["images"] >= alone["n_train"]
    assert alone["queries"] > together["queries"]
    assert alone["queries_per_prediction"] >= 1


def test_the_label_reference_chooses_its_template_on_training_images(bench: Any, data: str) -> None:
    row = bench.cells.run(a_cell(bench, data=data, kind="label", method=bench.cells.TEMPLATE))
    assert set(row["training_accuracy"]) >= set(bench.cells.TEMPLATES)
    assert row["queries"] == row["n_train"] * len(row["training_accuracy"])
    assert row["training_accuracy"][row["template"]] == max(row["training_accuracy"].values())


def test_what_a_cell_does_not_allow_is_said(bench: Any, data: str) -> None:
    row = bench.cells.run(a_cell(bench, data=data, shots=5))
    assert "shots=5" in row["left_out"]
    assert not bench.tables.Rows([row], 8000).kinds()


@pytest.mark.slow
def test_the_script_prints_its_tables_and_goes_on_where_it_was(tmp_path: Path, data: str) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    words = [sys.executable, str(BENCHMARKS / "access.py"), data, "--jobs", "1"]
    words += ["--shots", "1", "2", "--seeds", "0", "--kinds", "embeddings", "softmax"]
    words += ["--results", "access.jsonl", "--figures", "figures"]

    def once() -> str:
        done = subprocess.run(
            words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split("### ", 1)[1]

    first, drawn = once(), (tmp_path / "figures" / "embeddings.svg").read_bytes()
    assert "logistic regression" in first
    rows = (tmp_path / "access.jsonl").read_text()
    assert once() == first
    assert (tmp_path / "access.jsonl").read_text() == rows
    assert (tmp_path / "figures" / "embeddings.svg").read_bytes() == drawn
