"""CoFT's collaborative filtering: two models judge each other's pseudo-labels.

Wang, Meng, Cai, Song, Xia, arXiv 2602.04337: two models with dual prompts (see dual.py) differ in
what they see, start from and are shown first, and so in their mistakes. Each names a class for
every image, and the other says how clean that label is. The abstract leaves the rule open. Ours: of
the images that the models agree on, each class keeps those whose label is cleanest to the model
that thinks worse of it, in proportion to the class's mass. The mass is given; a rare class keeps
few images, and one at least.

There is no threshold on p_clean. On the development sets (see observe/choose.py), to leave out
labels of p_clean < 1/2 gained a student nothing, since it left out a third of them; nor did weights
by p_clean or by confidence. What is not kept is recovered by the student (settings.py): coverage
was worth as much to it as precision.

None of the figures here is an accuracy. Models that learn from the same wrong labels agree on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.coft.dual import Dual, DualSettings, cleanliness, predict, train
from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.heads import Floats, Labels, Seen, class_counts

Mask = NDArray[np.bool_]

SHARE = 0.7  # of a class's images that `select` keeps
FLOOR = 0.3  # of all images that it keeps at least, if the models agree on so many
MASS_ERROR = 1e-3  # by which a class mass may miss 1: it may be float32


class Judged(NamedTuple):
    """What two models say of all images; a single model stands for both.

    Attributes:
        labels: `(2, n)`, the class that each model names.
        clean: `(2, n)` p_clean of that label, by the other model.
        posterior: `(n, C)`, the mean of their softmaxes.
    """

    labels: Labels
    clean: Floats
    posterior: Floats

    @property
    def agree(self) -> Mask:
        """Where both name the same class, `(n,)`."""
        return np.asarray(self.labels[0] == self.labels[1])

    @property
    def named(self) -> Labels:
        """The class that both name, or else that of the largest mean posterior, `(n,)`."""
        best = np.where(self.agree, self.labels[0], self.posterior.argmax(axis=1))
        return np.asarray(best, dtype=np.int64)


class Statistics(NamedTuple):
    """Shares of all images, and images of every class; no measure of accuracy."""

    coverage: float  # have a label
    agreement: float  # both models name the same class
    counts: NDArray[np.int64]  # (C,), of those with a label


class Filtered(NamedTuple):
    """Pseudo-labels to learn from.

    Attributes:
        labels: `(n,)`, `NO_LABEL` where there is none.
        weights: `(n,)`, 1 where there is a label, and 0.
        statistics: of the labels.
    """

    labels: Labels
    weights: Floats
    statistics: Statistics


def collaborate(
    views: Sequence[Seen], labels: Labels, weights: Floats, settings: DualSettings, seed: int
) -> tuple[tuple[Dual, ...], Judged]:
    """Train a model on each view, from the same pseudo-labels, and let them judge each other.

    Args:
        views: of all images, two; or one for a single model, which then judges itself.
        labels: `(n,)` pseudo-labels; `NO_LABEL` where an image is not learned from.
        weights: `(n,)`.
        settings: of both models.
        seed: of the first; the second has the next one.

    Raises:
        InputError: other than one or two views, views of different images, or labels that do not
            fit.
    """
    shapes = {view.zero_shot.shape for view in views}
    if len(views) not in (1, 2) or len(shapes) != 1:
        raise InputError(
            f"got {len(views)} views with logits of {shapes}: give two of the same images, or one"
        )
    duals = tuple(
        train(view, labels, weights, settings, seed + turn) for turn, view in enumerate(views)
    )
    return duals, judge(duals, views)


def judge(duals: Sequence[Dual], views: Sequence[Seen]) -> Judged:
    """What trained models, one or two, say of all images, each in its own view."""
    said = [predict(dual, view) for dual, view in zip(duals, views, strict=True)]
    first, last = said[0].argmax(axis=1), said[-1].argmax(axis=1)
    by_last = cleanliness(duals[-1], views[-1], first)
    by_first = cleanliness(duals[0], views[0], last)
    posterior = softmax(said[0], axis=1)
    if len(said) > 1:
        posterior = (posterior + softmax(said[1], axis=1)) / 2
    return Judged(np.stack([first, last]), np.stack([by_last, by_first]), posterior)


def select(judged: Judged, mass: NDArray[np.floating], *, share: float = SHARE) -> Filtered:
    """The cleanest images of each class, of those that the models agree on.

    Where classes have fewer images than their part, and less than `FLOOR` of all are kept (or
    `share`, if that is less), the cleanest others fill up.

    Args:
        judged: what the models say.
        mass: of the classes, `(C,)`; sums to 1.
        share: `share * n * mass` images of a class are kept at most, and one at least.

    Raises:
        InputError: a mass that is none, or a share that is not above 0 and up to 1.
    """
    n, n_classes = judged.posterior.shape
    _check(mass, n_classes, share)
    labels, clean = judged.named, judged.clean.min(axis=0)
    wanted = np.maximum(np.rint(share * n * mass), 1).astype(np.int64)
    kept = best_of_each(labels, clean, judged.agree, wanted)
    short = int(min(FLOOR, share) * n) - int(kept.sum())
    if short > 0:
        others = np.flatnonzero(judged.agree & ~kept)
        kept[others[np.argsort(-clean[others], kind="stable")[:short]]] = True
    return _labelled(judged, kept)


def best_of_each(labels: Labels, scores: Floats, eligible: Mask, wanted: NDArray[np.int64]) -> Mask:
    """The `wanted` `(C,)` eligible images of each class with the largest scores, `(n,)`.

    Of images with the same score, the first.
    """
    images = np.flatnonzero(eligible)
    images = images[np.lexsort((-scores[images], labels[images]))]
    counts = class_counts(labels[images], len(wanted))
    first = np.cumsum(counts) - counts
    ranks = np.arange(len(images)) - first[labels[images]]
    kept = np.zeros(len(labels), dtype=bool)
    kept[images[ranks < wanted[labels[images]]]] = True
    return kept


def _labelled(judged: Judged, kept: Mask) -> Filtered:
    """The models' class for the images kept."""
    labels = np.where(kept, judged.named, NO_LABEL)
    counts = class_counts(labels[kept], judged.posterior.shape[1])
    statistics = Statistics(float(kept.mean()), float(judged.agree.mean()), counts)
    return Filtered(labels, kept.astype(np.float32), statistics)


def _check(mass: NDArray[np.floating], n_classes: int, share: float) -> None:
    sound = mass.shape == (n_classes,) and (mass >= 0).all() and abs(mass.sum() - 1) < MASS_ERROR
    if not sound:
        raise InputError(
            f"got a class mass of shape {mass.shape} and sum {mass.sum():.3g}; wanted a share of "
            f"the images for each of {n_classes} classes, none negative, that sum to 1"
        )
    if not 0 < share <= 1:
        raise InputError(f"got a share of {share}; wanted more than 0, and 1 at most")
