"""The linear probe with the zero-shot classifier as its prior.

    logits = prior * zero_shot + features W + b

by maximum likelihood with an L2 penalty on W: what is learned is the residual, so that a large
penalty leaves the zero-shot classifier. The penalty of a class is as heavy as the zero-shot
classifier is good at it, after CLAP: Silva-Rodriguez, Hajimiri, Ben Ayed, Dolz, "A Closer Look at
the Few-Shot Adaptation of Large Vision-Language Models", CVPR 2024, arXiv 2312.12730. CLAP
penalises the distance to the text vectors; here the prior may have a weight below one, as text
vectors of a model that does not know a class are no better than others, and the problem is convex
and solved to its optimum, instead of 300 steps of gradient descent.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from blackbox_vlm.observe.heads import (
    Doubles,
    Labels,
    Linear,
    Seen,
    as_float32,
    class_counts,
    class_means,
)
from blackbox_vlm.observe.trust import prior_weight

BIAS_PENALTY = 0.01
ITERATIONS, TOLERANCE = 200, 1e-5  # of L-BFGS, the latter relative to the loss


def fit(seen: Seen, labels: Labels, *, penalty: float = 0.1) -> Linear:
    """Fit the residual.

    Args:
        seen: the images; the features have a mean squared length of 1.
        labels: `(n,)`.
        penalty: of the squared weights of a class, on average over the classes.
    """
    prior = prior_weight(seen, labels)
    present = class_counts(labels, seen.zero_shot.shape[1]) > 0
    offset = prior * seen.zero_shot[:, present].astype(np.float64)
    answers = (np.cumsum(present) - 1)[labels]  # among the classes that have images
    penalties = penalty * seen.views * adaptive(offset, answers)
    solution = np.zeros((seen.features.shape[1] + 1, len(present)))
    solution[:, present] = _solve(seen, offset, answers, penalties)
    return Linear(as_float32(solution[:-1]), as_float32(solution[-1]), as_float32(prior))


def adaptive(logits: Doubles, labels: Labels) -> Doubles:
    """Penalty of every class relative to their mean, `(C,)`; each class has an image.

    It is the mean probability that the images of a class are given of being it.
    """
    own = softmax(logits, axis=1)[np.arange(len(labels)), labels]
    means = class_means(own[:, None], labels, logits.shape[1])[:, 0]
    relative: Doubles = means / means.mean()
    return relative


def _solve(seen: Seen, offset: Doubles, labels: Labels, penalties: Doubles) -> Doubles:
    """Weight and bias `(d + 1, C)` by L-BFGS, in coordinates of about equal curvature."""
    x, bias_penalty = seen.features.astype(np.float64), BIAS_PENALTY * seen.views
    n, n_classes = offset.shape
    wanted = np.eye(n_classes)[labels]
    curvature = np.append((x**2).sum(axis=0), n) / n_classes
    floor = np.append(np.full(x.shape[1], penalties.mean()), bias_penalty)
    scale = (curvature + floor) ** -0.5
    inputs = np.hstack([x, np.ones((n, 1))]) * scale
    decay = np.vstack([np.tile(penalties, (x.shape[1], 1)), np.full(n_classes, bias_penalty)])
    decay = decay * scale[:, None] ** 2

    def loss(flat: Doubles) -> tuple[float, Doubles]:
        weight = flat.reshape(decay.shape)
        log_p = log_softmax(inputs @ weight + offset, axis=1)
        gradient = inputs.T @ (np.exp(log_p) - wanted) + decay * weight
        value = -log_p[wanted > 0].sum() + 0.5 * (decay * weight**2).sum()
        return float(value), gradient.ravel()

    start = np.zeros(decay.size)
    options = {"maxiter": ITERATIONS, "ftol": TOLERANCE}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    solution: Doubles = found.reshape(decay.shape) * scale[:, None]
    return solution
