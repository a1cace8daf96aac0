"""White-box CoFT and CoFT+ (Wang et al., arXiv 2602.04337): tuning without labels, on the weights.

Two models, each a copy of the image tower with a positive and a negative prompt, start from
zero-shot pseudo-labels. Phase 1 tunes contexts and low-rank updates on the most confident images of
each class (`learner.phase_1`). Then both judge every image; a pseudo-label is the class of their
mean posterior, and phase 2 tunes all weights of each tower on the labels that the *other* model's
negative prompt calls clean (`learner.phase_2`): what was no seed is recovered there, under a label
that may be a new one. Predictions are the mean of both posteriors. CoFT+ repeats phase 1 with
refreshed pseudo-labels and more of them, adds a contrastive term, and averages the class texts with
descriptions.

From the abstract: dual prompts without a threshold set by hand, L_neg that regularises the visual
adaptation, two phases, collaborative filtering, the three parts of CoFT+. From DeFT's public code:
the losses. Ours, where both are silent: `settings`, and that classes are evened out (`selection`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.errors import InputError, Interrupted
from blackbox_vlm.images import Image
from blackbox_vlm.prompts.templates import prompts as texts_of
from blackbox_vlm.whitebox import selection
from blackbox_vlm.whitebox.learner import (
    Learner,
    Scores,
    Sides,
    encode_pixels,
    new_learner,
    phase_1,
    phase_2,
)
from blackbox_vlm.whitebox.model import WhiteBox, side_for, text_vectors
from blackbox_vlm.whitebox.prompts import class_prompts
from blackbox_vlm.whitebox.settings import COFT, WhiteBoxSettings
from blackbox_vlm.whitebox.views import load_pixels

Labels = NDArray[np.int64]
Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


class Stage(NamedTuple):
    """What was believed of the training images after a stage; a belief is no accuracy.

    Attributes:
        name: "zero-shot", "phase 1, round R" or "phase 2".
        posterior: (n, C) float32, mean of the models.
        learnt_from: number of images that each model's stage was trained on.
    """

    name: str
    posterior: NDArray[np.float32]
    learnt_from: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WhiteBoxCoft:
    """What training made.

    Attributes:
        model: the untouched one.
        learners: the tuned ones.
        biases: (C,) for each learner, what is taken off its logits.
        stages: the history.
    """

    model: WhiteBox
    learners: tuple[Learner, ...]
    biases: tuple[Tensor, ...]
    stages: tuple[Stage, ...]

    def logits(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Logarithms of the mean posterior, (n, C).

        Raises:
            InputError: there are no images, or one cannot be read.
        """
        pixels = load_pixels(images, self.model.preprocess)
        scores = [learner.judge(pixels).positive for learner in self.learners]
        evened = torch.stack([s - b for s, b in zip(scores, self.biases, strict=True)])
        mean: NDArray[np.float32] = evened.softmax(dim=-1).mean(dim=0).log().numpy()
        return mean


def train(
    model: WhiteBox,
    images: Sequence[Image],
    class_names: Sequence[str],
    template: str,
    settings: WhiteBoxSettings = COFT,
    *,
    labels: Labels | None = None,
    descriptions: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> WhiteBoxCoft:
    """Tune copies of a model on images, most or all of them without labels.

    Args:
        model: is not changed.
        images: n of them; each is decoded once, and kept as 0.3 MB at a side of 224.
        class_names: C of them.
        template: with one "{}" for the class name.
        settings: COFT, COFT_PLUS or changed ones.
        labels: (n,) int64, -1 where an image has none; None: none has.
        descriptions: more texts for every class (CoFT+; CuPL's format).
        seed: of everything random.
        progress: told after every step.
        should_stop: asked after every step; True ends with `Interrupted`.

    Raises:
        InputError: the labels do not fit the images, there are fewer images than classes, an image
            cannot be read, or a text is too long.
        Interrupted: as asked.
    """
    known = _known(labels, len(images), len(class_names))
    rows = texts_of(class_names, [template], descriptions)
    texts = torch.stack([text_vectors(model, row.texts) for row in rows])
    anchors = texts[1:].mean(dim=0) if len(rows) > 1 else None
    prompts = class_prompts(model, class_names, template, settings.context_tokens, anchors)
    pixels = load_pixels(images, model.preprocess)
    side = pixels.shape[-1]
    sides = Sides(*(side_for(model, s, side) for s in (settings.train_size, settings.judge_size)))
    pair = [new_learner(prompts, settings, sides, seed * 2 + m) for m in range(settings.models)]
    run = _Run(pair, pixels, known, settings, progress, should_stop)
    return run.stages_from(model, zero_shot(model, pixels, texts))


def zero_shot(model: WhiteBox, pixels: Tensor, texts: Tensor) -> Tensor:
    """Logits (n, C) of pictures (n, 3, side, side) under the mean of texts.

    Args:
        model: any.
        pixels: as `load_pixels` makes them.
        texts: (rows, C, d) unit vectors, each row of one text per class.
    """
    classes = F.normalize(texts.mean(dim=0), dim=-1)
    vectors = encode_pixels(model.visual, pixels, pixels.shape[-1], model.device)
    return (model.logit_scale * vectors @ classes.T).cpu()


@dataclass(slots=True)
class _Run:
    """The stages in turn, and what they share."""

    pair: list[Learner]
    pixels: Tensor
    known: Tensor
    settings: WhiteBoxSettings
    progress: Progress
    should_stop: Callable[[], bool]
    stages: list[Stage] = field(default_factory=list)

    def stages_from(self, model: WhiteBox, logits: Tensor) -> WhiteBoxCoft:
        """Everything, from zero-shot logits (n, C) on."""
        judged = [Scores(logits, logits)]
        posterior = self._believed("zero-shot", judged, [])
        for turn in range(self.settings.rounds):
            labels = self._seeds(posterior, turn)
            judged = self._after_phase_1(f"phase 1, round {turn + 1}", labels)
            posterior = self._believed(f"phase 1, round {turn + 1}", judged, labels)
        if self.settings.full_tuning:
            labels = collaborate(judged, posterior, self.known, self.settings)
            judged = self._after_phase_2(labels)
            self._believed("phase 2", judged, labels)
        biases = tuple(self.settings.evening * scores.positive.mean(dim=0) for scores in judged)
        return WhiteBoxCoft(model, tuple(self.pair), biases, tuple(self.stages))

    def _seeds(self, posterior: Tensor, turn: int) -> list[Tensor]:
        """The labels (n,) of a round of phase 1, the same for each model."""
        settings = self.settings
        share = min(1.0, settings.seed_share + turn * settings.share_growth)
        counts = selection.class_counts(posterior, settings.long_tail_above)
        seeds = selection.seeds(posterior, counts, share, settings.fewest_seeds)
        return [selection.with_known(seeds, self.known)] * len(self.pair)

    def _after_phase_1(self, stage: str, labels: Sequence[Tensor]) -> list[Scores]:
        """Each model after a round on its seeds (n,), judging all images."""
        sure = self.known != NO_LABEL
        for index, (learner, given) in enumerate(zip(self.pair, labels, strict=True), start=1):
            tick = self._ticker(f"{stage}, model {index}", self.settings.phase_1_steps)
            phase_1(learner, self.pixels, given, sure, self.settings, tick)
        return [learner.judge(self.pixels) for learner in self.pair]

    def _after_phase_2(self, labels: Sequence[Tensor]) -> list[Scores]:
        """Each model after phase 2 on its filtered labels (n,), judging all images."""
        for index, (learner, given) in enumerate(zip(self.pair, labels, strict=True), start=1):
            tick = self._ticker(f"phase 2, model {index}", self.settings.phase_2_steps)
            phase_2(learner, self.pixels, given, self.settings, tick)
        return [learner.judge(self.pixels) for learner in self.pair]

    def _believed(self, stage: str, judged: Sequence[Scores], labels: Sequence[Tensor]) -> Tensor:
        """The mean posterior (n, C), which is noted with the sizes of what was learnt from."""
        evened = [selection.evened(scores.positive, self.settings.evening) for scores in judged]
        posterior = torch.stack([logits.softmax(dim=1) for logits in evened]).mean(dim=0)
        sizes = tuple(int((given != NO_LABEL).sum()) for given in labels)
        self.stages.append(Stage(stage, posterior.numpy(), sizes))
        return posterior

    def _ticker(self, stage: str, total: int) -> Callable[[], None]:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            self.progress(stage, done, total)
            if self.should_stop():
                raise Interrupted(f"stopped in {stage} after {done} of {total} steps")

        return tick


def collaborate(
    judged: Sequence[Scores], posterior: Tensor, known: Tensor, settings: WhiteBoxSettings
) -> list[Tensor]:
    """The labels (n,) that each model learns from in phase 2: those that the other calls clean.

    Args:
        judged: the scores of each model.
        posterior: (n, C) mean of the models.
        known: (n,) given labels, which nobody doubts; -1 where there is none.
        settings: of the run.
    """
    labels = selection.with_known(posterior.argmax(dim=1), known)
    if not (settings.filtering and settings.negative):
        return [labels] * len(judged)
    above, floor = settings.clean_above, settings.coverage_floor
    passed = [selection.filtered(labels, s.clean(labels), above, floor) for s in judged]
    others = [passed[(index + 1) % len(passed)] for index in range(len(passed))]
    return [selection.with_known(other, known) for other in others]


def _known(labels: Labels | None, n_images: int, n_classes: int) -> Tensor:
    if n_images < n_classes:
        raise InputError(
            f"got {n_images} images for {n_classes} classes; wanted at least one image per class"
        )
    if labels is None:
        return torch.full((n_images,), NO_LABEL)
    given = np.asarray(labels)
    if given.shape != (n_images,) or given.dtype.kind not in "iu":
        raise InputError(
            f"got labels of shape {given.shape} and type {given.dtype}; wanted whole numbers of "
            f"shape ({n_images},), -1 where an image has none"
        )
    if not NO_LABEL <= given.min() <= given.max() < n_classes:
        raise InputError(
            f"got labels from {given.min()} to {given.max()}; wanted -1 (none) to {n_classes - 1}"
        )
    return torch.from_numpy(given.astype(np.int64))
