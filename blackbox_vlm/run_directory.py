"""The folder of a run: what was asked for, what it cost, what came out.

RUN/run.json        how the run was started: enough to resume it
RUN/ledger.sqlite   every query, and where the search stands
RUN/result.json     what came out
RUN/adapter/        the tuned adapter
RUN/*-<data>.sqlite ledgers of evaluations and predictions, each with a budget of its own
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from blackbox_vlm._files import to_json, write_atomically
from blackbox_vlm.errors import InputError, StorageError


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.ledger = self.path / "ledger.sqlite"
        self.adapter = self.path / "adapter"
        self.result = self.path / "result.json"
        self._description = self.path / "run.json"
        self._started = self.path / ".started"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self._description.exists() or self.ledger.exists()

    def side_ledger(self, purpose: str, fingerprint: str) -> Path:
        """The ledger of an evaluation or prediction of some data."""
        return self.path / f"{purpose}-{fingerprint[:16]}.sqlite"

    def check_free(self) -> None:
        """Refuse a folder that is taken.

        Raises:
            InputError: there is a run already, or something else.
        """
        if self.exists:
            raise InputError(
                f"{self.path} holds a run already; `blackbox-vlm resume {self.path}` goes on with "
                "it, another --out starts a new one"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self._contents())):
            raise InputError(f"{self.path} exists and is no run; choose another --out")

    def make(self) -> None:
        """Make the folder.

        Raises:
            StorageError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; nothing was sent. "
                "Choose another --out"
            ) from error

    def mark_started(self) -> None:
        """Say that from here on queries may have been spent.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            write_atomically(self._started, b"")
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}") from error

    def create(self, description: dict[str, Any]) -> None:
        """Write down how the run was started. Call it with the folder locked.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            write_atomically(self._description, to_json(description))
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; nothing was sent. "
                "Choose another --out"
            ) from error

    def describe(self) -> dict[str, Any]:
        """How the run was started.

        Raises:
            InputError: there is no run here.
        """
        try:
            return dict(json.loads(self._description.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # TypeError: JSON, but no object
            raise InputError(
                f"{self.path} is not a run's folder; wanted one made by `blackbox-vlm tune`"
            ) from None

    def check_ledger(self) -> None:
        """Refuse to go on with a run that has lost its memory of what it spent.

        Raises:
            StorageError: queries may have been spent, and the ledger is missing or empty.
        """
        if not self._started.exists():
            return  # it ended before its first query
        if not self.ledger.exists() or not self.ledger.stat().st_size:
            raise StorageError(
                f"{self.ledger} is missing or empty, and what the run has spent with it; restore "
                "it, or start another --out"
            )

    def write_result(self, result: dict[str, Any]) -> None:
        """Write `result.json`."""
        try:
            write_atomically(self.result, to_json(result))
        except OSError as error:
            raise StorageError(f"cannot write {self.result}: {error.strerror}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run; a second process is refused at once.

        Raises:
            StorageError: another process is working on it, or the folder cannot be written.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StorageError(
                f"another process is working on {self.path}; wait for it or choose another --out"
            ) from None
        except OSError as error:
            raise StorageError(f"cannot lock {self.path}: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def _contents(self) -> Iterator[Path]:
        """What is there, but for hidden files and the leavings of a write that was cut short."""
        entries = self.path.iterdir()
        return (e for e in entries if not e.name.startswith(".") and e.suffix != ".partial")
