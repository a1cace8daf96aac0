"""Rows F24 to F34: a server that answers, but not what it should."""

from __future__ import annotations

import numpy as np
import pytest

from blackbox_vlm.backend import Access, ScoreKind
from blackbox_vlm.contract import MOST_CONSTANT
from blackbox_vlm.errors import ContractError, ModelChanged, Refused
from blackbox_vlm.testing.matrix.bench import Bench
from blackbox_vlm.testing.matrix.verdicts import broken, expect, spoilt
from blackbox_vlm.testing.server import dripping, reply, replying


def no_json(bench: Bench) -> None:
    """Charged, never believed; an answer in slices is one."""
    page = b"<!doctype html><title>Sign in</title>"
    good = replying(bench.hooks.good_answer)
    bom = replying(lambda body: b"\xef\xbb\xbf" + bench.hooks.good_answer(body))
    broken(
        bench,
        {
            "a page": reply(page, headers={"content-type": "text/html"}),
            "a page that says it is JSON": reply(page),
            "plain text": reply(b"ok", headers={"content-type": "text/plain"}),
            "nothing": reply(b""),
            "nothing, 204": reply(b"", 204),
            "a byte order mark": bom,
            "latin-1": reply('["café"]'.encode("latin-1")),
        },
    )
    expect(bench.ask(usual=dripping(good, 0.0, 64)), "in slices", None, calls=1, charged=1)


def no_number(bench: Bench) -> None:
    """Only finite JSON numbers are scores."""
    broken(bench, spoilt(bench, "NaN", "Infinity", "1e999", "text", "true", "null"))
    for step in spoilt(bench, "-0.0").values():
        if bench.capabilities.score_kind is not ScoreKind.SOFTMAX:  # its sum would be another
            expect(bench.ask(usual=step), "-0.0", None, calls=1, charged=1)


def wrong_length(bench: Bench) -> None:
    """As many scores as texts, or none count."""
    broken(bench, spoilt(bench, "too short", "too long"))


def labels_reordered(bench: Bench) -> None:
    """Scores are read by their label or index, not by their place."""
    [step] = spoilt(bench, "reordered").values()
    seen, usual = bench.ask(usual=step), bench.ask()
    expect(seen, "reordered", None, calls=1, charged=1)
    np.testing.assert_array_equal(seen.answers[0], usual.answers[0])


def labels_changed(bench: Bench) -> None:
    """Every label once, exactly as it was sent."""
    kinds = ("missing", "renamed", "doubled", "extra", "in capitals")
    broken(bench, spoilt(bench, *(f"label {kind}" for kind in kinds)))


def improbable(bench: Bench) -> None:
    """Probabilities are such, and tell texts apart."""
    if bench.capabilities.access not in (Access.SCORES, Access.SOFT):
        pytest.skip("it gives no scores")
    kind = bench.capabilities.score_kind
    faults = ["negative", "times 100"] * (kind in (ScoreKind.SOFTMAX, ScoreKind.SIGMOID))
    faults += ["sum of 0.7"] * (kind is ScoreKind.SOFTMAX)
    broken(bench, spoilt(bench, *faults) if faults else {})
    for step in spoilt(bench, "all equal").values():
        seen = bench.ask(count=2 * MOST_CONSTANT, usual=step)
        expect(seen, "all equal", ContractError, calls=MOST_CONSTANT, charged=MOST_CONSTANT)


def answer_of_another(bench: Bench) -> None:
    """An answer belongs to its request."""
    broken(bench, spoilt(bench, "of another request"))


def model_changes(bench: Bench) -> None:
    """Stops: the scores of two models cannot be compared."""
    [step] = spoilt(bench, "other model").values()
    for declared in ({}, {"idempotent": True}, {"on_lost": "resend"}):
        seen = bench.ask([replying(bench.hooks.good_answer), step], count=5, **declared)
        expect(seen, "another model", ModelChanged, calls=2, charged=2)


def noisy_server(bench: Bench) -> None:
    """A canary tells whether the same question gets the same answer."""
    [noisy] = spoilt(bench, "noisy").values()
    same = bench.ask(canary=True)
    expect(same, "it repeats itself", None, calls=2, charged=2)
    assert same.answers[-1] == 0
    other = bench.ask([replying(bench.hooks.good_answer), noisy], canary=True)
    expect(other, "it does not", None, calls=2, charged=2)
    assert other.answers[-1] > 0


def one_of_a_batch(bench: Bench) -> None:
    """What fails alone leaves the others paid for and kept."""
    size = min(32, bench.capabilities.requests_per_batch)
    if size < 2:
        pytest.skip("it takes one request at a time")
    good = replying(bench.hooks.good_answer)
    for step, error in ((reply(b"{}", 422), Refused), (reply(b"?"), ContractError)):
        script = [good] * (size // 2) + [step]
        seen = bench.ask(script, count=size, requests_per_batch=size)
        expect(seen, str(error), error, calls=size, charged=size)
        rest = bench.ask(count=size, requests_per_batch=size, resume=True, on_lost="resend")
        expect(rest, "the others were kept", None, calls=1, charged=size + 1)


def hostile_json(bench: Bench) -> None:
    """Depth, digits and doubled names are bounded before anything is used."""
    whole = {
        "200,000 lists": reply(b"[" * 200_000),
        "100,000 objects": reply(b'{"":' * 100_000),
        "a long number": reply(b"[" + b"7" * 5000 + b"]"),
    }
    broken(bench, whole | spoilt(bench, "5000 digits", "a name twice"))
