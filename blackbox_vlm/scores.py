"""From what an endpoint returns to logits that a method can use.

Probabilities give logits up to one constant per image and request (softmax) or exactly (sigmoid);
rounding and top-k leave gaps, which are filled by what is known of them, never by zero. And what
logits are worth: how often they are right, and whether one method is more so than another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logit

from blackbox_vlm.backend import NO_LABEL, Array, Capabilities, ScoreKind

SMALLEST_PROBABILITY = 1e-12  # what is smaller is noise in most endpoints' arithmetic
SMALLEST_REST = 1e-6  # what is left of 1 below this is the rounding of float32 scores


def to_logits(scores: Array, capabilities: Capabilities) -> NDArray[np.float32]:
    """Turn `(n_images, n_texts)` scores of the declared kind into logits, float32.

    Softmax probabilities become log-probabilities: logits up to one constant per image.
    """
    values = np.asarray(scores, dtype=np.float64)
    kind = capabilities.score_kind
    if kind is ScoreKind.COSINE:
        return _as_float32(fill_censored(values) * capabilities.logit_scale)
    if kind is ScoreKind.LOGITS:
        return _as_float32(fill_censored(values))
    floor = SMALLEST_PROBABILITY
    if capabilities.decimals is not None:
        floor = 0.5 * 10.0**-capabilities.decimals
    if kind is ScoreKind.SIGMOID:
        return _as_float32(logit(np.clip(fill_censored(values), floor, 1 - floor)))
    return _as_float32(np.log(np.maximum(spread_missing_mass(values), floor)))


def fill_censored(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the texts that a top-k endpoint left out (NaN) the lowest score that it returned."""
    missing = np.isnan(values)
    if not missing.any():
        return values
    lowest = np.nanmin(values, axis=1, keepdims=True)
    return np.where(missing, lowest, values)


def spread_missing_mass(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share the mass that top-k left over among the texts left out, none above those returned."""
    missing = np.isnan(probabilities)
    if not missing.any():
        return probabilities
    rest = np.clip(1 - np.nansum(probabilities, axis=1, keepdims=True), SMALLEST_REST, 1)
    share = rest / np.maximum(missing.sum(axis=1, keepdims=True), 1)
    lowest = np.nanmin(probabilities, axis=1, keepdims=True)
    return np.where(missing, np.minimum(share, lowest), probabilities)


def predicted(logits: Array) -> NDArray[np.int64]:
    """The best text of every image, `(n_images,)`; `NO_LABEL` where all are the same."""
    best = np.asarray(logits.argmax(axis=1), dtype=np.int64)
    return np.where(np.all(logits == logits[:, :1], axis=1), NO_LABEL, best)


def accuracy_of(logits: Array, labels: NDArray[np.int64]) -> float:
    """The share of images `(n, C)` whose best text is that of their label."""
    return float((predicted(logits) == labels).mean())


def clearly_positive(gain: NDArray[np.float64], errors: float = 1.0) -> bool:
    """Whether a mean over images `(n,)` exceeds so many of its standard errors.

    Differences of two methods on the same images are paired, which keeps the error small.
    """
    return bool(gain.mean() > errors * gain.std() / np.sqrt(len(gain)))


def log_probabilities(logits: Array) -> NDArray[np.float64]:
    """log softmax over the last axis."""
    result: NDArray[np.float64] = log_softmax(np.asarray(logits, dtype=np.float64), axis=-1)
    return result


def centred(logits: Array) -> NDArray[np.float32]:
    """Remove each image's mean logit: the part that a softmax endpoint hides anyway."""
    return _as_float32(logits - logits.mean(axis=-1, keepdims=True))


def _as_float32(values: Array) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)
