"""What works beside the endpoint in a run: a local model, and who proposes text prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from blackbox_vlm.backend import Backend
from blackbox_vlm.describing import describe
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.local_encoder import UNLIMITED, LocalEncoder
from blackbox_vlm.meter import Meter
from blackbox_vlm.plan_prompts import Descriptions
from blackbox_vlm.prompting import Proposers
from blackbox_vlm.run_directory import RunDirectory
from blackbox_vlm.task import Classes


class Beside:
    """What works beside the endpoint, with ledgers of its own in the run's folder.

    Args:
        local: the local model, open; None: there is none.
        descriptions: of the classes.
        run: the run's folder.
        stack: closes the ledgers.
        writers: a meter over the language model, on the ledger of the run, or nothing.
    """

    def __init__(
        self,
        local: Backend | None,
        descriptions: Descriptions | None,
        run: RunDirectory,
        stack: ExitStack,
        writers: Sequence[Meter],
    ) -> None:
        self._local, self._descriptions = local, descriptions
        self._run, self._stack, self._writers = run, stack, writers

    def encoder(self) -> LocalEncoder | None:
        """Whose vectors describe the images beside the endpoint's answers."""
        if self._local is None:
            return None
        return LocalEncoder(self._local, self._ledger("local-encoder"))

    async def describe(self, classes: Classes) -> Descriptions:
        """What the language model writes of the classes."""
        [writer] = self._writers
        return await describe(writer, classes)

    def proposers(self) -> Proposers:
        """Who proposes text prompts; the local model as a surrogate that takes soft ones."""
        surrogate = None
        if self._local is not None:
            surrogate = (self._local, self._ledger("surrogate"))
        return Proposers(self._descriptions, next(iter(self._writers), None), surrogate)

    def _ledger(self, name: str) -> Ledger:
        return self._stack.enter_context(Ledger(self._run.path / f"{name}.sqlite", UNLIMITED))
