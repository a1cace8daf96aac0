"""How far to trust the zero-shot logits: their likeliest scale on the labelled images (ours).

The zero-shot classifier has not seen the support images, so how well it predicts them is an honest
measurement, at one image per class already; a classifier learned from those images has no such
measurement at hand. A useless prior gets a scale near zero, a good one is sharpened.

The logits are first debiased: a class whose texts attract every image is held back by its mean
logit over the training images, each class counting alike. The weight that the prior then deserves
beside a learned classifier falls with what there is to learn from. On the development sets (see
choose.py) the best one was 1.4, 1.1, 0.7, 0.4 and 0.3 of the scale at 1, 2, 4, 8 and 16 images per
class: hence its division by the square root of the shots. A little more is given (`DILUTION`),
since the scale's own prior holds it back, and good zero-shot classifiers gain by it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from blackbox_vlm.observe.heads import (
    Doubles,
    Labels,
    Linear,
    Seen,
    as_float32,
    class_counts,
    class_means,
    even_out,
)

DEVIATION = 0.3  # of the scale's normal prior about 0, which a few images must outweigh
DILUTION = 1.7  # the prior's weight is DILUTION * scale / sqrt(shots)


def fit(seen: Seen, labels: Labels) -> Linear:
    """The zero-shot logits, debiased, and weighted as a prior; the features play no part."""
    offset = debias(seen, labels)
    prior = prior_weight(seen, labels)
    n_features = seen.features.shape[1]
    weight = np.zeros((n_features, len(offset)), dtype=np.float32)
    return Linear(weight, as_float32(prior * offset), as_float32(prior))


def debias(seen: Seen, labels: Labels) -> Doubles:
    """What evens out the classes' mean logits, `(C,)`; zero for a class without images.

    As much of it is left out as chance would bring: the positive-part estimator of James & Stein.
    """
    zero_shot, n_images = seen.zero_shot, len(labels) / seen.views
    present = class_counts(labels, zero_shot.shape[1]) > 0
    means = class_means(zero_shot, labels, len(present))[present].mean(axis=0)
    offset = even_out(means, present)
    chance = zero_shot[:, present].var(axis=0, dtype=np.float64).mean() / n_images
    found = (offset**2).sum() / max(present.sum() - 1, 1)
    evened: Doubles = -max(0.0, 1 - chance / max(found, 1e-12)) * offset
    return evened


def prior_weight(seen: Seen, labels: Labels) -> float:
    """The weight of the zero-shot logits beside a classifier learned from these images."""
    debiased = seen.zero_shot + debias(seen, labels)
    shots = len(labels) / seen.views / len(np.unique(labels))
    return DILUTION * likely_scale(debiased, labels, seen.views) / float(np.sqrt(shots))


def likely_scale(logits: NDArray[np.floating], labels: Labels, views: float = 1.0) -> float:
    """The scale t >= 0 of `softmax(t logits)` of largest posterior, by Newton's method.

    The log-likelihood is concave in t, and so is its normal prior. `views` rows are one image.
    """
    rows, precision = np.arange(len(labels)), views * DEVIATION**-2
    scale = DEVIATION
    for _ in range(50):
        probabilities = softmax(scale * logits, axis=1)
        mean = (probabilities * logits).sum(axis=1)
        spread = (probabilities * logits**2).sum(axis=1) - mean**2
        slope = (mean - logits[rows, labels]).sum() + precision * scale
        step = slope / (spread.sum() + precision)
        before, scale = scale, max(scale - float(np.clip(step, -1, 1)), 0.0)
        if abs(scale - before) < 1e-6:
            break
    return scale
