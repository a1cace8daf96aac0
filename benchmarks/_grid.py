"""A grid of cells over processes: every finished cell is kept, so that a benchmark can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # "cell" holds the cell as a list; the rest is what was measured


def run_all(
    groups: Sequence[Sequence[Any]], run: Callable[[Any], Row], results: Path, jobs: int
) -> list[Row]:
    """Run the cells that are not in the results yet, and return the rows of all.

    Args:
        groups: cells (tuples of strings and numbers); those of a group follow each other in one
            process.
        run: a function of a module, from a cell to its row.
        results: JSON lines, one per finished cell.
        jobs: processes; each has one thread for its linear algebra.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = {tuple(row["cell"]): row for row in read(results)}
    if results.exists() and not results.read_bytes().endswith(b"\n"):
        results.write_text(results.read_text() + "\n")  # what follows is no part of a cut line
    cells = [cell for group in groups for cell in group]
    missing = [[cell for cell in group if cell not in rows] for group in groups]
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # read by a fresh process when it imports numpy and torch
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        work = [pool.submit(_run_group, group, run, results) for group in missing if group]
        try:
            for number, future in enumerate(as_completed(work), start=1):
                rows |= {tuple(row["cell"]): row for row in future.result()}
                print(f"{number}/{len(work)} groups of cells", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, nothing is begun any more
    return [rows[cell] for cell in cells]


def read(results: Path) -> Iterator[Row]:
    """The rows of an earlier run; a line that was cut off by its end is left out."""
    if results.exists():
        for line in results.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _run_group(cells: Sequence[Any], run: Callable[[Any], Row], results: Path) -> list[Row]:
    rows = []
    for cell in cells:
        try:
            rows.append(run(cell))
        except Exception as error:
            error.add_note(f"in the cell {cell}")
            raise
        with results.open("ab", buffering=0) as file:  # one write: processes share the file
            file.write(json.dumps(rows[-1]).encode() + b"\n")
    return rows
