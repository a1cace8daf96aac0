"""Transactions shared by the tasks of an event loop.

A synced commit takes most of a millisecond. What tasks want written in the same turn of the loop
is therefore committed together, and a task that settles one query and reserves the next pays once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from blackbox_vlm.errors import BlackboxError, StorageError
from blackbox_vlm.ledger import Ledger

Result = TypeVar("Result")


class GroupCommit:
    """Writes to a ledger, many at a time.

    Args:
        ledger: whose methods the writes call.
        on_commit: told after every commit; it raises nothing.
    """

    def __init__(self, ledger: Ledger, on_commit: Callable[[], None]) -> None:
        self._ledger = ledger
        self._on_commit = on_commit
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._failed: Exception | None = None

    def submit(self, write: Callable[[], Result]) -> asyncio.Future[Result]:
        """Have a write done in the next transaction.

        Returns:
            its result, once it is on the disk; or its error, which touches no other write. A
            `StorageError`, or an error that should not happen, is everybody's from then on.
        """
        loop = asyncio.get_running_loop()
        if self._waiting and self._waiting[0][1].get_loop() is not loop:
            self._waiting = []  # that loop has ended before its turn: what was sent stays charged
        if not self._waiting:
            loop.call_soon(self._commit)
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((write, future))
        return future

    async def flush(self) -> None:
        """Wait until everything submitted is on the disk.

        Raises:
            StorageError: it could not be written.
        """
        await self.submit(lambda: None)

    def _commit(self) -> None:
        waiting, self._waiting = self._waiting, []
        waiting = [(write, future) for write, future in waiting if not future.cancelled()]
        outcomes: list[tuple[Any, Exception | None]] = []
        try:
            if self._failed is not None:
                raise self._failed
            with self._ledger.together():
                outcomes = [_outcome(write) for write, _ in waiting]
        except Exception as error:  # nothing of it was written, and nobody may wait for ever
            self._failed = error
            outcomes = [(None, error)] * len(waiting)
        for (_, future), (result, failure) in zip(waiting, outcomes, strict=True):
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)
                future.exception()  # a write that nobody waits for fails without a warning
        self._on_commit()


def _outcome(write: Callable[[], Any]) -> tuple[Any, BlackboxError | None]:
    try:
        return write(), None
    except StorageError:
        raise
    except BlackboxError as error:  # refused before it wrote anything
        return None, error
