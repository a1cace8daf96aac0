"""Kernel ridge regression towards the zero-shot classifier.

Bendou, Ouasfi, Gripon, Boukhayma: "ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large
Vision-Language Models", CVPR 2025, arXiv 2501.11175: the function nearest to the zero-shot one in
the kernel's space that fits the support images,

    f(x) = f_0(x) + k(x, X) (K + penalty I)^-1 (Y - f_0(X)).

Here f_0(X) are probabilities, as Y is, and the residual gets the scale of prototypes (see
prototypes.py; its length is that in the kernel's space) before it joins the zero-shot logits.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve
from scipy.special import softmax

from blackbox_vlm.observe.heads import (
    Kernel,
    Labels,
    Seen,
    as_float32,
    class_counts,
    even_out,
    gaussian_kernel,
)
from blackbox_vlm.observe.prototypes import sharpness
from blackbox_vlm.observe.trust import debias, prior_weight


def fit(seen: Seen, labels: Labels, *, beta: float = 1.0, penalty: float = 0.3) -> Kernel:
    """Fit the residual.

    Args:
        seen: the images; the features have a mean squared length of 1.
        labels: `(n,)`.
        beta: of the Gaussian kernel `exp(-beta |x - s|^2 / 2)`.
        penalty: of the residual's squared length in the kernel's space.
    """
    counts = class_counts(labels, seen.zero_shot.shape[1])
    x = seen.features.astype(np.float64)
    prior = prior_weight(seen, labels)
    probabilities = softmax(prior * (seen.zero_shot + debias(seen, labels)), axis=1)
    gram = gaussian_kernel(x, x, beta)
    residual = even_out(np.eye(len(counts))[labels] - probabilities, counts > 0)
    coefficients = solve(gram + penalty * seen.views * np.eye(len(x)), residual, assume_a="pos")
    squares = (coefficients * (gram @ coefficients)).sum(axis=0)[counts > 0]
    scale = sharpness(counts / seen.views) / np.sqrt(max(squares.mean(), 1e-24))
    return Kernel(
        seen.features,
        as_float32(scale * coefficients),
        np.zeros(len(counts), dtype=np.float32),
        as_float32(beta),
        as_float32(0),
    )
