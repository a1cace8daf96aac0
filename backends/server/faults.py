"""What goes wrong on purpose, drawn from a seed.

Before the work, and not billed: `error429` and `error503`. After the work, so that the answer is
billed and lost: `error500`, `drop` (the connection breaks in the middle of the answer), `garbage`
(half a JSON) and `slow` (the answer comes late).
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from blackbox_vlm.errors import InputError

BEFORE = {"error429": 429, "error503": 503}
FAULTS = (*BEFORE, "error500", "drop", "garbage", "slow")


def check_rates(rates: Mapping[str, float]) -> None:
    """Raises InputError: an unknown fault, or rates that are no fractions of a whole."""
    for name, rate in rates.items():
        if name not in FAULTS:
            raise InputError(f"unknown fault {name!r}; wanted one of {', '.join(FAULTS)}")
        if not 0 <= rate <= 1:
            raise InputError(f"the fault {name} has the rate {rate}; wanted 0 to 1")
    if sum(rates.values()) > 1 + 1e-9:
        raise InputError(f"the rates of the faults add up to {sum(rates.values()):g}; wanted <= 1")


class Faults:
    """Draws a fault, or None, for each request."""

    def __init__(self, rates: Mapping[str, float], seed: int) -> None:
        self._rates = dict(rates)
        self._random = Random(seed)

    def draw(self) -> str | None:
        """One request's fate; the same sequence for the same seed."""
        at = self._random.random()
        for name, rate in self._rates.items():
            at -= rate
            if at < 0:
                return name
        return None


def spoiled(fault: str | None, answer: Response) -> Response:
    """What arrives of an answer."""
    if fault == "error500":
        return JSONResponse({"error": "the server failed (injected)"}, 500)
    if fault == "garbage":
        half = bytes(answer.body)[: len(answer.body) // 2]
        return Response(half, media_type="application/json")
    return _CutOff(bytes(answer.body)) if fault == "drop" else answer


class _CutOff(Response):
    """Announces a whole body, sends half of it and ends: the server then cuts the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        half = self.body[: len(self.body) // 2]
        await send({"type": "http.response.body", "body": half, "more_body": True})
