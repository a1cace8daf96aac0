"""Weights of a log-linear pool of classifiers, from their out-of-fold predictions.

    logits = sum_m w_m f_m,    w >= 0 minimises    sum_i CE_i + pull / 2 sum_m (w_m / w0_m - 1)^2

over the images i: few numbers, drawn to weights w0 that were fixed in advance, so that a handful
of images moves them little and hundreds move them freely. The loss is convex in w.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from blackbox_vlm.observe.calibration import likely_temperature, log_loss

Doubles = NDArray[np.float64]
Labels = NDArray[np.int64]


def pool(
    predictions: Sequence[NDArray[np.floating]], labels: Labels, expected: Doubles, pull: float
) -> Doubles:
    """The weights `(m,)` of `m` predictions `(n, C)`.

    Args:
        predictions: out-of-fold logits.
        labels: `(n,)`.
        expected: w0, `(m,)`, positive.
        pull: how many images' worth w0 has.
    """
    stacked = np.stack([w * p for w, p in zip(expected, predictions, strict=True)])
    rows = np.arange(len(labels))

    def loss(ratio: Doubles) -> tuple[float, Doubles]:
        log_p = log_softmax(np.tensordot(ratio, stacked, 1), axis=1)
        surplus = np.exp(log_p)
        surplus[rows, labels] -= 1
        gradient = np.tensordot(stacked, surplus, 2) + pull * (ratio - 1)
        value = -log_p[rows, labels].sum() + 0.5 * pull * ((ratio - 1) ** 2).sum()
        return float(value), gradient

    start, bounds = np.ones(len(expected)), [(0.0, None)] * len(expected)
    ratio: Doubles = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return ratio * expected


def scaled_loss(logits: NDArray[np.floating], labels: Labels) -> float:
    """Mean log loss of logits `(n, C)` at their best temperature, nats."""
    return float(log_loss(logits / likely_temperature(logits, labels), labels).mean())
