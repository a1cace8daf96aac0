"""CoFT's dual prompt: a positive and a negative prompt say together whether a label is clean.

Wang, Meng, Cai, Song, Xia: "Fine-tuning Pre-trained Vision-Language Models in a
Human-Annotation-Free Manner", arXiv 2602.04337. Its abstract asks for prompts that "model
pseudo-label cleanliness" per sample, without a threshold chosen by hand, and for a negative prompt
that also regularises a light visual adapter. The losses are those of its parent, DeFT: Wei, Li,
Li, Shi, Li, Zhang, "Vision-Language Models are Strong Noisy Label Detectors", NeurIPS 2024, arXiv
2409.19696, with s+ and s- for an image's logits under the two prompts:

    p_yes(i, c) = exp s+_ic / (exp s+_ic + exp s-_ic),   p_no = 1 - p_yes                        (1)
    p_clean(i) = p_yes(i, y_i)                                                                   (2)
    L_neg = -log p_no(i, complement of y_i) - log p_yes(i, y_i)                                  (3)
    L = CE(s+_i, y_i) + weight L_neg                                                             (4)

In (3) the s+ are constants. After a warm-up, labels that are not clean (2) are corrected there to
the class of largest s+. In DeFT (3) moves the negative prompt alone; in CoFT the adapter too.

On a black box no prompt's gradient is to be had, so both prompts are local, on cached features x
(ours, as is all below):

    h = x + relu(x A + a) B,   s+ = z + h W+ + b+,   s- = others(z) + h W- + b-                  (5)

The logits z that tuning starts from are the endpoint's, or refined ones, times a prior weight;
B, W and b start at zero, so that s+ starts from z. Had s- started there too, every label would be
clean by a half, and what the endpoint knows would cancel in (2). `others(z)` is the log of the
other classes' summed exponentials, and p_clean starts from `softmax(z)` of the label.

DeFT draws one complementary label, uniformly, which is nearly blind to what a vision-language model
confuses. Here the expectation over all takes its place, weighted by `softmax(s+ / temperature)`:
hard ones count more, and nothing is drawn. An infinite temperature is DeFT's uniform draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.heads import Floats, Labels, Seen

BLOCK = 4096  # images that are predicted at a time


@dataclass(frozen=True, slots=True)
class DualSettings:
    """How dual prompts are trained; chosen on the development sets (see observe/choose.py)."""

    prior: float = 2.0  # weight of the logits that tuning starts from
    hidden: int = 64  # of the adapter
    negative_weight: float = 1.0  # of L_neg; 0: no negative prompt
    regularize: bool = True  # L_neg reaches the adapter: CoFT; else DeFT
    temperature: float = 5.0  # of the complementary labels; inf: uniform, as DeFT
    warm_up: float = 0.2  # of the steps; before, no label is corrected
    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 1e-2  # AdamW's; falls to zero along a cosine
    weight_decay: float = 3.0  # weaker decay learns the wrong labels by heart


class Dual(NamedTuple):
    """The parameters of (5), and the weight of the prior, which is not learned."""

    inner_weight: Tensor  # A (d, r)
    inner_bias: Tensor  # a (r,)
    outer_weight: Tensor  # B (r, d)
    positive_weight: Tensor  # W+ (d, C)
    positive_bias: Tensor  # b+ (C,)
    negative_weight: Tensor  # W- (d, C)
    negative_bias: Tensor  # b- (C,)
    prior: Tensor  # ()


class Batch(NamedTuple):
    """Images with pseudo-labels."""

    features: Tensor  # (b, d)
    zero_shot: Tensor  # (b, C)
    labels: Tensor  # (b,) int64, one for each
    weights: Tensor  # (b,), not negative


def init(
    n_features: int, n_classes: int, settings: DualSettings, generator: torch.Generator
) -> Dual:
    """Parameters under which s+ and s- are what the prior says; A is uniform in -1 to 1.

    As features have a mean squared length of 1, the units of `x A` have a mean square of 1/3,
    however many features there are.
    """
    inner = torch.empty(n_features, settings.hidden).uniform_(-1, 1, generator=generator)
    return Dual(
        inner,
        torch.zeros(settings.hidden),
        torch.zeros(settings.hidden, n_features),
        torch.zeros(n_features, n_classes),
        torch.zeros(n_classes),
        torch.zeros(n_features, n_classes),
        torch.zeros(n_classes),
        torch.tensor(settings.prior),
    )


def adapted(dual: Dual, features: Tensor) -> Tensor:
    """h of (5), `(b, d)`."""
    hidden = torch.relu(features @ dual.inner_weight + dual.inner_bias)
    return features + hidden @ dual.outer_weight


def prompted(
    dual: Dual, features: Tensor, zero_shot: Tensor, *, regularize: bool = True
) -> tuple[Tensor, Tensor]:
    """s+ and s- of (5), `(b, C)` each; without `regularize`, s- has no gradient in the adapter."""
    start = dual.prior * zero_shot
    h = adapted(dual, features)
    positive = start + h @ dual.positive_weight + dual.positive_bias
    seen = h if regularize else h.detach()
    negative = others(start) + seen @ dual.negative_weight + dual.negative_bias
    return positive, negative


def others(logits: Tensor) -> Tensor:
    """For every class, the log of the other classes' summed exponentials, `(b, C)`."""
    shares = logits.softmax(dim=1).clamp(max=1 - 1e-6)  # else the others' may round to nothing
    return logits.logsumexp(dim=1, keepdim=True) + torch.log1p(-shares)


def p_clean(positive: Tensor, negative: Tensor, labels: Tensor) -> Tensor:
    """The probability that a label is clean (2), `(b,)`."""
    return _of(positive - negative, labels).sigmoid()


def complements(positive: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """How much each class counts as a complementary label, `(b, C)`; the label itself does not."""
    hardness = positive / temperature
    return hardness.scatter(1, labels[:, None], -torch.inf).softmax(dim=1)


def corrected(positive: Tensor, negative: Tensor, labels: Tensor) -> Tensor:
    """The labels that are clean, and the best class of the others, `(b,)`."""
    clean = p_clean(positive, negative, labels) > 0.5
    return torch.where(clean, labels, positive.argmax(dim=1))


def positive_loss(positive: Tensor, batch: Batch) -> Tensor:
    """The first term of (4), a scalar."""
    return _mean(cross_entropy(positive, batch.labels, reduction="none"), batch.weights)


def negative_loss(
    positive: Tensor, negative: Tensor, batch: Batch, *, temperature: float, correct: bool
) -> Tensor:
    """L_neg (3), a scalar without gradient in `positive`."""
    fixed = positive.detach()
    wanted = corrected(fixed, negative.detach(), batch.labels) if correct else batch.labels
    margin = fixed - negative
    wrong = complements(fixed, batch.labels, temperature)
    losses = -(wrong * logsigmoid(-margin)).sum(dim=1) - logsigmoid(_of(margin, wanted))
    return _mean(losses, batch.weights)


def dual_loss(dual: Dual, batch: Batch, settings: DualSettings, *, correct: bool) -> Tensor:
    """L of (4), a scalar."""
    positive, negative = prompted(
        dual, batch.features, batch.zero_shot, regularize=settings.regularize
    )
    loss = positive_loss(positive, batch)
    if not settings.negative_weight:
        return loss
    return loss + settings.negative_weight * negative_loss(
        positive, negative, batch, temperature=settings.temperature, correct=correct
    )


def train(seen: Seen, labels: Labels, weights: Floats, settings: DualSettings, seed: int) -> Dual:
    """Train the dual prompts and the adapter on the images that have a pseudo-label.

    Args:
        seen: all images; the features have a mean squared length of 1. Memory beyond them does not
            depend on their number.
        labels: `(n,)` pseudo-labels; `NO_LABEL` where an image is not learned from.
        weights: `(n,)` of the images in both losses.
        settings: of the training.
        seed: of the adapter's first layer and of the order of the images.

    Raises:
        InputError: labels or weights that do not fit, or no label at all.
    """
    check(seen, labels, weights)
    generator = torch.Generator().manual_seed(seed)
    start = init(seen.features.shape[1], seen.zero_shot.shape[1], settings, generator)
    learned = [parameter.requires_grad_() for parameter in start[:-1]]
    dual = Dual._make([*learned, start.prior])
    optimizer = torch.optim.AdamW(
        learned, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    trusted = np.flatnonzero((labels != NO_LABEL) & (weights > 0))
    for step, rows in enumerate(_batches(trusted, settings, generator)):
        late = step >= settings.warm_up * settings.steps
        optimizer.zero_grad()
        batch = _batch(seen, labels, weights, rows)
        torch.autograd.backward(dual_loss(dual, batch, settings, correct=late))
        optimizer.step()
        schedule.step()
    return Dual(*(parameter.detach() for parameter in dual))


def check(seen: Seen, labels: Labels, weights: Floats) -> None:
    """Raise InputError where pseudo-labels or weights do not fit the images."""
    n, n_classes = seen.zero_shot.shape
    if labels.shape != (n,) or weights.shape != (n,):
        raise InputError(
            f"got labels {labels.shape} and weights {weights.shape} for {n} images: "
            "give one of each per image"
        )
    if n and (labels.min() < NO_LABEL or labels.max() >= n_classes):
        raise InputError(
            f"got pseudo-labels from {labels.min()} to {labels.max()}, wanted 0 to {n_classes - 1},"
            f" or {NO_LABEL} for an image that is not used"
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise InputError("got a weight that is negative or not finite: give a number from 0")
    if not ((labels != NO_LABEL) & (weights > 0)).any():
        raise InputError("no image has a pseudo-label with a weight: give at least one")


def predict(dual: Dual, seen: Seen) -> Floats:
    """s+ of all images, `(n, C)` float32."""
    logits = np.empty(seen.zero_shot.shape, dtype=np.float32)
    for rows, positive, _ in _said(dual, seen):
        logits[rows] = positive.numpy()
    return logits


def cleanliness(dual: Dual, seen: Seen, labels: Labels) -> Floats:
    """p_clean (2) of labels `(n,)`, of which every image has one, `(n,)` float32."""
    clean = np.empty(len(labels), dtype=np.float32)
    for rows, positive, negative in _said(dual, seen):
        clean[rows] = p_clean(positive, negative, torch.tensor(labels[rows])).numpy()
    return clean


def _said(dual: Dual, seen: Seen) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """s+ and s- of all images, in blocks."""
    for start in range(0, len(seen.features), BLOCK):
        rows = slice(start, start + BLOCK)
        shown = torch.tensor(seen.features[rows]), torch.tensor(seen.zero_shot[rows])
        yield rows, *prompted(dual, *shown)


def _batches(
    trusted: NDArray[np.int64], settings: DualSettings, generator: torch.Generator
) -> Iterator[NDArray[np.int64]]:
    """A mini-batch for every step; all images have their turn before one comes again."""
    size, order = min(settings.batch_size, len(trusted)), trusted[:0]
    for _ in range(settings.steps):
        if len(order) < size:
            order = trusted[torch.randperm(len(trusted), generator=generator).numpy()]
        yield order[:size]
        order = order[size:]


def _batch(seen: Seen, labels: Labels, weights: Floats, rows: NDArray[np.int64]) -> Batch:
    arrays = (seen.features, seen.zero_shot, labels, weights)
    return Batch(*(torch.from_numpy(array[rows]) for array in arrays))


def _of(values: Tensor, labels: Tensor) -> Tensor:
    """The label's value of each row, `(b,)`."""
    return values.gather(1, labels[:, None])[:, 0]


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (weights * losses).sum() / weights.sum()
