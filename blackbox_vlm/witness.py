"""A backend that looks over another's shoulder, for `blackbox_vlm.probe`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from blackbox_vlm.backend import Answer, Backend, Outcome, Request, ScoreKind, TextScores
from blackbox_vlm.evidence import Seen, as_written


class Witness:
    """A backend that notes what another answers, and lets pass what a declaration would refuse.

    A wrong model name, kind of scores or limit is what a probe looks for, and no error.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.limits = inner.capabilities
        self.capabilities = replace(
            inner.capabilities,
            score_kind=ScoreKind.LOGITS,  # whatever they are, they are numbers
            images_per_request=None,
            texts_per_request=None,
            requests_per_batch=1,
            concurrency=1,
            idempotent=False,
            refusals_free=False,
        )
        self.seen: dict[Request, Seen] = {}
        self._replies: list[Any] = []
        if hasattr(inner, "observer"):
            inner.observer = self._replies.append

    async def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        """Ask the other one."""
        [request] = requests
        [outcome] = await self.inner.answer(requests)
        return [self._note(request, outcome) if isinstance(outcome, Answer) else outcome]

    async def aclose(self) -> None:
        """Close the other one."""
        await self.inner.aclose()

    def _note(self, request: Request, answer: Answer) -> Answer:
        data, headers = None, {}
        if self._replies:
            data, headers = self._replies[-1].data, self._replies[-1].headers
        values = np.asarray(answer.values, dtype=np.float64)
        if isinstance(request, TextScores):
            values = as_written(answer.values, data)
        seen = Seen(request, values, answer.model_id, answer.quota, data, headers)
        self.seen.setdefault(request, seen)
        return replace(answer, model_id=self.capabilities.model_id)
