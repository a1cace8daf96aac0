"""From answers to features: centre, rotate to principal components, whiten in part.

Scores against a bank of texts are the image's vector seen through the texts' geometry, which is far
from isotropic: a few directions carry almost everything. Two remedies, both linear:

- **A view** divides each principal component of the training answers, of deviation s, by
  s ** power: 0 leaves the answers' own geometry, 1 whitens. Few images show few components.
- **A metric** measures the distortion on pictures of anything, asked about the same texts once: the
  inverse square root of their answers' covariance makes what pictures show at large isotropic. It
  is the background whitening of Hariharan, Malik, Ramanan, "Discriminative Decorrelation for
  Clustering and Classification", ECCV 2012, section 2, applied to scores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.observation import Observation

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

RIDGE = 0.03  # of a metric, in mean variances of what the pictures show
MANY = 16_384  # images that are worked on at a time; more are never copied as a whole
NOISE = 1e-5  # relative deviation below which a direction is rounding


class View(NamedTuple):
    """How to look at answers."""

    power: float = 0.0  # of the whitening
    rank: int | None = None  # principal components kept at most


class FeatureMap(NamedTuple):
    """`features = (answers - mean) @ projection`."""

    mean: Floats  # (K,)
    projection: Floats  # (K, d)


def fit_map(answers: Floats, view: View) -> FeatureMap:
    """The map of a view, from the answers `(n, K)` for training images; labels play no part.

    Features are scaled to a mean squared length of 1. Answers that never change, and answers that
    repeat others, add nothing; with no change at all there is one feature, which is 0.

    Raises:
        InputError: there is no answer, or one is not a number: `scores.to_logits` fills the gaps.
    """
    if answers.size == 0 or not np.isfinite(answers).all():
        raise InputError(
            f"features need finite answers; got {answers.shape} with "
            f"{int((~np.isfinite(answers)).sum())} that are not: fill them with scores.to_logits"
        )
    mean, deviations, directions = _principal(answers)
    deviations, directions = deviations[: view.rank], directions[: view.rank]
    scale = deviations**-view.power
    length = np.sqrt(((deviations * scale) ** 2).sum() / len(answers))
    if not len(scale):
        return FeatureMap(mean.astype(np.float32), np.zeros((len(mean), 1), dtype=np.float32))
    projection = directions.T * (scale / length)
    return FeatureMap(mean.astype(np.float32), projection.astype(np.float32))


def features(fitted: FeatureMap, answers: Floats) -> Floats:
    """Features of answers `(n, K)`, `(n, d)` float32."""
    found = np.empty((len(answers), fitted.projection.shape[1]), dtype=np.float32)
    for start in range(0, len(answers), MANY):
        rows = slice(start, start + MANY)
        found[rows] = (answers[rows] - fitted.mean) @ fitted.projection
    return found


class Metric(NamedTuple):
    """An invertible map of answers under which the pictures that it was measured on spread evenly.

    `answers @ (outside * I + directions diag(scales - outside) directions^T)`
    """

    directions: Floats  # (K, d), orthonormal
    scales: Floats  # (d,)
    outside: float  # what the directions leave is scaled by this


def fit_metric(background: Floats, ridge: float = RIDGE) -> Metric:
    """The metric of the answers `(m, K)` for pictures of anything, of no class in particular.

    Args:
        background: their answers to the bank's texts, like those of training images.
        ridge: what is added to every direction's variance, in mean variances; it bounds how much a
            direction can be stretched, and with it noise.
    """
    _, deviations, directions = _principal(background)
    if not len(deviations):
        raise InputError(f"{len(background)} pictures with the same answers measure no geometry")
    variances = deviations**2 / len(background)
    added = ridge * variances.mean()
    scales, outside = (variances + added) ** -0.5, float(added**-0.5)
    return Metric(directions.T.astype(np.float32), scales.astype(np.float32), outside)


def apply(metric: Metric, answers: Floats) -> Floats:
    """Answers `(n, K)` in the metric, `(n, K)`."""
    return _stretch(answers, metric.directions, metric.scales, metric.outside)


def observe_in(metric: Metric, observation: Observation) -> Observation:
    """The observation in the metric, with the same zero-shot logits."""
    readout = _undo(metric, observation.readout.T).T
    return Observation(apply(metric, observation.answers), np.ascontiguousarray(readout))


def before(metric: Metric, fitted: FeatureMap) -> FeatureMap:
    """The map of plain answers that equals `fitted` on answers in the metric."""
    projection = apply(metric, fitted.projection.T).T
    return FeatureMap(_undo(metric, fitted.mean[None])[0], np.ascontiguousarray(projection))


def _undo(metric: Metric, rows: Floats) -> Floats:
    return _stretch(rows, metric.directions, 1 / metric.scales, 1 / metric.outside)


def _stretch(
    rows: Floats, directions: Floats, scales: NDArray[np.floating], outside: float
) -> Floats:
    along = rows.astype(np.float64) @ directions
    stretched = outside * rows + (along * (scales - outside)) @ directions.T
    return np.asarray(stretched, dtype=np.float32)


def _principal(answers: Floats) -> tuple[Doubles, Doubles, Doubles]:
    """Mean `(K,)`, singular values `(d,)` that are more than rounding, directions `(d, K)`."""
    mean = answers.mean(axis=0, dtype=np.float64)
    if len(answers) > MANY:
        deviations, directions = _of_scatter(answers, mean)
    else:
        _, deviations, directions = np.linalg.svd(answers - mean, full_matrices=False)
    rounding = NOISE * max(deviations[0], 1e-2 * np.abs(mean).max())
    kept = deviations > rounding
    return mean, deviations[kept], directions[kept]


def _of_scatter(answers: Floats, mean: Doubles) -> tuple[Doubles, Doubles]:
    """The same from the scatter matrix, in memory that the number of images does not change."""
    scatter = np.zeros((answers.shape[1],) * 2)
    for start in range(0, len(answers), MANY):
        centred = answers[start : start + MANY] - mean
        scatter += centred.T @ centred
    values, vectors = np.linalg.eigh(scatter)
    return np.sqrt(np.maximum(values[::-1], 0)), vectors.T[::-1]
