"""Votes as numbers: one-hot answers, and the endpoint's own logits read off them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.heads import Floats, Labels
from blackbox_vlm.observe.naive_bayes import confidence, margin

Votes = NDArray[np.int64]  # (n_images, n_questions) indices of texts; NO_LABEL is none of them


def encode_votes(votes: Votes, sizes: Sequence[int]) -> Floats:
    """Votes `(n, Q)` on questions of `sizes` texts as one-hot answers `(n, sum of sizes)`.

    `NO_LABEL` leaves the columns of its question at zero: it speaks for no class.

    Raises:
        InputError: another number of questions, or a vote for a text that was not offered.
    """
    if votes.ndim != 2 or votes.shape[1] != len(sizes):
        raise InputError(f"got votes {votes.shape}, wanted a column for each of {len(sizes)} lists")
    if (votes < -1).any() or (votes >= np.asarray(sizes)).any():
        raise InputError(f"a vote for a text that was not offered; the lists have {list(sizes)}")
    columns = [votes[:, [q]] == np.arange(size) for q, size in enumerate(sizes)]
    return np.hstack(columns).astype(np.float32)


def vote_readout(sizes: Sequence[int], n_classes: int, right: float) -> Floats:
    """How zero-shot logits are read from one-hot votes, `(sum of sizes, C)`.

    Args:
        sizes: texts of each question; the first lists the classes.
        n_classes: C.
        right: the probability that its vote is right, see `label_confidence`.
    """
    return margin(right, n_classes) * np.eye(sum(sizes), n_classes, dtype=np.float32)


def label_confidence(votes: Floats, labels: Labels) -> float:
    """The probability that a vote on the classes is right, from one-hot votes `(n, C)` on images.

    Nothing was fitted to these images, so that what is measured on them needs no folds.
    """
    hits = float(votes[np.arange(len(labels)), labels].sum())
    return confidence(hits, float(votes.sum()))


def question_columns(sizes: Sequence[int], questions: Sequence[int]) -> NDArray[np.int64]:
    """Where the votes on some of the questions stand among one-hot answers, in their order."""
    ends = np.cumsum(sizes)
    return np.concatenate([np.arange(ends[q] - sizes[q], ends[q]) for q in questions])
