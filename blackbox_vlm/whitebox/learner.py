"""One of the two models: an image tower of its own, a positive and a negative context, two phases.

Phase 1 trains the contexts and low-rank updates of the tower by L = L_cls + L_neg on seeds; phase 2
trains every weight of the tower, and the class vectors as a linear head, by L_cls on what the
other model let through. Both may add the contrastive term of CoFT+.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.coft import contrast
from blackbox_vlm.coft.contrast import Contrast
from blackbox_vlm.whitebox.lora import add_lora, merge_lora
from blackbox_vlm.whitebox.losses import cleanliness, negative_loss
from blackbox_vlm.whitebox.model import image_vectors
from blackbox_vlm.whitebox.prompts import ClassPrompts
from blackbox_vlm.whitebox.settings import WhiteBoxSettings
from blackbox_vlm.whitebox.views import random_views, whole_pictures

IMAGES_AT_ONCE = 8  # judged together; more would leave the allocator's reusable memory

Tick = Callable[[], None]  # called after every step; may raise to end the training


class Sides(NamedTuple):
    """Sides in pixels of training views and of the whole pictures that are judged."""

    train: int
    judge: int


class Schedule(NamedTuple):
    """So many steps, at a rate that falls to zero along half a cosine."""

    steps: int
    rate: float

    def rate_at(self, step: int) -> float:
        return self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2


class Scores(NamedTuple):
    """s+ and s- of images, each (n, C) on the CPU; without a negative prompt s- is s+."""

    positive: Tensor
    negative: Tensor

    def clean(self, labels: Tensor) -> Tensor:
        """Cleanliness (n,) of labels (n,)."""
        return cleanliness(self.positive, self.negative, labels)


@dataclass(slots=True)
class Learner:
    """A model in training.

    Attributes:
        visual: the image tower, in evaluation mode.
        prompts: of the classes.
        positive: (M, width) the positive context.
        negative: (M, width) the negative one; None: there is none.
        head: (C, d) class vectors that phase 2 has trained; None: those of the positive context.
        sides: of pictures.
        generator: of everything random: views, order, first values.
    """

    visual: nn.Module
    prompts: ClassPrompts
    positive: nn.Parameter
    negative: nn.Parameter | None
    head: nn.Parameter | None
    sides: Sides
    generator: torch.Generator

    def class_vectors(self) -> Tensor:
        """(C, d) unit vectors that s+ is the similarity to."""
        if self.head is not None:
            return F.normalize(self.head, dim=-1)
        return self.prompts.class_vectors(self.positive)

    @torch.no_grad()
    def judge(self, pixels: Tensor) -> Scores:
        """The scores of whole pictures (n, 3, s, s)."""
        model = self.prompts.model
        vectors = encode_pixels(self.visual, pixels, self.sides.judge, model.device)
        positive = model.logit_scale * vectors @ self.class_vectors().T
        if self.negative is None:
            return Scores(positive.cpu(), positive.cpu())
        against = self.prompts.class_vectors(self.negative)
        return Scores(positive.cpu(), (model.logit_scale * vectors @ against.T).cpu())


@torch.no_grad()
def encode_pixels(visual: nn.Module, pixels: Tensor, side: int, device: torch.device) -> Tensor:
    """Unit vectors (n, d), on the device, of whole pictures (n, 3, s, s) at that side."""
    places = range(0, len(pixels), IMAGES_AT_ONCE)
    parts = (pixels[at : at + IMAGES_AT_ONCE].to(device) for at in places)
    return torch.cat([image_vectors(visual, whole_pictures(part, side)) for part in parts])


def new_learner(
    prompts: ClassPrompts, settings: WhiteBoxSettings, sides: Sides, seed: int
) -> Learner:
    """A learner that judges as zero-shot does, but for the noise in its contexts."""
    generator = torch.Generator().manual_seed(seed)
    contexts = [prompts.new_context(settings.context_noise, generator) for _ in range(2)]
    return Learner(
        visual=copy.deepcopy(prompts.model.visual),
        prompts=prompts,
        positive=contexts[0],
        negative=contexts[1] if settings.negative else None,
        head=None,
        sides=sides,
        generator=generator,
    )


def phase_1(
    learner: Learner,
    pixels: Tensor,
    labels: Tensor,
    sure: Tensor,
    settings: WhiteBoxSettings,
    tick: Tick,
) -> None:
    """Tune contexts and low-rank updates on the images that have a label, then merge the updates.

    Args:
        learner: is changed.
        pixels: (n, 3, s, s).
        labels: (n,) seeds, -1 elsewhere.
        sure: (n,) True where the label was given and no seed.
        settings: of the run.
        tick: called after every step.
    """
    updates = add_lora(learner.visual, settings.rank, settings.adapted_share, learner.generator)
    contexts = [c for c in (learner.positive, learner.negative) if c is not None]
    warm = round(settings.warm_up * settings.phase_1_steps)

    def loss(step: int, vectors: Tensor, given: Tensor, places: Tensor) -> Tensor:
        trusted = sure[places].to(given.device) | (step < warm)
        return dual_loss(learner, vectors, given, trusted, settings)

    schedule = Schedule(settings.phase_1_steps, settings.phase_1_rate)
    _train(learner, [*updates, *contexts], schedule, pixels, labels, settings, loss, tick)
    merge_lora(learner.visual)


def phase_2(
    learner: Learner, pixels: Tensor, labels: Tensor, settings: WhiteBoxSettings, tick: Tick
) -> None:
    """Tune every weight of the tower and the head on filtered labels (n,), -1 elsewhere."""
    learner.head = nn.Parameter(learner.class_vectors().detach().clone())
    learner.visual.requires_grad_(True)
    weights = [*learner.visual.parameters(), learner.head]
    scale = learner.prompts.model.logit_scale

    def loss(step: int, vectors: Tensor, given: Tensor, places: Tensor) -> Tensor:
        return F.cross_entropy(scale * vectors @ learner.class_vectors().T, given)

    schedule = Schedule(settings.phase_2_steps, settings.phase_2_rate)
    _train(learner, weights, schedule, pixels, labels, settings, loss, tick)
    learner.visual.requires_grad_(False)


def dual_loss(
    learner: Learner, vectors: Tensor, labels: Tensor, trusted: Tensor, settings: WhiteBoxSettings
) -> Tensor:
    """L_cls + weight * L_neg of a batch (DeFT); see `losses`.

    Args:
        learner: whose contexts are meant.
        vectors: (b, d) of the images, with gradients.
        labels: (b,).
        trusted: (b,) True where a label counts as clean whatever the negative prompt says. Of the
            others, L_cls is of the clean ones only, and L_neg affirms corrected labels.
        settings: of the run.
    """
    scale = learner.prompts.model.logit_scale
    positive = scale * vectors @ learner.class_vectors().T
    losses = F.cross_entropy(positive, labels, reduction="none")
    if learner.negative is None:
        return losses.mean()
    seen = vectors if settings.negative_reaches_visual else vectors.detach()
    negative = scale * seen @ learner.prompts.class_vectors(learner.negative).T
    clean = cleanliness(positive.detach(), negative.detach(), labels) > settings.clean_above
    clean = clean | trusted
    affirmed = torch.where(clean, labels, positive.argmax(dim=1))
    against = negative_loss(
        positive, negative, labels, affirmed, settings.complementary_temperature
    )
    kept = (losses * clean).sum() / clean.sum().clamp(min=1)
    return kept + settings.negative_weight * against.mean()


def _train(
    learner: Learner,
    parameters: Sequence[nn.Parameter],
    schedule: Schedule,
    pixels: Tensor,
    labels: Tensor,
    settings: WhiteBoxSettings,
    loss_of: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    tick: Tick,
) -> None:
    """AdamW over batches of random views; `loss_of` a step, vectors, labels and places."""
    device = learner.prompts.model.device
    optimizer = torch.optim.AdamW(parameters, schedule.rate, weight_decay=settings.weight_decay)
    follower = _Follower(learner.visual, settings) if settings.contrast_weight else None
    batches = _batches(labels, settings.batch_size, learner.generator)
    for step in range(schedule.steps):
        chosen = next(batches)
        given, shown = labels[chosen].to(device), pixels[chosen].to(device)
        vectors = image_vectors(
            learner.visual, random_views(shown, learner.sides.train, learner.generator)
        )
        loss = loss_of(step, vectors, given, chosen)
        if follower:
            other = random_views(shown, learner.sides.train, learner.generator)
            loss = loss + settings.contrast_weight * follower.loss(vectors, other, given)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = schedule.rate_at(step)
        optimizer.step()
        tick()


class _Follower:
    """The momentum encoder of what is trained in a tower, and its queue."""

    def __init__(self, visual: nn.Module, settings: WhiteBoxSettings) -> None:
        self._visual, self._settings = visual, settings
        self._trained = {n: p for n, p in visual.named_parameters() if p.requires_grad}
        self._state: Contrast | None = None

    def loss(self, queries: Tensor, other: Tensor, labels: Tensor) -> Tensor:
        """The supervised contrast of a batch with its other views; then the keys join the queue."""
        settings = self._settings
        now = tuple(self._trained.values())
        state = self._state or contrast.init(now, queries.shape[1])
        state = contrast.follow(state, now, settings.momentum)
        keys = self._encode(state, other)
        loss = contrast.supervised(
            queries,
            labels,
            torch.cat([keys, state.queue]),
            torch.cat([labels, state.labels]),
            settings.contrast_temperature,
        )
        self._state = contrast.enqueue(state, keys, labels, settings.queue)
        return loss

    @torch.no_grad()
    def _encode(self, state: Contrast, pixels: Tensor) -> Tensor:
        keys = dict(zip(self._trained, state.keys, strict=True))
        output = functional_call(self._visual, keys, (pixels,))
        return F.normalize((output[0] if isinstance(output, tuple) else output).float(), dim=-1)


def _batches(labels: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Places of labelled images, each once before any comes again."""
    [places] = torch.where(labels != NO_LABEL)
    waiting = places[:0]
    while True:
        while len(waiting) < size:
            order = torch.randperm(len(places), generator=generator)
            waiting = torch.cat([waiting, places[order]])
        yield waiting[:size]
        waiting = waiting[size:]
