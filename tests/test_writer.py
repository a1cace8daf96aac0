"""A language model that proposes templates: the wire, the seam, and one ledger for everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blackbox_vlm.backends.local import LocalBlackBox
from blackbox_vlm.backends.writer import Writer
from doubles import LinearWorld, declare, images, scores
from hosted import answers, metered, outcomes, served
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter

from blackbox_vlm.backend import (
    VISION,
    Access,
    Answer,
    Capabilities,
    Completion,
    TextScores,
    open_backend,
    query_key,
)
from blackbox_vlm.batching import distinct, join, split
from blackbox_vlm.contract import check_answer
from blackbox_vlm.endpoint import Endpoint, open_endpoint
from blackbox_vlm.errors import BackendError, BudgetError, ContractError, InputError, ModelChanged
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.proposing import written_templates
from blackbox_vlm.running import run_sync
from blackbox_vlm.testing import ScriptedServer
from blackbox_vlm.testing.server import replying

URL = "http://127.0.0.1:8000/v1/chat/completions"
NAMES = ("cat", "dog", "owl")
LINES = "1. a pencil drawing of a {}\n2. a {} beside a dog\n3. my {}\n"
PROMPT = Completion("Write.")


def said(content: Any, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"content": content}, **more}
    return {"model": "llm", "choices": [choice], "usage": {"total_tokens": 30, "cost": 0.002}}


def writer(answer: Any, **options: Any) -> Writer:
    """A backend whose endpoint answers everything alike, or by a function of the request's JSON."""
    serve = answer if callable(answer) else lambda body: answer
    inner = served(lambda request: serve(json.loads(request.content)))
    return Writer(inner=inner, **({"url": URL, "model": "llm"} | options))


def text(values: Any) -> str:
    return bytes(values).decode()


# -- the wire --------------------------------------------------------------------------------------


def asked(**options: Any) -> dict[str, Any]:
    bodies: list[dict[str, Any]] = []

    def serve(body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return said("fine")

    answers(writer(serve, **options), PROMPT)
    [body] = bodies
    TypeAdapter(CompletionCreateParamsNonStreaming).validate_python(body)
    return body


def test_the_request_is_one_message() -> None:
    messages = [{"role": "user", "content": "Write."}]
    assert asked() == {"model": "llm", "messages": messages, "max_tokens": 1024}
    options = {"temperature": 0.7, "token_limit": "max_completion_tokens", "answer_tokens": 5}
    assert asked(body={"seed": 3}, **options) == {
        "model": "llm",
        "messages": messages,
        "max_completion_tokens": 5,
        "temperature": 0.7,
        "seed": 3,
    }


@pytest.mark.parametrize("content", ["a {}", "naïve 猫 🦉\n", "\x00\x1b[31m", " "])
def test_the_answer_is_its_bytes(content: str) -> None:
    [answer] = answers(writer(said(content)), PROMPT)
    assert text(answer.values) == content
    assert answer.values.dtype == np.uint8
    assert (answer.model_id, answer.cost) == ("llm", 0.002)


def test_half_a_character_is_replaced_and_a_cut_answer_counts() -> None:
    backend = writer(lambda body: said("a\ud800b", finish_reason="length"))
    assert text(answers(backend, PROMPT)[0].values) == "a?b"


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (said(None), "wrote nothing"),
        (said(""), "wrote nothing"),
        (said(["a"]), "wanted text"),
        (said("a") | {"choices": []}, "wanted one"),
        ({"choices": [{"index": 0}]}, "message"),
        ({"error": {"code": 500}}, "failed"),
        ([], "object"),
        (said("a") | {"model": 3}, "model"),
    ],
)
def test_what_is_no_completion(data: Any, match: str) -> None:
    [outcome] = outcomes(writer(data), PROMPT)
    assert isinstance(outcome, ContractError)
    assert match in str(outcome)


def test_another_model_is_noticed() -> None:
    with pytest.raises(ModelChanged, match="llm-2"):
        answers(writer(said("a") | {"model": "llm-2"}), PROMPT)


@pytest.mark.parametrize("name", ["messages", "max_tokens", "temperature", "stream"])
def test_the_body_may_not_replace_what_is_relied_on(name: str) -> None:
    with pytest.raises(InputError, match=name):
        writer(said("a"), body={name: 1})


def test_settings_are_part_of_the_identity() -> None:
    every = ({}, {"temperature": 0.5}, {"answer_tokens": 5}, {"body": {"seed": 1}}, {"model": "b"})
    identities = {writer(said("a"), **options).capabilities.identity for options in every}
    assert len(identities) == 5


# -- the seam --------------------------------------------------------------------------------------


def test_it_is_installed_under_its_name(tmp_path: Path) -> None:
    assert isinstance(open_backend("writer", url=URL, model="llm"), Writer)
    path = tmp_path / "llm.toml"
    path.write_text(f'protocol = "writer"\nurl = "{URL}"\nmodel = "llm"\n')
    backend = open_endpoint(path)
    assert backend.capabilities.access is Access.TEXT
    assert Endpoint.from_file(path).protocol == "writer"


def test_it_looks_at_no_pictures_and_others_write_no_text() -> None:
    capabilities = writer(said("a")).capabilities
    assert capabilities.takes(PROMPT)
    with pytest.raises(InputError, match="'scores' access"):
        capabilities.check(scores(0))
    for access in VISION:
        with pytest.raises(InputError, match="'text' access"):
            declare(access).check(PROMPT)
        with pytest.raises(InputError, match="'text'"):
            split(PROMPT, declare(access))


def test_no_box_can_be_opened_as_a_writer() -> None:
    with pytest.raises(InputError, match="wanted one of soft, embeddings, scores, label"):
        LocalBlackBox(access="text")
    with pytest.raises(InputError, match="access"):
        open_backend("blackbox", url=URL, model="m", access="text")


def test_a_completion_is_one_request_under_its_own_key() -> None:
    limits = Capabilities(Access.TEXT, "llm")
    assert split(PROMPT, limits) == [PROMPT]
    assert len(distinct([PROMPT, Completion("Write."), Completion("Write!")], limits)) == 2
    assert query_key(PROMPT, "x") != query_key(TextScores((), ("Write.",)), "x")
    data = np.frombuffer(b"abc", dtype=np.uint8)
    assert text(join(PROMPT, [data], limits)) == "abc"


@pytest.mark.parametrize(
    "values", [np.zeros(3, np.float32), np.zeros(3, np.int64), np.zeros((1, 3), np.uint8)]
)
def test_only_bytes_are_an_answer(values: Any) -> None:
    limits = Capabilities(Access.TEXT, "llm")
    check_answer(PROMPT, Answer(np.zeros(3, np.uint8), "llm"), limits)
    with pytest.raises(ContractError, match="wanted"):
        check_answer(PROMPT, Answer(values, "llm"), limits)


# -- proposals, over loopback and on the run's ledger ----------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite", 10) as ledger:
        yield ledger


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(replying(lambda body: json.dumps(said(LINES)).encode())) as server:
        yield server


Propose = Callable[[], tuple[str, ...]]


@pytest.fixture
def propose(server: ScriptedServer, ledger: Ledger) -> Propose:
    async def ask() -> tuple[str, ...]:
        backend = Writer(url=server.url, model="llm")
        try:
            meter = Meter(backend, ledger)
            return await written_templates(meter, NAMES, [("a {}", 0.5)], ["a {}"])
        finally:
            await backend.aclose()

    return lambda: run_sync(ask())


def test_proposals_are_one_query_of_the_runs_own_budget(
    propose: Propose, server: ScriptedServer, ledger: Ledger
) -> None:
    metered(LinearWorld(), ledger, TextScores(images(1), NAMES))
    assert propose() == ("a pencil drawing of a {}", "my {}")
    assert ledger.by_purpose() == {"search": 1, "proposals": 1}
    assert ledger.totals().cost == pytest.approx(0.002)
    [received] = server.received
    shown = json.loads(received.body)["messages"][0]["content"]
    assert '["cat", "dog", "owl"]' in shown
    assert '[["a {}", 0.5]]' in shown


def test_proposals_are_replayed(propose: Propose, server: ScriptedServer, ledger: Ledger) -> None:
    assert propose() == propose()
    assert (len(server.received), ledger.spent()) == (1, 1)


def test_without_budget_nothing_is_sent(
    propose: Propose, server: ScriptedServer, ledger: Ledger
) -> None:
    metered(LinearWorld(), ledger, *(scores(i) for i in range(10)))
    with pytest.raises(BudgetError):
        propose()
    assert not server.received


def test_a_box_that_sees_proposes_nothing(ledger: Ledger) -> None:
    work = written_templates(Meter(LinearWorld(), ledger), NAMES, [], ["{}"])
    with pytest.raises(InputError, match="'text'"):
        run_sync(work)


ODD = [None, True, -1, 0.5, 10**350, "", "\ud800", "{}", [], {}, [[]], list(range(300))]


def test_any_answer_is_read_or_refused() -> None:
    right = said("a {}")
    spoilt = [right | {name: odd} for name in right for odd in ODD]
    spoilt += [said(odd) for odd in ODD] + [said("a", message=odd) for odd in ODD] + ODD
    for data in spoilt:
        [outcome] = outcomes(writer(lambda body, data=data: data), PROMPT)
        assert isinstance(outcome, Answer | BackendError)
