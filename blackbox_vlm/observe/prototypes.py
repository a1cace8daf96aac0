"""Prototypes: the cosine to each class's mean feature.

Snell, Swersky, Zemel: "Prototypical Networks for Few-shot Learning", NeurIPS 2017, section 2.3, on
features that are centred, and whitened in part.

Instead of a learned temperature, the scale is `SHARPNESS * sqrt(shots)`: means of more images are
better known. On the development sets (see choose.py) the scale of least log loss on other images
was 0.6 to 1.9 times that for every set, at 5 to 200 classes and 1 to 16 images per class, for
prototypes and for Gaussian discriminants of the same length.
"""

from __future__ import annotations

import numpy as np

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

SHARPNESS = 5.0


def fit(seen: Seen, labels: Labels) -> Linear:
    """Fit the prototypes. The features' length is left alone: it is 1 on average."""
    counts = class_counts(labels, seen.zero_shot.shape[1])
    means = class_means(seen.features, labels, len(counts))
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    directions = means / np.maximum(lengths, 1e-12)
    return sharpened(directions.T, np.zeros(len(counts)), counts / seen.views)


def sharpened(weight: Doubles, bias: Doubles, counts: Doubles) -> Linear:
    """A discriminant `(d, C)`, `(C,)` of classes with `counts` images, at the scale for so many."""
    present = counts > 0
    length = np.sqrt((weight[:, present] ** 2).sum(axis=0).mean())
    scale = sharpness(counts) / max(length, 1e-12)
    return Linear(
        as_float32(scale * even_out(weight, present)),
        as_float32(scale * even_out(bias, present)),
        as_float32(0),
    )


def sharpness(counts: Doubles) -> float:
    """The length of a class's discriminant, where the classes have `counts` images."""
    return SHARPNESS * float(np.sqrt(counts[counts > 0].mean()))
