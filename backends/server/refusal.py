"""How the server says no: a status and one sentence that repeats nothing of the request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPENAI_PATHS = "/v1/"  # where errors are objects, as OpenAI's clients read them


def problem(path: str, message: str) -> dict[str, Any]:
    """The JSON of an error at that path; elsewhere than under `OPENAI_PATHS` a plain sentence."""
    if not path.startswith(OPENAI_PATHS):
        return {"error": message}
    kind = {"type": "invalid_request_error", "param": None, "code": None}
    return {"error": {"message": message, **kind}}


class Refusal(Exception):
    """A request that is not served.

    Args:
        status: the HTTP status.
        message: what was wanted, without a word of what was sent.
        headers: that go with it.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})
