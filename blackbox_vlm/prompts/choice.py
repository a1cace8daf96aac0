"""Which text prompts to deploy, the own one, the best or a mixture, judged out-of-fold (ours).

The best of many prompts looks better than it is on the images that it was chosen by. So each choice
is made again on a part of the images and judged on the others; the task's own template, which
nobody chose, is kept unless another is better by a standard error: those that are judged here have
won a race on the same images already.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.craft.guard import stratified_folds
from blackbox_vlm.observe.calibration import calibrate
from blackbox_vlm.observe.choose import ZERO_SHOT, Choice
from blackbox_vlm.observe.pooling import scaled_loss
from blackbox_vlm.prompts.mixture import fit_mixture, mix
from blackbox_vlm.scores import clearly_positive, predicted

BEST, MIXTURE = "text prompt", "text prompts"
FOLDS = 4

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


def choose_prompts(
    logits: Floats, labels: Labels, *, seed: int, costly: bool = False
) -> tuple[Floats, Choice]:
    """Weights of prompts, and the evidence.

    Args:
        logits: of each prompt, the task's own first, `(M, n, C)`.
        labels: `(n,)`.
        seed: of the folds.
        costly: whether each prompt of a mixture is another query per prediction, so that it must
            be better by a standard error.

    Returns:
        `(M,)` float32 of sum 1, and the choice among "zero-shot", "text prompt" and "text prompts".
        Where no class has a second image, the own prompt or the mean of all, whichever fits
        better: neither was fitted to these images.
    """
    everything = _fit(logits, labels)
    folds = int(min(FOLDS, np.bincount(labels).max()))
    if folds < 2:
        return _unfitted(logits, labels, everything, costly=costly)
    fold_of = stratified_folds(labels, folds, seed)
    shown = {name: np.empty_like(logits[0]) for name in everything}
    for fold in range(folds):
        held = fold_of == fold
        for name, weights in _fit(logits[:, ~held], labels[~held]).items():
            shown[name][held] = mix(weights, logits[:, held])
    choice = _judge(shown, labels, seed, costly=costly)
    return everything[choice.chosen], choice


def choose_weights(logits: Floats, labels: Labels, *, seed: int) -> Floats:
    """The weights that `choose_prompts` settles on, `(M,)`."""
    return choose_prompts(logits, labels, seed=seed)[0]


def _fit(logits: Floats, labels: Labels) -> dict[str, Floats]:
    """The weights of each way to choose prompts."""
    single = np.eye(len(logits), dtype=np.float32)
    losses = [scaled_loss(of_prompt, labels) for of_prompt in logits]
    return {
        ZERO_SHOT: single[0],
        BEST: single[int(np.argmin(losses))],
        MIXTURE: fit_mixture(logits, labels),
    }


def _unfitted(
    logits: Floats, labels: Labels, weights: Mapping[str, Floats], *, costly: bool
) -> tuple[Floats, Choice]:
    mean = np.full(len(logits), 1 / len(logits), dtype=np.float32)
    better = scaled_loss(mix(mean, logits), labels) < scaled_loss(logits[0], labels)
    better &= not costly
    chosen = MIXTURE if better else ZERO_SHOT
    choice = Choice(chosen, {}, {}, {ZERO_SHOT: logits[0]}, len(labels), None)
    return (mean if better else weights[ZERO_SHOT]), choice


def _judge(shown: Mapping[str, Floats], labels: Labels, seed: int, *, costly: bool) -> Choice:
    right = {name: predicted(values) == labels for name, values in shown.items()}
    accuracy = {name: float(images.mean()) for name, images in right.items()}
    loss = {name: scaled_loss(values, labels) for name, values in shown.items()}
    chosen = ZERO_SHOT
    for name in (BEST, MIXTURE):
        if chosen == BEST and not costly:
            better = loss[name] < loss[chosen]
        else:
            better = clearly_positive(right[name].astype(np.float64) - right[chosen])
        chosen = name if better else chosen
    calibration = calibrate(shown[chosen], labels, seed=seed)
    return Choice(chosen, accuracy, loss, dict(shown), len(labels), calibration)
