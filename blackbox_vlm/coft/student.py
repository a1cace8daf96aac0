"""CoFT's second phase on a black box: a student of our own, taught by filtered labels.

Wang et al., arXiv 2602.04337, fine-tune the whole visual encoder in their second phase, "guided by
collaboratively filtered pseudo-labels". Behind an endpoint there is no encoder to tune. In its
place stands a classifier of ours on the cached features (ours, as is all below): one Gaussian per
class with a common covariance, as in `observe.gaussian`, which labelled and unlabelled images teach
together by expectation-maximisation (Nigam, McCallum, Thrun, Mitchell, "Text Classification from
Labeled and Unlabeled Documents using EM", Machine Learning 39, 2000):

    M:  mu_c = sum_i w_i r_ic x_i / sum_i w_i r_ic,  pi_c ~ sum_i r_ic + 1/5 of an equal share   (1)
    E:  r_i = softmax(refined_i + m log pi + s (x_i' V mu_c - mu_c' V mu_c / 2))                 (2)

The r of labelled images are their labels throughout. V inverts the covariance within classes plus
a ridge, and s gives the discriminants a length fixed in advance, since those of hundreds of
dimensions overstate themselves (see `observe.prototypes`). The refined logits stay in (2): what the
endpoint knows of an image is evidence that the features do not hold. The class mass pi is
estimated, and m says how far the estimate is trusted: 0 would be a uniform prior in disguise.

Why a Gaussian and no network: on the development sets (see `settings.py`) it was as good as any
student that we tried, has one solution, takes seconds, and an adapter stores it as one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve
from scipy.special import softmax

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.observe.heads import Doubles, Floats, Labels, Linear, Seen, as_float32

BLOCK = 16_384  # images that are worked on at a time: memory beyond the inputs is of this order
SMOOTHING = 0.2  # of the class mass, in equal shares: no class dies out for good


class Student(NamedTuple):
    """What the second phase teaches.

    Attributes:
        head: its share of the logits; the refined ones are to be added. `m log pi` is in the bias.
        posterior: `(n, C)` float32 of all images, under head and refined logits; rows sum to 1.
        mass: pi, `(C,)`; sums to 1.
    """

    head: Linear
    posterior: Floats
    mass: Doubles


def fit(
    seen: Seen,
    labels: Labels,
    start: Floats,
    weights: Floats,
    *,
    sharpness: float,
    ridge: float,
    rounds: int,
    mass: float,
) -> Student:
    """Teach the student.

    Args:
        seen: all images; `zero_shot` are the refined logits that it starts from.
        labels: `(n,)` true labels; `NO_LABEL` where there is none.
        start: `(n, C)` posterior that the first M step takes, filtered.
        weights: `(n,)` w of the images in (1).
        sharpness: length s of the discriminants.
        ridge: added to the covariance, in mean variances within classes.
        rounds: of expectation and maximisation, at least 1.
        mass: m of (2).
    """
    posterior = _pinned(start, labels)
    scatter = _scatter(seen.features, weights)
    for _ in range(rounds):
        prior = mass * np.log(class_mass(posterior))
        head = _maximise(seen.features, posterior, weights, scatter, sharpness, ridge)
        head = head._replace(bias=as_float32(head.bias + prior - prior.mean()))
        posterior = _pinned(_expect(seen, head), labels)
    return Student(head, posterior, class_mass(posterior))


def class_mass(posterior: Floats) -> Doubles:
    """pi of (1), `(C,)`."""
    n, n_classes = posterior.shape
    counts = posterior.sum(axis=0, dtype=np.float64) + SMOOTHING * n / n_classes
    mass: Doubles = counts / counts.sum()
    return mass


def _pinned(posterior: Floats, labels: Labels) -> Floats:
    """Certainty where a label is known."""
    known = np.flatnonzero(labels != NO_LABEL)
    pinned = posterior.astype(np.float32)
    pinned[known] = 0
    pinned[known, labels[known]] = 1
    return pinned


def _scatter(features: Floats, weights: Floats) -> Doubles:
    """`sum_i w_i x_i x_i'`, `(d, d)`; it does not change with the labels."""
    total = np.zeros((features.shape[1],) * 2)
    for rows in _blocks(len(features)):
        x = features[rows].astype(np.float64)
        total += x.T @ (x * weights[rows, None])
    return total


def _maximise(
    features: Floats,
    posterior: Floats,
    weights: Floats,
    scatter: Doubles,
    sharpness: float,
    ridge: float,
) -> Linear:
    """The discriminants of (2), from (1), without the class mass."""
    counts, sums = _sums(features, posterior, weights)
    means = sums / np.maximum(counts, 1e-6)[:, None]
    within = (scatter - means.T @ (means * counts[:, None])) / counts.sum()
    dim = len(within)
    variance = max(np.trace(within) / dim, 1e-12)
    discriminants = solve(within + ridge * variance * np.eye(dim), means.T, assume_a="pos")
    bias = -0.5 * (means.T * discriminants).sum(axis=0)
    evened = discriminants - discriminants.mean(axis=1, keepdims=True)
    scale = sharpness / max(float(np.sqrt((evened**2).sum(axis=0).mean())), 1e-12)
    weight, bias = scale * evened, scale * (bias - bias.mean())
    return Linear(as_float32(weight), as_float32(bias), as_float32(0))


def _sums(features: Floats, posterior: Floats, weights: Floats) -> tuple[Doubles, Doubles]:
    """Weighted number `(C,)` and sum `(C, d)` of every class's images."""
    n_classes, dim = posterior.shape[1], features.shape[1]
    counts, sums = np.zeros(n_classes), np.zeros((n_classes, dim))
    for rows in _blocks(len(features)):
        share = posterior[rows].astype(np.float64) * weights[rows, None]
        counts += share.sum(axis=0)
        sums += share.T @ features[rows]
    return counts, sums


def _expect(seen: Seen, head: Linear) -> Floats:
    """(2) for all images, `(n, C)`."""
    posterior = np.empty(seen.zero_shot.shape, dtype=np.float32)
    for rows in _blocks(len(posterior)):
        logits = seen.features[rows] @ head.weight + head.bias + seen.zero_shot[rows]
        posterior[rows] = softmax(logits, axis=1)
    return posterior


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, n, BLOCK))
