"""CoFT on a black box: two phases on cached answers, without a query.

Wang, Meng, Cai, Song, Xia: "Fine-tuning Pre-trained Vision-Language Models in a Human-Annotation-
Free Manner", arXiv 2602.04337. Of the paper we had the abstract; what follows it and what is ours:

- Dual-model, cross-modal collaboration: two models see disjoint halves of the answers, and each
  filters the other's pseudo-labels (filtering.py).
- Dual prompts that model cleanliness per sample, without a threshold: positive and negative
  prompts, as local parameters (dual.py).
- The negative prompt regularises light visual adaptation: a residual adapter on the features, which
  the negative loss reaches (dual.py).
- Phase 1, PEFT on high-confidence samples: prompts and adapter, on the surest images of each class.
- Phase 2, full fine-tuning by filtered pseudo-labels: a student of our own on the features, since
  the endpoint's encoder is out of reach (student.py).

Pseudo-labels start from the refined predictions: the observation heads' where some images are
labelled, and otherwise the endpoint's zero-shot logits plus `mass.evening`, by which a class whose
text attracts every image is held back. That is ours, and the largest single gain on the development
sets without labels, 6 of 12 points. It leans towards even classes; see mass.py for how far, and why
nothing better can be had without labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.coft.dual import Dual
from blackbox_vlm.coft.filtering import Judged, best_of_each, collaborate, select
from blackbox_vlm.coft.settings import CoftSettings
from blackbox_vlm.coft.student import Student, class_mass, fit
from blackbox_vlm.observe.features import FeatureMap, View, features, fit_map
from blackbox_vlm.observe.heads import Floats, Labels, Seen
from blackbox_vlm.scores import predicted


class Views(NamedTuple):
    """What the models see of all images.

    Attributes:
        whole: features of all answers, `(n, d)`, for the student.
        halves: features of disjoint halves of the answers, for the two models.
        map: makes `whole` of answers.
    """

    whole: Floats
    halves: tuple[Floats, Floats]
    map: FeatureMap


class Evidence(NamedTuple):
    """What can be said of the unlabelled images without a label; nothing here is an accuracy.

    All are shares of the unlabelled images or means over them. Errors that are systematic raise
    agreement and confidence as truth does.

    Attributes:
        coverage: whose pseudo-label was kept.
        agreement: on which the two models name the same class.
        cleanliness: mean p_clean, the lower of the two models', of those.
        confidence: mean probability of the predicted class, by the student, before tempering.
        agreement_with_refined: whose class is still that of the refined predictions.
        mass: estimated share of every class, `(C,)`.
        refined_mass: the same by the refined predictions.
    """

    coverage: float
    agreement: float
    cleanliness: float
    confidence: float
    agreement_with_refined: float
    mass: NDArray[np.float64]
    refined_mass: NDArray[np.float64]


class Coft(NamedTuple):
    """What both phases came to."""

    student: Student
    duals: tuple[Dual, ...]
    evidence: Evidence


def look(answers: Floats, power: float, seed: int) -> Views:
    """Features of answers `(n, K)`, whole and in two random halves of the columns."""
    whole = fit_map(answers, View(power))
    order = np.random.default_rng(seed).permutation(answers.shape[1])
    first, second = (
        features(fit_map(half, View(power)), half)
        for half in (answers[:, columns] for columns in np.array_split(order, 2))
    )
    return Views(features(whole, answers), (first, second), whole)


def coft(
    views: Views, refined: Floats, labels: Labels, settings: CoftSettings, ridge: float, seed: int
) -> Coft:
    """Both phases, as often as the settings say.

    Args:
        views: of all images, labelled or not.
        refined: logits `(n, C)` that the pseudo-labels start from.
        labels: `(n,)`, `NO_LABEL` where there is none; at least one image has none.
        settings: see there.
        ridge: of the student's covariance.
        seed: of all that is random.
    """
    posterior = softmax(refined, axis=1)
    for iteration in range(settings.iterations):
        share = min(settings.seeds + iteration * settings.growth, 1.0)
        trusted = high_confidence(posterior, labels, share)
        duals, judged = _first_phase(views, refined, trusted, settings, seed)
        student, kept = _second_phase(views, refined, labels, judged, settings, ridge)
        posterior = student.posterior
        if not iteration:  # later models learn from the student, and agree the more for it
            first, first_kept = judged, kept
    evidence = _evidence(first, student, refined, first_kept, labels == NO_LABEL)
    return Coft(student, duals, evidence)


def _first_phase(
    views: Views, refined: Floats, trusted: Labels, settings: CoftSettings, seed: int
) -> tuple[tuple[Dual, ...], Judged]:
    """Dual prompts and adapters of the models, and what these say of each other's labels."""
    halves = views.halves if settings.two_models else (views.whole,)
    seen, even = [Seen(half, refined) for half in halves], np.ones(len(refined), dtype=np.float32)
    return collaborate(seen, trusted, even, settings.dual, seed)


def _second_phase(
    views: Views,
    refined: Floats,
    labels: Labels,
    judged: Judged,
    settings: CoftSettings,
    ridge: float,
) -> tuple[Student, NDArray[np.bool_]]:
    """The student, and whose pseudo-labels were kept: the others count less in what it learns."""
    kept = np.ones(len(labels), dtype=bool)
    if settings.filtering:
        chosen = select(judged, class_mass(judged.posterior), share=settings.share)
        kept = (chosen.labels != NO_LABEL) | (labels != NO_LABEL)
    student = fit(
        Seen(views.whole, refined),
        labels,
        judged.posterior,
        np.where(kept, 1.0, settings.recovered).astype(np.float32),
        sharpness=settings.sharpness,
        ridge=ridge,
        rounds=settings.rounds,
        mass=settings.mass,
    )
    return student, kept


def _evidence(
    judged: Judged,
    student: Student,
    refined: Floats,
    kept: NDArray[np.bool_],
    free: NDArray[np.bool_],
) -> Evidence:
    after, before = student.posterior[free], softmax(refined[free], axis=1)
    return Evidence(
        coverage=float(kept[free].mean()),
        agreement=float(judged.agree[free].mean()),
        cleanliness=float(judged.clean.min(axis=0)[free].mean()),
        confidence=float(after.max(axis=1).mean()),
        agreement_with_refined=float((after.argmax(axis=1) == predicted(refined[free])).mean()),
        mass=class_mass(after),
        refined_mass=class_mass(before),
    )


def high_confidence(posterior: Floats, labels: Labels, share: float) -> Labels:
    """Phase 1's samples: of each class, the surest `share` of what it is expected to have.

    How many a class has is estimated from the same posterior. Every labelled image is in.
    """
    n = len(posterior)
    wanted = np.maximum(np.rint(share * n * class_mass(posterior)), 1).astype(np.int64)
    best = posterior.argmax(axis=1)
    kept = best_of_each(best, posterior.max(axis=1), labels == NO_LABEL, wanted)
    return np.where(kept, best, labels)
