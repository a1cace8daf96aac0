"""Shrunk Gaussian discriminant analysis.

Wang, Liang, Sheng, He, Wang, Tan: "A Hard-to-Beat Baseline for Training-Free CLIP-Based
Adaptation", ICLR 2024, arXiv 2402.04087. One Gaussian per class, one covariance S for all, whose
inverse is the empirical-Bayes ridge estimate of Kubokawa & Srivastava,

    inverse = d ((N - 1) S + tr(S) I)^-1,    logits = x' inverse mu_c - mu_c' inverse mu_c / 2.

Ours: at one image per class, which shows no spread within a class, the ridge is the total
variance; and the logits get the scale of prototypes (see prototypes.py), because discriminants of
hundreds of dimensions overstate themselves by a factor that grows with the dimension.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve

from blackbox_vlm.observe.heads import Labels, Linear, Seen, class_counts, class_means
from blackbox_vlm.observe.prototypes import sharpened


def fit(seen: Seen, labels: Labels, *, shrinkage: float = 1.0) -> Linear:
    """Fit class means and the common covariance.

    Args:
        seen: the images.
        labels: `(n,)`.
        shrinkage: multiplies the ridge; 1 is the paper's.
    """
    x = seen.features.astype(np.float64)
    counts = class_counts(labels, seen.zero_shot.shape[1])
    means = class_means(x, labels, len(counts))
    within = x - means[labels]
    n_images = len(x) / seen.views
    spare = n_images - (counts > 0).sum()  # degrees of freedom
    scatter = within.T @ within
    variance = np.trace(scatter) / spare if spare > 0 else (x**2).sum() / len(x)
    ridge = shrinkage * max(variance, 1e-12)
    weight = solve(scatter + ridge * np.eye(x.shape[1]), means.T, assume_a="pos")
    return sharpened(weight, -0.5 * (means.T * weight).sum(axis=0), counts / seen.views)
