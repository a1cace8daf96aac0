"""`tune DATA --backend endpoint.toml --budget 8000` and nothing else, on every remote protocol.

Real servers on this machine, real pictures, and the embedded model behind them: which strategy is
picked, what it asks, and that the owner billed exactly that.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from blackbox_vlm.backends.server import ServerSettings, declaration, running_server
from scipy.special import log_softmax
from test_chat import completion, listed, said, token
from test_cli import ok

from blackbox_vlm import demo_folder
from blackbox_vlm.backend import Backend, TextScores, open_backend
from blackbox_vlm.endpoint import Endpoint
from blackbox_vlm.images import Image
from blackbox_vlm.running import run_sync
from blackbox_vlm.testing import ScriptedServer
from blackbox_vlm.testing.server import replying

CLASSES, SHOTS = 3, 3
DRAWINGS = 8  # as the fixture leaves them
N = CLASSES * SHOTS
QUESTIONS = 10  # that are tried at three images per class

Served = tuple[Endpoint, Callable[[], int]]  # and how much its owner billed


pytestmark = pytest.mark.usefixtures("one_load", "few_drawings")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of emoji, three pictures each to learn from and three to judge by."""
    root = tmp_path_factory.mktemp("data") / "emoji"
    for split in ("train", "test"):
        for folder in sorted((demo_folder() / split).iterdir())[:CLASSES]:
            (root / split / folder.name).mkdir(parents=True)
            for picture in sorted(folder.iterdir())[:SHOTS]:
                shutil.copy(picture, root / split / folder.name)
    return root


# -- endpoints -------------------------------------------------------------------------------------


@contextmanager
def ours(protocol: str, access: str, **limits: Any) -> Iterator[Served]:
    """Our own server, which speaks four protocols and keeps its books."""
    backend = open_backend("local", access=access, **limits)
    settings = ServerSettings()
    with running_server(backend, settings) as url, httpx.Client(trust_env=False) as http:
        options = declaration(protocol, url, backend.capabilities, settings)
        known = {name: value for name, value in options.items() if value is not None}
        yield (
            Endpoint(protocol, known),
            lambda: int(http.get(f"{url}/usage").json()["billed"]),
        )
    run_sync(backend.aclose())


class Owner:
    """The embedded model behind protocols that our server does not speak."""

    def __init__(self, folder: Path) -> None:
        self._model: Backend = open_backend("local", access="scores")
        self._folder = folder

    def logits(self, upload: str, texts: list[str]) -> Any:
        """Of a picture in base64, `(n_texts,)`."""
        path = self._folder / "upload.png"
        path.write_bytes(base64.b64decode(upload.rpartition(",")[2]))
        [answer] = run_sync(
            self._model.answer([TextScores((Image.from_file(path),), tuple(texts))])
        )
        return answer.values[0]

    def chat(self, body: Any) -> Any:
        """A chat model: the letters' log-probabilities, or the best class in words."""
        classes, url = listed(body), body["messages"][0]["content"][0]["image_url"]["url"]
        if isinstance(classes, list):
            return said(json.dumps(classes[int(np.argmax(self.logits(url, classes)))]))
        logprobs = log_softmax(self.logits(url, [*classes.values()]).astype(np.float64))
        tokens = [token(letter, float(p)) for letter, p in zip(classes, logprobs, strict=True)]
        best = sorted(tokens, key=lambda t: -t["logprob"])[: body["top_logprobs"]]
        return completion({"content": "A"}, {"content": [{**best[0], "top_logprobs": best}]})

    def score(self, body: Any) -> Any:
        """vLLM's /v1/score: cosines."""
        [part] = body["queries"]["content"]
        cosines = self.logits(part["image_url"]["url"], body["documents"]) / 100
        rows = [{"index": at, "score": float(score)} for at, score in enumerate(cosines)]
        return {"model": body["model"], "data": rows, "usage": {"total_tokens": 1}}


@contextmanager
def others(protocol: str, folder: Path, **options: Any) -> Iterator[Served]:
    """A server of the protocols that ours does not speak; every request is billed."""
    owner = Owner(folder)
    answer = owner.chat if protocol == "chat" else owner.score
    step = replying(lambda body: json.dumps(answer(json.loads(body))).encode())
    with ScriptedServer(step) as server:
        declared = {"url": f"{server.url}/v1/it", "model": "vlm", **options}
        yield Endpoint(protocol, declared), lambda: len(server.received)


# -- what is expected of each ----------------------------------------------------------------------


class Case(NamedTuple):
    """A protocol at an access level.

    Attributes:
        name: of the case.
        serve: its server, in a folder for files.
        purposes: queries by purpose, where three images of three classes are to be learned from.
        per_image: queries for a prediction, at most.
        template: where the endpoint needs a plain one.
    """

    name: str
    serve: Callable[[Path], Any]
    purposes: dict[str, int]
    per_image: int = 1
    template: str | None = None


SINGLE = {"images_per_request": 1}
CASES = [
    Case(
        "zero-shot",
        lambda _: ours("zero-shot", "scores", **SINGLE, score_kind="softmax"),
        {"observe": N, "background": DRAWINGS},
    ),
    Case(
        "embeddings",
        lambda _: ours("embeddings", "embeddings", **SINGLE),
        {"observe": N, "texts": 1},
    ),
    Case(
        "kserve",
        lambda _: ours("kserve", "scores", images_per_request=4),
        {"observe": 3, "background": 2},
    ),
    Case(
        "blackbox scores",
        lambda _: ours("blackbox", "scores", **SINGLE),
        {"observe": N, "background": DRAWINGS},
    ),
    Case(
        "blackbox embeddings",
        lambda _: ours("blackbox", "embeddings", images_per_request=4),
        {"observe": 3, "texts": 1},
    ),
    Case(
        "blackbox label",
        lambda _: ours("blackbox", "label", **SINGLE),
        {"observe": QUESTIONS * N},
        per_image=5,
    ),
    Case(
        "chat, labels",
        lambda folder: others("chat", folder, mode="labels"),
        {"observe": QUESTIONS * N, "canary": 1},
        per_image=5,
        template="{}",  # as its example says: an answer must equal a text
    ),
    Case("chat, letters", lambda folder: others("chat", folder), {"observe": N, "canary": 1}),
    Case(
        "score",
        lambda folder: others("score", folder, deterministic=True, logit_scale=100.0),
        {"observe": N, "background": DRAWINGS},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_right_strategy_is_picked(case: Case, data: Path, tmp_path: Path) -> None:
    more = [] if case.template is None else ["--template", case.template]
    with case.serve(tmp_path) as (endpoint, billed):
        (tmp_path / "endpoint.toml").write_text(endpoint.to_toml())
        words = ("tune", data, "--backend", tmp_path / "endpoint.toml", "--budget", 8000, *more)
        plan = ok(*words, "--dry-run")
        assert billed() == 0
        tuned = ok(*words, "--out", tmp_path / "run")
        spent = billed()
        assert spent == tuned["queries_spent"] == plan["queries"] <= 8000
        assert tuned["spent_by_purpose"] == case.purposes
        assert tuned["method"] == plan["method"] == "observe"
        assert tuned["strategy"] == "heads"
        if case.name != "chat, letters":  # three numbers about each of nine pictures say little
            assert tuned["tuned_accuracy"] > tuned["zero_shot_accuracy"]
        assert 1 <= tuned["queries_per_image"] <= case.per_image
        unseen = ok("evaluate", tmp_path / "run", data)
        assert billed() - spent == unseen["queries_spent"] == unseen["budget"]
    assert unseen["n_images"] == N
    assert unseen["strategy"] == "heads"
    if case.purposes["observe"] % N == 0:  # a request for every image
        assert unseen["queries_spent"] == N * tuned["queries_per_image"]


def test_soft_prompts_let_craft_compete(data: Path, tmp_path: Path) -> None:
    with ours("blackbox", "soft") as (endpoint, billed):
        (tmp_path / "endpoint.toml").write_text(endpoint.to_toml())
        words = ("tune", data, "--backend", tmp_path / "endpoint.toml", "--budget")
        plan = ok(*words, 8000, "--dry-run")
        purposes = [step["purpose"] for step in plan["steps"]]
        assert purposes[0] == "observe"
        assert {"search fold 1", "search fold 2", "search", "guard", "deploy"} <= set(purposes)
        assert 7000 < plan["queries"] <= 8000
        assert billed() == 0
        tuned = ok(*words, 300, "--out", tmp_path / "run")  # 8,000 would take a minute
        assert billed() == tuned["queries_spent"] <= tuned["queries_planned"] <= 300
        assert tuned["spent_by_purpose"]["observe"] == 1
        assert tuned["spent_by_purpose"]["search fold 1"] > 0
        assert ok("evaluate", tmp_path / "run", data)["n_images"] == N
