"""Whatever JSON an endpoint answers: every protocol reads it or says what is wrong, and no more.

A right answer is spoilt at every place in every way; only `BackendError`s may come of that, whose
text fits on a terminal.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from blackbox_vlm.backends.blackbox import Blackbox
from blackbox_vlm.backends.chat import Chat
from blackbox_vlm.backends.embeddings import Embeddings
from blackbox_vlm.backends.endpoint import HttpBackend
from blackbox_vlm.backends.kserve import KServe
from blackbox_vlm.backends.score import Score
from blackbox_vlm.backends.zero_shot import ZeroShot
from hosted import URL, noise, served

from blackbox_vlm.backend import Answer, Labels, Request, TextEmbeddings, TextScores
from blackbox_vlm.contract import check_answer
from blackbox_vlm.errors import BackendError
from blackbox_vlm.images import Image
from blackbox_vlm.running import run_sync

TEXTS = ("cat", "dog")
TOP = [{"token": "A", "logprob": -0.1, "bytes": [65]}, {"token": "B", "logprob": -3.0}]
USAGE = {"total_tokens": 7, "cost": 0.25, "queries": 1, "images": 1, "texts": 2, "usd": 0.5}


def choice(**more: Any) -> dict[str, Any]:
    message = {"index": 0, "finish_reason": "stop", "message": {"content": "cat"}, **more}
    return {"model": "clip", "usage": USAGE, "choices": [message]}


Case = tuple[type[HttpBackend], dict[str, Any], type[Request], dict[str, Any] | list[Any]]
TENSOR = {"name": "logits", "shape": [1, 2], "datatype": "FP32", "data": [0.5, 0.25]}
CASES: dict[str, Case] = {
    "zero-shot": (
        ZeroShot,
        {},
        TextScores,
        [{"label": "dog", "score": 0.75}, {"label": "cat", "score": 0.25}],
    ),
    "embeddings": (
        Embeddings,
        {},
        TextEmbeddings,
        {
            "data": [{"index": i, "embedding": [0.5, 1.5]} for i in range(2)],
            "model": "clip",
            "usage": USAGE,
        },
    ),
    "score": (
        Score,
        {},
        TextScores,
        {
            "data": [{"index": i, "score": 0.1 * i} for i in range(2)],
            "model": "clip",
            "usage": USAGE,
        },
    ),
    "chat": (
        Chat,
        {},
        TextScores,
        choice(logprobs={"content": [{"token": "A", "logprob": -0.1, "top_logprobs": TOP}]}),
    ),
    "labels": (Chat, {"mode": "labels"}, Labels, choice()),
    "kserve": (
        KServe,
        {},
        TextScores,
        {"model_name": "clip", "model_version": "1", "outputs": [TENSOR]},
    ),
    "blackbox": (
        Blackbox,
        {},
        TextScores,
        {"id": "ID", "model": "clip", "values": [[0.5, 1.5]], "usage": USAGE},
    ),
}

ODD = [
    *(None, True, False, 0, -1, 0.5, -0.0, 1e300, 10**350, -(10**350)),
    *("", "\x1b[31m", "\u202ecat", "\ud800", "long " * 999, "0.5", "A", "dog"),
    *([], {}, [[]], [0.5], [1, "2"], [[[1]]], {"cat": 1}, list(range(300))),
]


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value."""
    yield path
    inner = data.items() if isinstance(data, dict) else ()
    for name, value in enumerate(data) if isinstance(data, list) else inner:
        yield from places(value, (*path, name))


def spoilt(right: Any) -> Iterator[tuple[str, Any]]:
    """Answers with one value missing or replaced, and what that was."""
    yield from ((f"{odd!r:.40} alone", odd) for odd in ODD)
    for *path, last in filter(None, places(right)):
        for odd in (..., *ODD):
            whole = here = copy.deepcopy(right)
            for name in path:
                here = here[name]
            if odd is ...:
                del here[last]
            else:
                here[last] = odd
            yield f"{odd!r:.40} at {[*path, last]}", whole


class Asked:
    """A backend of one protocol, whose endpoint answers as it is told to."""

    def __init__(self, case: Case, picture: Image) -> None:
        kind, options, of, _ = case
        given = {"url": URL, "model": "clip", "price": {"per_million_tokens": 1.0}, **options}
        self.backend = kind(inner=served(self._serve), **given)
        texts = of is TextEmbeddings
        self.request: Any = of(TEXTS) if texts else of((picture,), TEXTS)  # type: ignore[call-arg, arg-type, operator]
        self._data: Any = None

    async def told(self, data: Any) -> Answer | BackendError:
        """What becomes of the request, checked as the meter does."""
        self._data = data
        [outcome] = await self.backend.answer([self.request])
        if isinstance(outcome, Answer):
            try:
                check_answer(self.request, outcome, self.backend.capabilities)
            except BackendError as error:
                return error
        return outcome

    def _serve(self, request: httpx.Request) -> bytes:
        name = json.loads(request.content).get("id", "")
        return json.dumps(self._data).replace('"ID"', json.dumps(name)).encode()


@pytest.mark.parametrize("name", CASES)
def test_any_answer_is_read_or_refused(name: str, tmp_path: Path) -> None:
    asked, right = Asked(CASES[name], noise(tmp_path, 1)[0]), CASES[name][3]

    async def ask() -> None:
        assert isinstance(await asked.told(right), Answer)
        for what, data in spoilt(right):
            try:
                outcome = await asked.told(data)
            except Exception as error:
                pytest.fail(f"{what}: {error!r}")
            if isinstance(outcome, Answer):
                assert 0 <= outcome.cost <= 1e9, what
            else:
                assert str(outcome).isprintable(), what
                assert len(str(outcome)) < 1000, what

    run_sync(ask())
