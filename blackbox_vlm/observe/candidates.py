"""The heads that compete, and the weights of those that win.

Each head has a few candidates, which differ in settings and in the view of the answers. Of each
head the candidate of lowest out-of-fold log loss stays; the heads and the debiased zero-shot
logits are then pooled, with weights of least out-of-fold log loss, drawn to weights fixed in
advance.

The settings were chosen on the development sets (see choose.py). More of them, or one more head,
changed the average there by less than half a point, on vectors and on scores alike, and often for
the worse: every further choice is made on the same few images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.errors import InputError
from blackbox_vlm.observe import gaussian, kernel, linear, prototypes, refiner, trust
from blackbox_vlm.observe.calibration import log_loss
from blackbox_vlm.observe.features import View
from blackbox_vlm.observe.heads import Floats, Head, Labels, as_float32
from blackbox_vlm.observe.pooling import pool, scaled_loss
from blackbox_vlm.scores import clearly_positive

PULL = 1.0  # of the pool's weights to those fixed in advance, in images
LEAST_TRUST = 0.1  # expected weight of the zero-shot logits where every head holds them already


class Candidate(NamedTuple):
    """A head with its settings bound, on a view of the answers."""

    head: str
    view: View
    fit: Head


# The first of each head is what one image per class gets.
CANDIDATES = (
    Candidate("gaussian", View(0.25), partial(gaussian.fit, shrinkage=1.0)),
    Candidate("gaussian", View(0.5), partial(gaussian.fit, shrinkage=3.0)),
    Candidate("prototypes", View(0.5), prototypes.fit),
    Candidate("linear", View(0.25), partial(linear.fit, penalty=0.1)),
    Candidate("linear", View(0.5), partial(linear.fit, penalty=0.3)),
)
JOINS = Candidate("kernel", View(0.5), kernel.fit)  # where it clearly lowers the pool's loss
BY_NAME = Candidate("refiner", View(0.5), refiner.fit)  # it added nothing on any development set
TRUST = Candidate("trust", View(0.5), trust.fit)  # debiased zero-shot logits, in every pool
HOLD_PRIOR = frozenset({"linear", "refiner"})  # heads that hold the zero-shot logits themselves

Predictions = Mapping[Candidate, Floats]
Weights = Mapping[Candidate, float]


def candidates_of(only: Sequence[str] | None) -> list[Candidate]:
    """Those of the named heads, or of all that take part by themselves.

    Raises:
        InputError: an unknown head, or none.
    """
    if only is None:
        return [*CANDIDATES, JOINS]
    known = [*CANDIDATES, JOINS, BY_NAME]
    heads = list(dict.fromkeys(candidate.head for candidate in known))
    for head in only:
        if head not in heads:
            raise InputError(f"unknown head {head!r}; wanted some of {', '.join(heads)}")
    if not only:
        raise InputError(f"wanted at least one head of {', '.join(heads)}")
    return [candidate for candidate in known if candidate.head in only]


def fixed_weights(candidates: Iterable[Candidate]) -> dict[Candidate, float]:
    """What was fixed in advance: the first candidate of every head, and the weights."""
    return _expected(_core(candidates))


def blend(
    predictions: Predictions, labels: Labels, images: NDArray[np.bool_]
) -> dict[Candidate, float]:
    """The best candidate of every head, and the pool's weights, by predictions of some images."""
    judged, labels = {c: values[images] for c, values in predictions.items()}, labels[images]
    losses = {c: scaled_loss(judged[c], labels) for c in judged if c is not TRUST}
    heads = _core(sorted(losses, key=losses.__getitem__))
    weights = _pooled(judged, labels, heads)
    if JOINS not in judged or JOINS in weights:
        return weights
    more = _pooled(judged, labels, {**heads, JOINS.head: JOINS})
    before, after = (log_loss(weighted_sum(judged, w), labels) for w in (weights, more))
    return more if clearly_positive(before - after) else weights


def weighted_sum(predictions: Predictions, weights: Weights) -> Floats:
    """Logits of a pool, `(n, C)`."""
    return as_float32(sum(weight * predictions[c] for c, weight in weights.items()))


def _core(candidates: Iterable[Candidate]) -> dict[str, Candidate]:
    """The first candidate of every head, without the one that must earn its place."""
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.head, candidate)
    if len(first) > 1:
        first.pop(JOINS.head, None)
    return first


def _expected(heads: Mapping[str, Candidate]) -> dict[Candidate, float]:
    """The candidates and the debiased zero-shot logits, at the weights fixed in advance."""
    share = 1 / len(heads)
    held = share * len(HOLD_PRIOR & heads.keys())
    return {**dict.fromkeys(heads.values(), share), TRUST: max(1 - held, LEAST_TRUST)}


def _pooled(
    judged: Predictions, labels: Labels, heads: Mapping[str, Candidate]
) -> dict[Candidate, float]:
    expected = _expected(heads)
    stacked = [judged[candidate] for candidate in expected]
    found = pool(stacked, labels, np.array([*expected.values()], dtype=np.float64), PULL)
    return dict(zip(expected, found.tolist(), strict=True))
