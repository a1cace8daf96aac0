"""What an endpoint's answers tell about it: conclusions from numbers; nothing is asked here.

Each finding says on how many answers it rests, and what it puts into the endpoint's declaration. A
doubtful one says so: a wrong declaration is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.backend import Array, Quota, Request, ScoreKind, TextScores

MOST_DECIMALS = 8  # a number with more is taken as not rounded
_ENOUGH = 5  # numbers between 0 and 1 that rounding is concluded from
_SUM = 1e-3  # how far a sum of unrounded probabilities may be from 1
_SLACK = 1e-3  # how far computed bounds may be passed, e.g. a cosine of 1.0000001
_LIMITS = re.compile(r"rate-?limit|retry-after")

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something found out.

    Attributes:
        about: what was in question.
        found: the answer, for people.
        queries: how many answers it rests on.
        declares: options of the endpoint's file that follow from it.
    """

    about: str
    found: str
    queries: int
    declares: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seen:
    """A question and its answer.

    Attributes:
        values: float64, of scores as many digits as the answer has.
        model_id: which model spoke.
        quota: what the answer said about the rate limit.
        data: the JSON of the answer; None where the backend does not show it.
        headers: of the answer, names in lower case.
    """

    request: Request
    values: Values
    model_id: str
    quota: Quota | None = None
    data: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


def score_kind(answers: Sequence[Seen], noise: float = 0.0) -> Finding:
    """Which `ScoreKind` the scores are, by their range, their sums and what they depend on.

    Args:
        answers: to questions that share an image and some of their texts.
        noise: by how much a score may differ when it is asked again.
    """
    rows = [row for answer in answers for row in answer.values]
    values = np.concatenate(rows)
    kind, why = _kind(rows, depend=_depend(answers, noise))
    found = f"{kind.value}: {why} ({np.nanmin(values):.3g} to {np.nanmax(values):.3g})"
    return Finding("scores", found, len(answers), {"score_kind": kind.value})


def _kind(rows: Sequence[Values], *, depend: bool) -> tuple[ScoreKind, str]:
    values = np.concatenate(rows)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low < -1 - _SLACK or high > 1 + _SLACK:
        return ScoreKind.LOGITS, "beyond -1 to 1"
    if low < 0:
        return ScoreKind.COSINE, "between -1 and 1, some below 0"
    excess = [float(np.nansum(row)) - 1 for row in rows]
    slack = [_SUM + 0.5 * _unit(values) * len(row) for row in rows]
    if all(abs(e) <= s for e, s in zip(excess, slack, strict=True)):
        return ScoreKind.SOFTMAX, "each answer sums to 1"
    if depend:
        below = np.isnan(values).any() and all(e <= s for e, s in zip(excess, slack, strict=True))
        return ScoreKind.SOFTMAX, (
            "a text's score depends on the others, and only the best are returned"
            if below
            else "undecided: a text's score depends on the others, but the sums are not 1"
        )
    spread = high / low if low > 0 else math.inf
    if spread > 50 or high < 0.02:  # sigmoids of mismatches are tiny; cosines are all alike
        return ScoreKind.SIGMOID, "each text for itself, mismatches close to 0"
    if spread < 5 and low > 0.02:
        return ScoreKind.COSINE, "each text for itself, all alike and above 0"
    return ScoreKind.SIGMOID, "undecided, perhaps cosines: each text for itself"


def _unit(values: Values) -> float:
    places = decimals(values)
    return 0.0 if places is None else float(10.0**-places)


def _depend(answers: Sequence[Seen], noise: float) -> bool:
    """Whether a text's score changes with the other texts of its request."""
    first, *others = [_by_text(answer) for answer in answers]
    shared = [
        (first[text], other[text]) for other in others for text in first.keys() & other.keys()
    ]
    tolerance = max(3 * noise, _unit(np.concatenate([answer.values.ravel() for answer in answers])))
    return any(abs(a - b) > max(tolerance, 0.02 * abs(a), 1e-6) for a, b in shared)


def _by_text(answer: Seen) -> dict[str, float]:
    """The scores of the first image, by text."""
    assert isinstance(answer.request, TextScores)
    return dict(zip(answer.request.texts, answer.values[0].tolist(), strict=True))


def rounding(answers: Sequence[Seen]) -> Finding:
    """To how many decimals scores are rounded."""
    values = np.concatenate([answer.values.ravel() for answer in answers])
    places = decimals(values)
    if places is not None:
        return Finding("rounding", f"to {places} decimals", len(answers), {"decimals": places})
    told = len(_telling(values)) >= _ENOUGH
    found = "none" if told else "cannot be told: too few scores between 0 and 1"
    return Finding("rounding", found, len(answers))


def decimals(values: Values) -> int | None:
    """The fewest decimals that write all values exactly; None if too many, or too few values."""
    telling = _telling(values)
    if len(telling) < _ENOUGH:
        return None
    return next(
        (d for d in range(MOST_DECIMALS + 1) if all(round(v, d) == v for v in telling)), None
    )


def _telling(values: Values) -> list[float]:
    """The values that rounding would show in: 0 and 1 are also what a saturated softmax gives."""
    finite = values[np.isfinite(values)]
    return [value for value in finite.ravel().tolist() if value not in (0.0, 1.0)]


def label_order(answers: Sequence[Seen]) -> Finding:
    """In which order answers name the texts: by score cannot be told from other orders by one."""
    named = [(answer, names) for answer in answers if (names := _names(answer))]
    if not named:
        return Finding("order", "the answers do not name the texts; read as sent", len(answers))
    as_sent = all(names == [*_by_text(answer)] for answer, names in named)
    by_score = all(_descending([_by_text(answer)[n] for n in names]) for answer, names in named)
    found = "as sent" if as_sent else "by score" if by_score else "neither as sent nor by score"
    return Finding("order", f"{found}; mapped back by name", len(named))


def _names(answer: Seen) -> list[str]:
    """The texts of the request as the answer names them, if it names one."""
    texts = _by_text(answer).keys()
    return [leaf for leaf in leaves(answer.data) if isinstance(leaf, str) and leaf in texts]


def _descending(scores: Sequence[float]) -> bool:
    return all(a >= b for a, b in pairwise(scores))


def model_name(asked: str, answer: Seen) -> Finding:
    """What an answer calls the model that gave it."""
    if answer.model_id != asked:
        found = f"the answer calls it {answer.model_id!r}"
        return Finding("model", found, 1, {"answered_model": answer.model_id})
    if asked in leaves(answer.data):
        return Finding("model", f"{asked!r}, as asked", 1)
    return Finding("model", "the answer names none; another one could answer unnoticed", 1)


def rate_limits(answers: Sequence[Seen]) -> Finding:
    """What answers say about limits."""
    names = sorted({n for answer in answers for n in answer.headers if _LIMITS.search(n)})
    if not names:
        return Finding("rate limits", "no answer tells any", len(answers))
    quota = answers[-1].quota
    left = "in no form that is read"
    if quota is not None:
        left = f"{quota.remaining} requests left, more in {quota.resets_in:g} s"
    return Finding("rate limits", f"{left} ({', '.join(names)})", len(answers))


def lengths(answers: Sequence[Seen]) -> Finding:
    """How wide vectors are, and whether they have length 1."""
    widths = sorted({answer.values.shape[1] for answer in answers})
    if len(widths) > 1:
        found = f"{widths} wide: images and texts are in different spaces"
        return Finding("vectors", found, len(answers))
    norms = np.concatenate([np.linalg.norm(answer.values, axis=1) for answer in answers])
    unit = "of length 1" if np.allclose(norms, 1, atol=1e-3) else "not of length 1"
    return Finding("vectors", f"{widths[0]} numbers, {unit}", len(answers))


def as_written(values: Array, data: Any) -> Values:
    """Scores with all the digits that the answer has: float32 hides rounding beyond 7 digits."""
    written = np.array([leaf for leaf in leaves(data) if type(leaf) is float], dtype=np.float64)
    with np.errstate(over="ignore"):
        known = dict(zip(written.astype(np.float32).tolist(), written.tolist(), strict=True))
    flat = [known.get(float(v), float(str(v))) for v in values.astype(np.float32).ravel()]
    return np.array(flat).reshape(values.shape)


def leaves(data: Any) -> Iterator[Any]:
    """Everything in a JSON value that holds nothing itself, and the names, in their order."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield name
            yield from leaves(value)
    elif isinstance(data, list):
        for value in data:
            yield from leaves(value)
    else:
        yield data
