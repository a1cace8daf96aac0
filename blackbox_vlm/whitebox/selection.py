"""Which pseudo-labels to learn from: seeds for phase 1, and what the other model lets through.

Without labels nobody knows how many images a class has. A zero-shot classifier's own mean posterior
says more about its bias than about the classes, so that the bias is taken off first; the mass of a
class is then the mean of what is left, and where masses differ much, so do the seeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blackbox_vlm.backend import NO_LABEL


def evened(logits: Tensor, share: float) -> Tensor:
    """Logits (n, C) less a share of their mean over the images: what a class has of every image,
    it has by its text and not by what the image shows (as `coft.mass.evening`)."""
    return logits - share * logits.mean(dim=0)


def class_counts(posterior: Tensor, long_tail_above: float) -> Tensor:
    """Expected images (C,) of every class: equal, unless the class masses differ too much.

    Args:
        posterior: (n, C).
        long_tail_above: largest over smallest mean posterior from which on the masses count.
    """
    mass = posterior.mean(dim=0)
    if mass.max() <= long_tail_above * mass.min():
        mass = torch.full_like(mass, 1 / len(mass))
    return mass * len(posterior)


def seeds(posterior: Tensor, counts: Tensor, share: float, fewest: int) -> Tensor:
    """Labels (n,) int64 of the most confident images of each class; -1 where there is none.

    Args:
        posterior: (n, C).
        counts: (C,) expected images of each class.
        share: of them, that are taken.
        fewest: of a class, where so many images look most like it.
    """
    confidence, guesses = posterior.max(dim=1)
    labels = torch.full_like(guesses, NO_LABEL)
    for label, count in enumerate((share * counts).round().long().clamp(min=fewest).tolist()):
        [members] = torch.where(guesses == label)
        best = confidence[members].argsort(descending=True, stable=True)[:count]
        labels[members[best]] = label
    return labels


def with_known(labels: Tensor, known: Tensor) -> Tensor:
    """Pseudo-labels, but the given ones where there are such."""
    return torch.where(known != NO_LABEL, known, labels)


def filtered(labels: Tensor, clean: Tensor, above: float, floor: float) -> Tensor:
    """Labels (n,) that are kept, -1 elsewhere: those cleaner than a bar, or at least a share.

    Args:
        labels: (n,).
        clean: (n,) cleanliness of each.
        above: the bar.
        floor: share of the images that is kept at least, the cleanest ones.
    """
    fewest = max(1, round(floor * len(labels)))
    bar = clean.sort(descending=True).values[fewest - 1]
    return torch.where((clean > above) | (clean >= bar), labels, NO_LABEL)
