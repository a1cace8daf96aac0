"""What works beside the endpoint in a run: a local model, and who proposes text prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from blackbox_vlm.backend import open_backend
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.local_encoder import UNLIMITED, LocalEncoder, open_local_encoder, parse_spec
from blackbox_vlm.meter import Meter
from blackbox_vlm.plan_prompts import Descriptions
from blackbox_vlm.prompting import Proposers
from blackbox_vlm.run_directory import RunDirectory
from blackbox_vlm.running import run_sync


class Beside:
    """Opens what is wanted when it is wanted, with ledgers of their own in the run's folder.

    Args:
        spec: of the local model; None: there is none.
        descriptions: of the classes.
        run: the run's folder.
        stack: closes what was opened.
        writers: a meter over the language model, on the ledger of the run, or nothing.
    """

    def __init__(
        self,
        spec: str | None,
        descriptions: Descriptions | None,
        run: RunDirectory,
        stack: ExitStack,
        writers: Sequence[Meter],
    ) -> None:
        self._spec, self._descriptions = spec, descriptions
        self._run, self._stack, self._writers = run, stack, writers

    def encoder(self) -> LocalEncoder | None:
        """Whose vectors describe the images beside the endpoint's answers."""
        if self._spec is None:
            return None
        ledger = self._run.path / "local-encoder.sqlite"
        return self._stack.enter_context(open_local_encoder(self._spec, ledger))

    def proposers(self) -> Proposers:
        """Who proposes text prompts; the local model as a surrogate that takes soft ones."""
        surrogate = None
        if self._spec is not None:
            model, pretrained = parse_spec(self._spec)
            backend = open_backend("local", model=model, pretrained=pretrained, access="soft")
            self._stack.callback(lambda: run_sync(backend.aclose()))
            ledger = Ledger(self._run.path / "surrogate.sqlite", UNLIMITED)
            surrogate = (backend, self._stack.enter_context(ledger))
        return Proposers(self._descriptions, next(iter(self._writers), None), surrogate)
