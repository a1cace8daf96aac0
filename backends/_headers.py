"""What an endpoint says about its rate limit, in the dialects that are in use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from blackbox_vlm.backend import Quota

_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")  # float() would take inf, nan, -1 and 1_000
_N = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
_DURATION = re.compile(rf"(?:{_N}h)?(?:{_N}m(?!s))?(?:{_N}s)?(?:{_N}ms)?")
_FIELD = re.compile(r";\s*([rt])\s*=\s*([0-9]{1,9})")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `retry-after` (seconds or a date), or None."""
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after", "").strip()
    seconds = _number(text)
    return _until(text, headers.get("date", "")) if seconds is None else seconds


def quota(headers: Mapping[str, str]) -> Quota | None:
    """How many requests are left and when there are more, or None.

    Read are OpenAI's `x-ratelimit-*-requests` (with durations such as `6m0s`), `ratelimit-*`, and
    the IETF draft's `ratelimit: "name";r=0;t=55`.
    """
    bucket = _bucket(headers)
    if bucket is not None:
        return bucket
    for prefix, suffix in (("x-ratelimit-", "-requests"), ("x-ratelimit-", ""), ("ratelimit-", "")):
        remaining = _number(headers.get(f"{prefix}remaining{suffix}", ""))
        resets = _duration(headers.get(f"{prefix}reset{suffix}", ""))
        if remaining is not None and resets is not None:
            return Quota(int(remaining), resets)
    fields = dict(_FIELD.findall(headers.get("ratelimit", "")))
    if {"r", "t"} <= fields.keys():
        return Quota(int(fields["r"]), float(fields["t"]))
    return None


def _bucket(headers: Mapping[str, str]) -> Quota | None:
    """OpenAI's reset tells when the whole limit is back; a single request is back long before."""
    limit, remaining = (
        _number(headers.get(f"x-ratelimit-{name}-requests", "")) for name in ("limit", "remaining")
    )
    full = _duration(headers.get("x-ratelimit-reset-requests", ""))
    if limit is None or remaining is None or full is None or limit <= remaining:
        return None
    return Quota(int(remaining), full / (limit - remaining))


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text.strip(" ")) else None


def _duration(text: str) -> float | None:
    """Seconds: `55`, `1s`, `6m0s`, `20ms`. A Unix time, as some send, is none."""
    seconds = _number(text)
    if seconds is not None:
        return seconds if seconds < 1e8 else None
    match = _DURATION.fullmatch(text.strip(" "))
    if match is None or not any(match.groups()):
        return None
    hours, minutes, whole, milliseconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + whole + milliseconds / 1000


def _until(text: str, now: str) -> float | None:
    """Seconds until an HTTP date, by the endpoint's own clock where it tells the time."""
    then = _date(text)
    if then is None:
        return None
    return max(0.0, (then - (_date(now) or datetime.now(UTC))).total_seconds())


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
