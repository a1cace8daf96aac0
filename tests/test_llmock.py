"""Our retries, paced and paid for, as llmock judges them: a server that nobody here wrote.

llmock answers like a hosted model, fails on request, keeps real quotas, and then tells what the
client did wrong (`assert_resilient`; strict counts its warnings, too).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blackbox_vlm.backends.chat import Chat
from blackbox_vlm.backends.embeddings import Embeddings
from hosted import metered, spent

from blackbox_vlm import demo_folder
from blackbox_vlm.backend import Labels, TextEmbeddings, TextScores
from blackbox_vlm.errors import (
    AuthError,
    BackendError,
    ContractError,
    QuotaError,
    RateLimited,
    Refused,
    UnknownOutcome,
)
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import ATTEMPTS

pytest.importorskip("llmock")

CLASSES = ("animal", "drink", "fruit")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite", 200) as ledger:
        yield ledger


@pytest.fixture(scope="module")
def images() -> tuple[Image, ...]:
    paths = sorted((demo_folder() / "test").glob("*/*.png"))[:4]
    return tuple(Image.from_file(path) for path in paths)


def chat(llmock: Any, **options: Any) -> Chat:
    given = {"url": f"{llmock.base_url()}/chat/completions", "model": "gpt-4o"}
    return Chat(**{**given, "mode": "labels", "key_env": "OPENAI_API_KEY", **options})


def test_a_healthy_endpoint_is_asked_once_per_query(
    llmock: Any, ledger: Ledger, images: tuple[Image, ...]
) -> None:
    llmock.reply("fruit", times=None)
    [labels] = metered(chat(llmock, concurrency=4), ledger, Labels(images, CLASSES))
    assert labels.tolist() == [2, 2, 2, 2]
    assert len(llmock.requests) == 4
    assert spent(ledger) == (4, 0)
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize(("free", "charged"), [(True, 1), (False, 3)])
def test_429_is_sent_again_when_the_endpoint_says(
    llmock: Any, ledger: Ledger, images: tuple[Image, ...], free: bool, charged: int
) -> None:
    llmock.reply("drink", times=None).rate_limit(times=ATTEMPTS - 1, retry_after=0.3)
    backend = chat(llmock, refusals_free=free)
    [labels] = metered(backend, ledger, Labels(images[:1], CLASSES))
    assert labels.tolist() == [1]
    assert len(llmock.requests) == ATTEMPTS
    assert spent(ledger) == (charged, 0)
    llmock.assert_resilient(strict=True)


def test_429_slows_everybody(llmock: Any, ledger: Ledger, images: tuple[Image, ...]) -> None:
    """While one query waits, no other one runs into the same wall."""
    llmock.reply("drink", times=None).rate_limit(times=1, retry_after=0.4)
    metered(chat(llmock, concurrency=2), ledger, *(Labels((image,), CLASSES) for image in images))
    [wall] = [record for record in llmock.requests if record.status == 429]
    later = [r.started_at for r in llmock.requests if r.started_at > wall.ended_at + 0.05]
    assert len(later) >= 3
    assert min(later) - wall.ended_at > 0.35
    llmock.assert_resilient(strict=True)


def test_a_quota_is_used_and_not_run_into(llmock: Any, ledger: Ledger) -> None:
    """A bucket of 60 requests that regains one a second, and says so with every answer.

    Its reset header tells when all 60 are back, which is no reason to wait for a minute.
    """
    llmock.limits(rpm=60)
    backend = Embeddings(
        url=f"{llmock.base_url()}/embeddings",
        model="text-embedding-3-small",
        key_env="OPENAI_API_KEY",
        texts_per_request=1,
        concurrency=4,
        refusals_free=True,
    )
    [vectors] = metered(backend, ledger, TextEmbeddings(tuple(map(str, range(62)))))
    assert vectors.shape == (62, 1536)
    assert spent(ledger) == (62, 0)
    records = llmock.requests
    assert sum(record.status == 429 for record in records) <= 2
    assert records[-1].ended_at - records[0].started_at < 30
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize("fault", [503, 504, 529])
def test_a_lost_answer_is_asked_for_again_where_paying_twice_is_allowed(
    llmock: Any, ledger: Ledger, images: tuple[Image, ...], fault: int
) -> None:
    llmock.reply("animal", times=None).fail(fault, times=1, retry_after=0.2)
    [labels] = metered(chat(llmock), ledger, Labels(images[:1], CLASSES), on_lost="resend")
    assert labels.tolist() == [0]
    assert len(llmock.requests) == 2
    assert spent(ledger) == (2, 1)
    llmock.assert_resilient(strict=True)


def test_without_a_hint_the_client_backs_off(
    llmock: Any, ledger: Ledger, images: tuple[Image, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: (low + high) / 2)  # no lucky jitter
    llmock.reply("animal", times=None).fail(500, times=ATTEMPTS - 1)
    metered(chat(llmock), ledger, Labels(images[:1], CLASSES), on_lost="resend")
    assert len(llmock.requests) == ATTEMPTS
    assert spent(ledger) == (ATTEMPTS, ATTEMPTS - 1)
    llmock.assert_resilient(strict=True)


def test_an_outage_ends_the_run_after_few_attempts(
    llmock: Any, ledger: Ledger, images: tuple[Image, ...]
) -> None:
    llmock.fail(503, times=None, retry_after=0.1)
    with pytest.raises(UnknownOutcome, match="answered 503"):
        metered(chat(llmock), ledger, Labels(images, CLASSES), on_lost="resend")
    assert len(llmock.requests) == ATTEMPTS
    assert spent(ledger) == (ATTEMPTS, ATTEMPTS)
    llmock.assert_resilient(strict=True)


def test_a_lost_answer_stops_the_run_unless_told_otherwise(
    llmock: Any, ledger: Ledger, images: tuple[Image, ...]
) -> None:
    """llmock would rather see a retry, but that one would be paid for."""
    llmock.fail(503, times=1, retry_after=0.1)
    with pytest.raises(UnknownOutcome, match="answered 503"):
        metered(chat(llmock), ledger, Labels(images, CLASSES))
    assert len(llmock.requests) == 1
    assert spent(ledger) == (1, 1)
    assert [finding.code for finding in llmock.verdict().findings] == ["gave_up"]


def test_a_slow_answer_is_given_up_and_asked_for_again(
    llmock: Any, ledger: Ledger, images: tuple[Image, ...]
) -> None:
    llmock.reply("animal", times=None).delay(0.6, times=1)
    backend = chat(llmock, timeout=0.3)
    [labels] = metered(backend, ledger, Labels(images[:1], CLASSES), on_lost="resend")
    assert labels.tolist() == [0]
    assert spent(ledger) == (2, 1)
    assert len(llmock.requests) == 2
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, Refused), (401, AuthError), (403, AuthError), (404, Refused), (422, Refused)],
)
def test_a_refusal_is_final(
    llmock: Any,
    ledger: Ledger,
    images: tuple[Image, ...],
    status: int,
    error: type[BackendError],
) -> None:
    llmock.fail(status, times=None)
    with pytest.raises(error, match=f"answered {status}"):
        metered(chat(llmock), ledger, Labels(images, CLASSES), on_lost="resend")
    assert len(llmock.requests) == 1
    assert spent(ledger) == (1, 0)
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize(("status", "code"), [(429, "insufficient_quota"), (402, None)])
def test_no_credit_is_final(
    llmock: Any, ledger: Ledger, images: tuple[Image, ...], status: int, code: str | None
) -> None:
    """Not strict: llmock takes every 429 for one that passes with time."""
    llmock.fail(status, times=None, code=code)
    with pytest.raises(QuotaError, match="no credit left"):
        metered(chat(llmock), ledger, Labels(images, CLASSES), on_lost="resend")
    assert len(llmock.requests) == 1
    llmock.assert_resilient()


def test_a_wait_beyond_a_minute_pauses_the_run(
    llmock: Any, ledger: Ledger, images: tuple[Image, ...]
) -> None:
    """Asked again within the run it would be too early, and that llmock would call an error."""
    llmock.rate_limit(times=None, retry_after=61)
    with pytest.raises(RateLimited) as error:
        metered(chat(llmock, refusals_free=True), ledger, Labels(images, CLASSES))
    assert error.value.retry_after == 61
    assert len(llmock.requests) == 1
    assert spent(ledger) == (0, 0)
    llmock.assert_resilient()


def test_an_endpoint_without_log_probabilities_is_told_from_one_that_has_them(
    llmock: Any, ledger: Ledger, images: tuple[Image, ...]
) -> None:
    backend = chat(llmock, mode="logprobs")
    with pytest.raises(ContractError, match='set mode = "labels"'):
        metered(backend, ledger, TextScores(images[:1], CLASSES))
    assert len(llmock.requests) == 1
    assert spent(ledger) == (1, 1)
