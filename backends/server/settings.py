"""How a model is served: who may ask, what it costs, how fast it is and what goes wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from blackbox_vlm.backend import Price
from blackbox_vlm.errors import InputError
from blackbox_vlm.secret import Secret

from .faults import check_rates

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
MAX_IMAGES = 1024  # of one request
MAX_TEXTS = 4096  # of one request
MAX_TEXT = 1000  # characters of a text
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_RATE = re.compile(r"([1-9][0-9]{0,8})/(s|min|h)")


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests in each window of so many seconds."""

    count: int
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `120/min`, `5/s` or `1000/h`. Raises InputError: it is something else."""
        match = _RATE.fullmatch(text)
        if match is None:
            raise InputError(f"got the quota {text!r}; wanted e.g. 120/min, 5/s or 1000/h")
        return cls(int(match[1]), _SECONDS[match[2]])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a rehearsed owner demands.

    Attributes:
        token: that every request must carry; None lets everybody on this machine ask.
        hosts: names under which the server may be addressed (the Host header).
        price: per request, image and text (USD); reported in answers and added up in `/usage`.
        quota: requests taken in each window; beyond it the answer is 429.
        quota_headers: whether answers say what is left, and refusals when to come back.
        latency: seconds before every answer.
        faults: how often each of `faults.FAULTS` happens, as a fraction of requests.
        slow: seconds by which the fault `slow` delays an answer.
        seed: of the faults.
        concurrency: requests in work; one more is refused with 429.
        most_bytes: of a request's body.
        most_pixels: of a request's pictures together.
        header_seconds, body_seconds: in which a request's headers and body must arrive.
        idle_seconds: after which an unused connection is closed; clients wait less before they open
            a new one themselves, so that none is closed under a request.
        most_connections: open at the same time; further ones are closed.

    Raises:
        InputError: a value makes no sense.
    """

    token: Secret | None = None
    hosts: tuple[str, ...] = LOOPBACK_NAMES
    price: Price = field(default_factory=Price)
    quota: Rate | None = None
    quota_headers: bool = True
    latency: float = 0.0
    faults: Mapping[str, float] = field(default_factory=dict)
    slow: float = 5.0
    seed: int = 0
    concurrency: int = 8
    most_bytes: int = 16 * 2**20
    most_pixels: int = 100_000_000
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    most_connections: int = 512

    def __post_init__(self) -> None:
        check_rates(self.faults)
        prices = (self.price.per_request, self.price.per_image, self.price.per_text)
        if not all(0 <= number < float("inf") for number in (self.latency, self.slow, *prices)):
            raise InputError("prices and latency are numbers from 0 upwards; correct them")
        if self.concurrency < 1:
            raise InputError(f"got a concurrency of {self.concurrency}; wanted at least 1")
