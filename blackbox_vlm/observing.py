"""Asks through the meter what the heads learn from: images once, and the vectors of texts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.backend import Access
from blackbox_vlm.background import background_images
from blackbox_vlm.local_encoder import LocalEncoder, with_vectors
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import Floats, Logits, Question, ask, vector_readout
from blackbox_vlm.observe.bank import Pruning, prune
from blackbox_vlm.observe.features import Metric, fit_metric
from blackbox_vlm.observe.observation import Observation
from blackbox_vlm.plan import Plan, needs_canary
from blackbox_vlm.planner import text_requests, view_images
from blackbox_vlm.prompts.choice import choose_weights
from blackbox_vlm.scores import centred
from blackbox_vlm.task import Task


class Observed(NamedTuple):
    """What a pass brought.

    Attributes:
        question: what was asked about every image.
        observation: of the images, followed by their augmented views; its readout is the prior
            that the heads start from.
        owners: which image a row of it shows, `(n_rows,)` int64.
        readout: reads the endpoint's own prediction, under the task's own template.
        metric: under which the answers spread evenly; None: they are taken as they are.
        pruned: what leaving out texts for predictions cost; None where all are kept.
        n_answers: what the endpoint answered about an image; a local encoder's numbers follow.
        noise: the largest difference between two answers to one question; None if not asked.
    """

    question: Question
    observation: Observation
    owners: NDArray[np.int64]
    readout: Floats
    n_answers: int
    noise: float | None
    metric: Metric | None = None
    pruned: Pruning | None = None

    @property
    def plain(self) -> Logits:
        """The endpoint's zero-shot logits of the images, `(n_images, n_classes)`."""
        n_images = int(self.owners.max()) + 1
        return centred(self.observation.answers[:n_images] @ self.readout)


async def observe(
    meter: Meter, task: Task, plan: Plan, seed: int, encoder: LocalEncoder | None = None
) -> Observed:
    """Ask what the plan says, as far as it is the pass over the images.

    Args:
        meter: of the run.
        task: labelled images.
        plan: made for them.
        seed: of the folds that judge text prompts.
        encoder: whose vectors describe the images, where the user allows one.
    """
    assert plan.question is not None
    answers = await ask(meter, plan.question, task.images, task.classes, "observe")
    noise = await _noise(meter, task, plan.question)
    readouts = await _readouts(meter, task, plan)
    prior = _prior(answers, readouts, task, seed)
    shown = task.images
    if plan.views:
        shown = view_images(task.images, plan.views)
        views = await ask(meter, plan.question, shown, task.classes, "views")
        answers, shown = np.concatenate([answers, views]), (*task.images, *shown)
    owners = np.tile(np.arange(len(task)), 1 + plan.views)
    observation, n_answers = Observation(answers, prior), answers.shape[1]
    seen = Observed(plan.question, observation, owners, readouts[0], n_answers, noise)
    kept = np.arange(n_answers)
    if plan.prune_to is not None:
        assert task.labels is not None
        seen = _pruned(seen, task.labels, plan.prune_to, seed)
        kept = seen.pruned.kept if seen.pruned else kept
    if plan.background:
        pictures = background_images()
        shapes = await ask(meter, plan.question, pictures, task.classes, "background")
        seen = seen._replace(metric=fit_metric(shapes[:, kept]))
    if encoder is None:
        return seen
    student = with_vectors(seen.observation, await encoder.vectors(shown))
    longer = np.zeros((len(student.readout) - len(seen.readout), len(task.class_names)))
    readout = np.concatenate([seen.readout, longer.astype(np.float32)])
    return seen._replace(observation=student, readout=readout)


def _pruned(seen: Observed, labels: NDArray[np.int64], size: int, seed: int) -> Observed:
    """The same pass, as if only the texts that a prediction will take had been asked about."""
    images = seen.observation.of(np.arange(len(labels)))
    pruning = prune(images, labels, size, seed=seed)
    [texts] = seen.question.lists
    answers = seen.observation.answers[:, pruning.kept]
    return seen._replace(
        question=Question((tuple(texts[at] for at in pruning.kept),)),
        observation=Observation(answers, seen.observation.readout[pruning.kept]),
        readout=seen.readout[pruning.kept],
        n_answers=size,
        pruned=pruning,
    )


async def _noise(meter: Meter, task: Task, question: Question) -> float | None:
    if not needs_canary(meter.capabilities):
        return None
    access = meter.capabilities.access
    first = question.requests(task.images, task.classes, access)[0]
    return await meter.canary(first)


async def _readouts(meter: Meter, task: Task, plan: Plan) -> Floats:
    """The readout of every text prompt, `(n_templates, K, n_classes)`; the task's own is first."""
    if meter.capabilities.access is not Access.EMBEDDINGS:
        assert plan.readout is not None
        return plan.readout[None]
    texts = await meter.observe(text_requests(task, plan.templates), "texts")
    scale = meter.capabilities.logit_scale
    return np.stack([vector_readout(vectors, scale) for vectors in texts])


def _prior(answers: Floats, readouts: Floats, task: Task, seed: int) -> Floats:
    """The readout that the heads start from: the own template's, or a mixture that is better."""
    prior: Floats = readouts[0]
    if len(readouts) == 1:
        return prior
    assert task.labels is not None  # make_plan has refused unlabelled tasks
    logits = np.stack([centred(answers @ readout) for readout in readouts])
    weights = choose_weights(logits, task.labels, seed=seed)
    return np.asarray((weights[:, None, None] * readouts).sum(axis=0), dtype=np.float32)
