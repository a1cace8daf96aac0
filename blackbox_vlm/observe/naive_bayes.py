"""Naive Bayes on votes: what an answer of a label endpoint is worth as evidence for every class.

    logits_c = sum over the questions of log P(vote | c) / P(vote)

after Dawid & Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM
Algorithm", Applied Statistics 28 (1979): an observer, here a question, is known by its confusion
matrix. Ours has seen true labels, so that the matrix is counted, no EM is needed, and the sum is
linear in the votes. Few images per class leave most counts at zero; they are drawn (Dirichlet)
towards what would be expected of a question that says nothing of the classes, and for the first
question, which lists the classes themselves, towards "the vote is right" as often as it is on the
labelled images.

`SMOOTHING`, `DOUBT` and `SETTLED` were chosen on the training images of the development sets that
`choose.py` names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.observe.heads import (
    Doubles,
    Floats,
    Labels,
    Linear,
    Seen,
    as_float32,
    class_counts,
    even_out,
)

CONFIDENCE = 0.9  # what a bare label is worth as a probability, before any is checked
DOUBT = 5.0  # how many images that is worth
SMOOTHING = 16.0  # of a class's confusions, in images
SETTLED = 8  # questions that count in full; more of them repeat one another


def fit(seen: Seen, labels: Labels, *, sizes: Sequence[int]) -> Linear:
    """Evidence as a head.

    Args:
        seen: the features are the votes as they are, one-hot, `(n, K)`; see `votes.encode_votes`.
        labels: `(n,)`.
        sizes: how many texts each question lists, K in all; the first lists the classes.
    """
    n_classes = seen.zero_shot.shape[1]
    table = evidence(seen.features, labels, sizes, n_classes)
    table[n_classes:] *= weight(len(sizes))
    return Linear(as_float32(table), np.zeros(n_classes, dtype=np.float32), as_float32(0))


def evidence(votes: Floats, labels: Labels, sizes: Sequence[int], n_classes: int) -> Doubles:
    """`log P(vote | class) / P(vote)` of every text that a question lists, `(K, C)`."""
    starts = np.cumsum([0, *sizes[:-1]])

    def total(rows: NDArray[np.float64]) -> Doubles:
        """The sum over the texts of its question, for every row."""
        sums: Doubles = np.repeat(np.add.reduceat(rows, starts, axis=0), sizes, axis=0)
        return sums

    counts = votes.T.astype(np.float64) @ np.eye(n_classes)[labels]
    heard = counts.sum(axis=1, keepdims=True)
    share = (heard + 1) / (total(heard) + np.repeat(sizes, sizes)[:, None])
    expected = np.tile(share, n_classes)
    right = confidence(float(np.trace(counts[:n_classes])), float(counts[:n_classes].sum()))
    expected[:n_classes] *= np.exp(margin(right, n_classes) * np.eye(n_classes))
    expected /= total(expected)
    table: Doubles = np.log((counts + SMOOTHING * expected) / (total(counts) + SMOOTHING) / share)
    table[n_classes:] = even_out(table[n_classes:], class_counts(labels, n_classes) > 0)
    return table


def weight(n_questions: int) -> float:
    """Of the evidence of every question but the first: many are not independent of one another."""
    return float(min(1.0, np.sqrt(SETTLED / max(n_questions - 1, 1))))


def confidence(hits: float, n_images: float) -> float:
    """The probability that a bare label is right, where it was for `hits` of `n_images`.

    Nothing is fitted to these images, so that this measurement on them is an honest one.
    """
    return (hits + DOUBT * CONFIDENCE) / (n_images + DOUBT)


def margin(right: float, n_classes: int) -> float:
    """How far the logit of a named class is above the others', at a probability of being right.

    Not below zero: a label that is wrong more often than chance is ignored, not turned round.
    """
    return float(max(np.log(right / (1 - right) * (n_classes - 1)), 0.0))
