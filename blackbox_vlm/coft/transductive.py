"""Transductive classifiers on cached features: TransCLIP and StatA.

**TransCLIP**: Zanella, Gérin, Ben Ayed, "Boosting Vision-Language Models with Transduction",
NeurIPS 2024. All images are classified together, by the z of largest

    sum_i z_i' (zero-shot_i + log-likelihood_i / tau) + w/2 sum_ij a_ij z_i' z_j + entropy(z)

with one Gaussian per class, one diagonal covariance for all, and the affinity a of neighbours.
Block majorize-minimize: a few times

    z_i proportional to exp(zero-shot_i + log-likelihood_i / tau + w sum_j a_ij z_j),         (1)

then means and covariance given z. The first means are those of the images likeliest of each class.
Labelled images keep their labels.

**StatA**: Zanella, Fuchs, De Vleeschouwer, Ben Ayed, "Realistic Test-Time Adaptation of
Vision-Language Models", CVPR 2025. A class without images must not take up those of others, hence

    mu_c = beta_c (mean of its images) + (1 - beta_c) anchor_c,  beta_c = n_c / (alpha + n_c), (2)

n_c being the sum of its z, and likewise the covariance.

Ours:

- Features may be anything. tau is in units of their number, since the likelihood of hundreds of
  dimensions overstates itself by a factor that grows with it; 0.1 is the paper's 50 for 512.
- Zero-shot logits are scaled to a standard deviation fixed in advance, as endpoints differ in their
  scale, and take an `offset`. With `mass.evening` both gained 9 points on the development sets
  (see `mass`) where they gained 0 to 2 without.
- Neighbours weigh more than the paper's. They bring nearly all that transduction adds; without the
  Gaussians the gain was 9 points too, and fewer images went to classes that had none.
- An anchor is the mean of the images weighted by the zero-shot probabilities of its class, since
  scores have no class vectors among the features. To first order these are the means at which a
  Gaussian classifier with the images' covariance is the zero-shot classifier. The class vectors
  that embeddings have, moved to the images' mean, were worse anchors by 7 points.
- As the covariance is common to all classes, so is its anchor, which counts alpha per class.

All classes count as equally likely beforehand, as in the papers: the shares that `mass` finds
lowered the accuracy as a prior.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import softmax

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.heads import Doubles, Floats, Labels, Linear, Seen, as_float32

STRENGTH = 1.0  # standard deviation of the scaled zero-shot logits
TEMPERATURE = 0.1  # tau, per feature
WEIGHT = 4.0  # w, of neighbours whose affinities sum to about 1
ALPHA = 10.0  # of StatA, in images
FIRST = 8  # images that a first mean is of, as in TransCLIP
ROUNDS, STEPS = 10, 5  # of means and covariance, and of (1) in each, as in TransCLIP
FLOOR = 1e-3  # of a feature's variance, in mean variances
BLOCK = 4_096  # images that are worked on at a time


class Settings(NamedTuple):
    """What both methods share: see the constants."""

    strength: float = STRENGTH
    temperature: float = TEMPERATURE
    weight: float = WEIGHT


DEFAULTS = Settings()


class Transduced(NamedTuple):
    """What was found.

    Attributes:
        posterior: of the images together, `(n, C)` float32; rows sum to 1.
        head: the same of any one image, without neighbours: its logits, with the zero-shot logits
            as the endpoint gives them.
    """

    posterior: Floats
    head: Linear


class Gaussians(NamedTuple):
    """One per class, with a common diagonal covariance."""

    means: Doubles  # (C, d)
    variances: Doubles  # (d,)


class Anchor(NamedTuple):
    """What the Gaussians are drawn to."""

    gaussians: Gaussians
    alpha: float  # its weight, in images of each class


def transclip(
    seen: Seen,
    graph: csr_matrix,
    labels: Labels,
    *,
    offset: Doubles | None = None,
    settings: Settings = DEFAULTS,
) -> Transduced:
    """TransCLIP.

    Args:
        seen: all images, labelled or not.
        graph: `(n, n)` affinities, `neighbours.graph` of the features.
        labels: `(n,)`; `NO_LABEL` where there is none.
        offset: `(C,)`, added to the zero-shot logits; `mass.evening` of them, or None.
        settings: the weights of the terms.

    Raises:
        InputError: there is no image, or shapes or labels do not fit each other.
    """
    task = _task(seen, graph, labels, offset, settings)
    return _alternate(task, _likeliest(task), None)


def stata(
    seen: Seen,
    graph: csr_matrix,
    labels: Labels,
    *,
    offset: Doubles | None = None,
    alpha: float = ALPHA,
    settings: Settings = DEFAULTS,
) -> Transduced:
    """StatA.

    Args:
        seen, graph, labels, offset, settings: as of `transclip`.
        alpha: of (2), in images.

    Raises:
        InputError: there is no image, or shapes or labels do not fit each other.
    """
    task = _task(seen, graph, labels, offset, settings)
    start = fit_gaussians(task.features, _soft(task.prior, task))
    return _alternate(task, start, Anchor(start, alpha))


def fit_gaussians(features: Floats, posterior: Floats, anchor: Anchor | None = None) -> Gaussians:
    """The images' means and variances by the posterior `(n, C)`, with (2) if there is an anchor."""
    counts = posterior.sum(axis=0, dtype=np.float64)[:, None]
    means = (posterior.T @ features) / np.maximum(counts, 1e-12)
    if anchor is None:
        return Gaussians(means, _variances(features, posterior, means))
    means = (counts * means + anchor.alpha * anchor.gaussians.means) / (counts + anchor.alpha)
    beta = len(features) / (len(features) + anchor.alpha * len(means))
    own = _variances(features, posterior, means)
    return Gaussians(means, beta * own + (1 - beta) * anchor.gaussians.variances)


class _Task(NamedTuple):
    features: Floats  # (n, d)
    prior: Floats  # (n, C), zero-shot logits with the offset, scaled
    graph: csr_matrix
    known: NDArray[np.int64]  # images that are labelled,
    labels: Labels  # and with what
    offset: Doubles  # (C,)
    scale: float  # of the zero-shot logits
    tau: float
    weight: float


def _task(
    seen: Seen, graph: csr_matrix, labels: Labels, offset: Doubles | None, settings: Settings
) -> _Task:
    _check(seen, graph, labels)
    offset = np.zeros(seen.zero_shot.shape[1]) if offset is None else offset
    prior = as_float32(seen.zero_shot + offset)
    scale = settings.strength / max(float(prior.std(dtype=np.float64)), 1e-12)
    known = np.flatnonzero(labels != NO_LABEL)
    tau = settings.temperature * seen.features.shape[1]
    prior *= np.float32(scale)
    return _Task(
        seen.features, prior, graph, known, labels[known], offset, scale, tau, settings.weight
    )


def _check(seen: Seen, graph: csr_matrix, labels: Labels) -> None:
    n, n_classes = seen.zero_shot.shape
    rows = {len(seen.features), len(labels), *graph.shape}
    if rows != {n} or not n:
        raise InputError(
            "wanted features, zero-shot logits, labels and a graph of the same images, one or "
            f"more; got {len(seen.features)}, {n}, {len(labels)} and {graph.shape}"
        )
    if labels.min() < NO_LABEL or labels.max() >= n_classes:
        raise InputError(
            f"wanted labels from 0 to {n_classes - 1}, or {NO_LABEL} for none; "
            f"got {labels.min()} to {labels.max()}"
        )


def _alternate(task: _Task, start: Gaussians, anchor: Anchor | None) -> Transduced:
    posterior, gaussians = _soft(task.prior, task), start
    for _ in range(ROUNDS):
        posterior = _expect(task, gaussians, posterior)
        gaussians = fit_gaussians(task.features, posterior, anchor)
    return Transduced(_expect(task, gaussians, posterior), _head(task, gaussians))


def _likeliest(task: _Task) -> Gaussians:
    """From the images likeliest of each class beforehand, labelled ones first."""
    posterior = _soft(task.prior, task)
    count = min(FIRST, len(posterior))
    first = np.argpartition(-posterior, count - 1, axis=0)[:count]
    means = task.features[first].mean(axis=0, dtype=np.float64)
    return Gaussians(means, _variances(task.features, posterior, means))


def _expect(task: _Task, gaussians: Gaussians, posterior: Floats) -> Floats:
    """(1), a few times."""
    weight, bias = _discriminants(gaussians, task.tau)
    own = task.features @ as_float32(weight)
    own += as_float32(bias)
    own += task.prior
    for _ in range(STEPS):
        posterior = _soft(own, task, posterior)
    return posterior


def _soft(own: Floats, task: _Task, posterior: Floats | None = None) -> Floats:
    """Softmax of what is said of each image alone, and by its neighbours, if their z is given."""
    found = np.empty_like(own)
    for start in range(0, len(own), BLOCK):
        rows = slice(start, start + BLOCK)
        said = own[rows]
        if posterior is not None:
            said = said + np.float32(task.weight) * (task.graph[rows] @ posterior)
        found[rows] = softmax(said, axis=1)
    found[task.known] = 0
    found[task.known, task.labels] = 1
    return found


def _variances(features: Floats, posterior: Floats, means: Doubles) -> Doubles:
    """Mean squared distance of the images from their classes' means, by feature, `(d,)`."""
    n = len(features)
    squares = np.einsum("nd,nd->d", features, features, dtype=np.float64)
    crossed = ((posterior.T @ features) * means).sum(axis=0)
    counts = posterior.sum(axis=0, dtype=np.float64)
    variances = np.maximum(squares - 2 * crossed + counts @ means**2, 0) / n
    floored: Doubles = np.maximum(variances, FLOOR * max(variances.mean(), 1e-12))
    return floored


def _discriminants(gaussians: Gaussians, tau: float) -> tuple[Doubles, Doubles]:
    """log-likelihood / tau as weight `(d, C)` and bias `(C,)`, less what all classes share."""
    weight = (gaussians.means / gaussians.variances).T / tau
    bias = -0.5 * (gaussians.means.T * weight).sum(axis=0)
    return weight - weight.mean(axis=1, keepdims=True), bias - bias.mean()


def _head(task: _Task, gaussians: Gaussians) -> Linear:
    weight, bias = _discriminants(gaussians, task.tau)
    total = bias + task.scale * task.offset
    return Linear(as_float32(weight), as_float32(total), as_float32(task.scale))
