"""Are the probabilities right? Temperature, expected calibration error, and intervals.

Guo, Pleiss, Sun, Weinberger: "On Calibration of Modern Neural Networks", ICML 2017: temperature
scaling by maximum likelihood (section 4.2) and the expected calibration error (equation 3), here
over bins of equal mass, which waste no bin where there are no images (Nguyen & O'Connor 2015).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, ndtri, softmax

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Labels = NDArray[np.int64]

BINS = 15
IMAGES_PER_BIN = 8  # at least; fewer images, fewer bins
RESAMPLES = 200
CONFIDENCE = 0.95
COLDEST, HOTTEST = 0.05, 20.0  # of a temperature


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far the confidence of predictions is from their accuracy.

    Attributes:
        temperature: what the logits were divided by.
        ece: expected calibration error, 0 to 1.
        low, high: its 95 % interval, by the bootstrap over images.
        n: images.
    """

    temperature: float
    ece: float
    low: float
    high: float
    n: int


def calibrate(logits: Floats, labels: Labels, *, seed: int) -> Calibration:
    """Find the temperature of out-of-fold logits `(n, C)`, and what error is left at it."""
    temperature = likely_temperature(logits, labels)
    probabilities = softmax(logits.astype(np.float64) / temperature, axis=1)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    random = np.random.default_rng(seed)
    drawn = random.integers(len(labels), size=(RESAMPLES, len(labels)))
    errors = [_binned_error(confidence[images], right[images]) for images in drawn]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(errors, [tail, 1 - tail])
    ece = _binned_error(confidence, right)
    return Calibration(temperature, ece, min(float(low), ece), max(float(high), ece), len(labels))


def likely_temperature(logits: NDArray[np.floating], labels: Labels) -> float:
    """The temperature of maximum likelihood, by Newton's method on its inverse.

    Beside the `n` images, one of which nothing is known: after Platt 1999, section 2.2, so that a
    few images, all of them right, do not make a classifier infinitely sure of itself.
    """
    values = logits.astype(np.float64)
    unknown, inverse = 1 / (len(labels) + 1), 1.0
    own = values[np.arange(len(labels)), labels]
    wanted = ((1 - unknown) * own + unknown * values.mean(axis=1)).sum()
    for _ in range(50):
        probabilities = softmax(inverse * values, axis=1)
        mean = (probabilities * values).sum(axis=1)
        curvature = ((probabilities * values**2).sum(axis=1) - mean**2).sum()
        step = (mean.sum() - wanted) / max(curvature, 1e-12)
        step = float(np.clip(step, -inverse, inverse / 2))
        before, inverse = inverse, float(np.clip(inverse - step, 1 / HOTTEST, 1 / COLDEST))
        if abs(inverse - before) < 1e-6 * before:
            break
    return 1 / inverse


def calibration_error(probabilities: NDArray[np.floating], labels: Labels) -> float:
    """Expected calibration error of `(n, C)` probabilities, over bins of equal mass."""
    return _binned_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)


def log_loss(logits: NDArray[np.floating], labels: Labels) -> Doubles:
    """Negative log-likelihood of every image, `(n,)` nats."""
    loss: Doubles = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    return loss


def wilson_interval(right: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of an accuracy of `right` among `n` images: Wilson 1927; (0, 1) of none."""
    if n == 0:
        return 0.0, 1.0
    z = float(ndtri((1 + confidence) / 2))
    share, weight = right / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z * float(np.sqrt(share * (1 - share) / n + weight / (4 * n))) / (1 + weight)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _binned_error(confidence: Doubles, right: NDArray[np.bool_]) -> float:
    n = len(right)
    bins = int(np.clip(n // IMAGES_PER_BIN, 1, BINS))
    gap = (confidence - right)[np.argsort(confidence, kind="stable")]
    return float(sum(abs(part.sum()) for part in np.array_split(gap, bins)) / n)
