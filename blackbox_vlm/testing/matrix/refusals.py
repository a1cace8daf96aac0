"""Rows F16 to F23: a server that says no."""

from __future__ import annotations

from blackbox_vlm.errors import (
    AuthError,
    QuotaError,
    RateLimited,
    Refused,
    UnknownOutcome,
)
from blackbox_vlm.meter import ATTEMPTS, RETRIES_AT_FIRST, RETRIES_PER_ANSWER
from blackbox_vlm.pacing import LONGEST_WAIT, PAUSE
from blackbox_vlm.testing.matrix.bench import Bench, Seen
from blackbox_vlm.testing.matrix.verdicts import TWO_BACK_OFFS, expect, lost, refused
from blackbox_vlm.testing.server import Received, message, reply, replying


def rate_limited(bench: Bench) -> None:
    """Waits as long as it is told, within reason; nonsense counts as not told."""
    now, then = "Sun, 22 Nov 2026 10:00:00 GMT", "Sun, 22 Nov 2026 10:00:02 GMT"
    for waited, headers in (
        ((2.0, 2.0), {"retry-after": "2"}),
        ((2.0, 2.0), {"retry-after": then, "date": now}),
        ((2.0, 2.0), {"retry-after-ms": "2000"}),
        *(((0.5, 1.5), {"retry-after": bad}) for bad in ("inf", "nan", "-1", "soon", "1_0", "")),
    ):
        for free in (False, True):
            seen = bench.ask([reply(b"{}", 429, headers)], refusals_free=free)
            expect(seen, str(headers), None, calls=2, charged=2 - free, waited=waited)
    hour = bench.ask([reply(b"{}", 429, {"retry-after": "3600"})])
    expect(hour, "an hour", RateLimited, calls=1, charged=1)
    four = bench.ask([reply(b"{}", 429, {"retry-after": "9"})], count=12, concurrency=4)
    expect(four, "all wait", None, calls=13, charged=13, waited=(9.0, 12.0))


def rate_limited_for_ever(bench: Bench) -> None:
    """Gives up after few attempts, and the run can be resumed."""
    refusal, vain = reply(b"{}", 429), (PAUSE + LONGEST_WAIT, PAUSE + LONGEST_WAIT + 1)
    for free in (False, True):
        one = bench.ask(usual=refusal, refusals_free=free)
        charged = 0 if free else ATTEMPTS
        expect(one, "one", RateLimited, calls=ATTEMPTS, charged=charged, waited=vain)
    many = bench.ask(usual=refusal, count=60, concurrency=8, refusals_free=True)
    assert isinstance(many.error, RateLimited)
    assert many.charged == 0
    assert many.calls <= 8 * ATTEMPTS, "the retry bucket empties, and nobody takes another query"
    resumed = bench.ask(count=60, concurrency=8, resume=True)
    expect(resumed, "resumed", None, calls=60, charged=60)


def server_error(bench: Bench) -> None:
    """The answer is lost: charged, and sent again only where that is free or allowed."""
    lost(bench, {str(status): reply(b"oops", status) for status in (500, 502, 503, 504, 408)})
    seen = bench.ask(usual=reply(b"oops", 503), idempotent=True)
    expect(seen, "always", UnknownOutcome, calls=ATTEMPTS, charged=1, waited=TWO_BACK_OFFS)
    paid = bench.ask(usual=reply(b"oops", 503), on_lost="resend")
    expect(paid, "always", UnknownOutcome, calls=ATTEMPTS, charged=ATTEMPTS, waited=TWO_BACK_OFFS)


def server_error_storm(bench: Bench) -> None:
    """Retries stay few, and the ledger tells what they cost."""
    for every, ends in ((20, None), (3, UnknownOutcome)):
        for declared in ({"idempotent": True}, {"on_lost": "resend"}):
            good = replying(bench.hooks.good_answer)
            script = [*[good] * (every - 1), reply(b"", 503)] * (200 // every)
            seen = bench.ask(script, count=60, **declared)
            queries = len({received.body for received in seen.received})
            charged = queries if "idempotent" in declared else seen.calls
            expect(seen, "storm", ends, calls=seen.calls, charged=charged, waited=(1.0, 100.0))
            most = RETRIES_AT_FIRST + 1 + RETRIES_PER_ANSWER * queries
            assert 0 < seen.calls - queries <= most
            if "on_lost" in declared:  # what the storm cost can be read from the ledger
                lost_calls = sum(step is not good for step in script[: seen.calls])
                assert seen.unknown == lost_calls


def key_refused(bench: Bench) -> None:
    """Stops at once, can be resumed, and shows no key."""

    def echo(received: Received) -> list[bytes]:
        return [message(repr(_keys(received)).encode(), 401)]

    good = replying(bench.hooks.good_answer)
    for step in (echo, reply(b"{}", 403)):
        for seen in refused(bench, {"at the start": step}, AuthError):
            _shows_no_key(seen)
        for free in (False, True):
            seen = bench.ask([good, good, step], count=5, refusals_free=free)
            expect(seen, "in the middle", AuthError, calls=3, charged=3 - free)
            resumed = bench.ask(count=5, resume=True, refusals_free=free)
            expect(resumed, "resumed", None, calls=3, charged=6 - free)


def _shows_no_key(seen: Seen) -> None:
    for key in _keys(seen.received[0]):
        assert key not in str(seen.error)


def _keys(received: Received) -> list[str]:
    """What looks like a key among the headers, without the scheme before it."""
    words = ("auth", "api-key", "token")
    found = (v for name, v in received.headers.items() if any(word in name for word in words))
    return [value.split()[-1] for value in found]


def credit_spent(bench: Bench) -> None:
    """Stops at once, with an exit code of its own."""
    openai = b'{"error": {"code": "insufficient_quota", "message": "check your plan"}}'
    seen = refused(bench, {"402": reply(b"{}", 402), "429": reply(openai, 429)}, QuotaError)
    assert {one.error.exit_code for one in seen if one.error} == {QuotaError.exit_code}
    assert QuotaError.exit_code not in {AuthError.exit_code, Refused.exit_code}


def request_refused(bench: Bench) -> None:
    """Stops, and says in a few printable words why."""
    body = b'{"detail": "inputs: field required \x1b[31m' + b"x" * 2_500_000 + b'"}'
    for seen in refused(bench, {str(status): reply(body, status) for status in (400, 404, 422)}):
        told = str(seen.error)
        assert "field required" in told
        assert told.isprintable()
        assert len(told) < 600


def request_too_large(bench: Bench) -> None:
    """Stops; nothing is split behind the caller."""
    refused(bench, {"413": reply(b"", 413)})
