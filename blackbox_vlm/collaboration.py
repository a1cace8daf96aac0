"""CoFT over a pass: what it starts from, whether it may stay, and what is deployed.

The layer starts from the refined predictions: the observation heads' where some images are
labelled, and the endpoint's own, evened out, where none is. With labels, out-of-fold evidence
decides whether it is deployed; without, guards that can only tell when something is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.backend import NO_LABEL, Access
from blackbox_vlm.coft.coft import Coft, Evidence, Views, coft, look
from blackbox_vlm.coft.guard import expected_gain, objections
from blackbox_vlm.coft.mass import evening
from blackbox_vlm.coft.settings import CoftSettings
from blackbox_vlm.deployment import Deployment, choose_heads, of_heads, plain_ensemble
from blackbox_vlm.observations import Logits
from blackbox_vlm.observe.calibration import Calibration, calibrate, log_loss
from blackbox_vlm.observe.choose import HEADS, ZERO_SHOT, folds_of
from blackbox_vlm.observe.ensemble import Ensemble, Member, ensemble_logits, flatten
from blackbox_vlm.observe.features import FeatureMap, apply, before
from blackbox_vlm.observe.heads import Labels, Linear, as_float32
from blackbox_vlm.observing import Observed
from blackbox_vlm.plan import Method
from blackbox_vlm.scores import centred, predicted
from blackbox_vlm.task import Task

COFT = "coft"


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """What a run can say of its images without labels. Nothing here is an accuracy.

    Shares and means are over those images. Errors that are systematic raise all of them, as truth
    does: an audit measures.

    Attributes:
        n_images: how many were asked about.
        kept: whether the layer is deployed.
        why: what that rests on, a sentence.
        coverage, agreement, cleanliness, confidence, agreement_with_refined: see `coft.Evidence`.
        agreement_with_zero_shot: whose predicted class is the endpoint's own.
        class_share: predicted share of every class, by name.
    """

    n_images: int
    kept: bool
    why: str
    coverage: float
    agreement: float
    cleanliness: float
    confidence: float
    agreement_with_refined: float
    agreement_with_zero_shot: float
    class_share: dict[str, float]


class Collaborated(NamedTuple):
    """What CoFT came to: what is deployed, what can be said, and the pool's logits `(m, C)`."""

    deployment: Deployment
    unlabelled: Unlabelled
    zero_shot: Logits
    tuned: Logits


def collaborate(
    observed: Observed, task: Task, access: Access, settings: CoftSettings, seed: int
) -> Collaborated:
    """Refine, layer CoFT on it, and decide.

    Args:
        observed: a pass with a pool.
        task: its labelled images; there may be none.
        access: of the endpoint.
        settings: of the layer.
        seed: of all that is random.
    """
    assert task.labels is not None  # `parted` has made a pool of images without labels
    layer, heads, out_of_fold = _Layer(observed, task.labels, access, settings, seed), None, None
    if len(task):
        heads, out_of_fold = of_heads(observed, task, Method.COFT, access, seed)
    refined = layer.refined(heads)
    found = layer.learn(refined, out_of_fold)
    verdict = _guarded(found.evidence)
    if heads is not None and out_of_fold is not None and heads.accuracy:
        verdict = _judged(out_of_fold, layer.held_out(), task.labels, seed)
    zero_shot = centred(observed.pool @ observed.readout)
    plain = heads or _zero_shot(observed)
    refined = layer.layered(refined, found) if verdict.kept else layer.refined(heads)
    tuned = ensemble_logits(refined, observed.pool) if verdict.kept or heads else zero_shot
    said = _said(found.evidence, verdict, zero_shot, tuned, task.class_names)
    return Collaborated(_with_layer(plain, observed, refined, verdict), said, zero_shot, tuned)


class _Verdict(NamedTuple):
    """Whether the layer is deployed, why, and its out-of-fold figures where there are any."""

    kept: bool
    why: str
    accuracy: float | None = None
    log_loss: float | None = None
    calibration: Calibration | None = None


class _Layer:
    """CoFT on the answers of a pass, with and without some of the labels."""

    def __init__(
        self,
        observed: Observed,
        labels: Labels,
        access: Access,
        settings: CoftSettings,
        seed: int,
    ) -> None:
        self._observed, self._labels = observed, labels
        self._settings, self._seed = settings, seed
        # Vectors, a local encoder's too, and scores in the metric have an even geometry.
        longer = observed.n_answers < observed.pool.shape[1]
        even = longer or access is Access.EMBEDDINGS or observed.metric is not None
        self._ridge = settings.ridge if even else settings.score_ridge
        answers = np.concatenate([observed.answers, observed.pool])
        if observed.metric is not None:
            answers = apply(observed.metric, answers)
        self._views = look(answers, settings.power if even else settings.score_power, seed)

    def refined(self, heads: Deployment | None) -> Ensemble:
        """What the pseudo-labels start from: the heads, or the endpoint's own answer, evened."""
        if heads is not None and heads.strategy == HEADS:
            return heads.ensemble
        readout = self._observed.observation.readout
        offset = evening(centred(self._observed.pool @ readout))
        n_answers, n_classes = readout.shape
        nothing = FeatureMap(as_float32(np.zeros(n_answers)), as_float32(np.zeros((n_answers, 0))))
        bias = Linear(as_float32(np.zeros((0, n_classes))), as_float32(offset), as_float32(0))
        return Ensemble(readout, (Member(nothing, bias, 1.0),), prior=1.0, temperature=1.0)

    def learn(
        self,
        refined: Ensemble,
        out_of_fold: Logits | None,
        kept: NDArray[np.bool_] | None = None,
    ) -> Coft:
        """Both phases, on the pool and the labelled images `kept` `(n,)`.

        `out_of_fold` are their refined logits, by what has not learned from them.
        """
        n = len(self._labels)
        kept = np.ones(n, dtype=bool) if kept is None else kept
        rows = np.concatenate([kept, np.ones(len(self._observed.pool), dtype=bool)])
        logits = ensemble_logits(refined, self._observed.pool)
        if out_of_fold is not None:
            logits = np.concatenate([out_of_fold, logits])
        unknown = np.full(len(self._observed.pool), NO_LABEL)
        views = Views(
            self._views.whole[rows],
            (self._views.halves[0][rows], self._views.halves[1][rows]),
            self._views.map,
        )
        labels = np.concatenate([self._labels[kept], unknown])
        return coft(views, logits, labels, self._settings, self._ridge, self._seed)

    def layered(self, refined: Ensemble, found: Coft) -> Ensemble:
        """The refined predictions and the student as one."""
        metric, projected = self._observed.metric, self._views.map
        if metric is not None:
            projected = before(metric, projected)
        share = 1 / refined.temperature
        members = [member._replace(weight=share * member.weight) for member in refined.members]
        student = Member(projected, found.student.head, 1.0)
        return flatten(
            Ensemble(refined.readout, (*members, student), share * refined.prior, temperature=1.0)
        )

    def held_out(self) -> Logits:
        """Logits of the labelled images, each by a layer that has not seen it, `(n, C)`."""
        folds = folds_of(self._labels, self._seed)
        assert folds is not None  # the heads have out-of-fold figures
        shown = np.empty((len(self._labels), self._observed.readout.shape[1]), dtype=np.float32)
        for fold in np.unique(folds):
            kept = folds != fold
            ensemble, choice = choose_heads(
                self._observed.of(kept), self._labels[kept], Method.COFT, self._seed
            )
            chosen = choice.chosen if choice.accuracy else ZERO_SHOT
            found = self.learn(ensemble, choice.out_of_fold[chosen], kept)
            layered = self.layered(ensemble, found)
            shown[~kept] = ensemble_logits(layered, self._observed.answers[~kept])
        return shown


def _guarded(evidence: Evidence) -> _Verdict:
    """Without labels: nothing speaks against it, or something does."""
    against = objections(evidence)
    if against:
        return _Verdict(False, f"left out, since {' and '.join(against)}")
    return _Verdict(True, "no label says whether it helps, and no guard objects; --audit measures")


def _judged(before: Logits, after: Logits, labels: Labels, seed: int) -> _Verdict:
    """With labels: by out-of-fold logits `(n, C)` of what it refines and of the layer."""
    judged = np.bincount(labels)[labels] > 1
    labels, before, after = labels[judged], before[judged], after[judged]
    right, was_right = predicted(after) == labels, predicted(before) == labels
    kept = expected_gain(right.astype(np.float64) - was_right) > 0
    why = f"{100 * right.mean():.1f} % out-of-fold, {100 * was_right.mean():.1f} % without it"
    calibration = calibrate(after, labels, seed=seed)
    loss = float(log_loss(after / calibration.temperature, labels).mean())
    return _Verdict(kept, why if kept else f"left out: {why}", right.mean(), loss, calibration)


def _zero_shot(observed: Observed) -> Deployment:
    """The endpoint as it is, where no image is labelled."""
    return Deployment(
        strategy=ZERO_SHOT,
        question=observed.question,
        ensemble=plain_ensemble(observed.readout),
        zero_shot=observed.readout,
        zero_shot_accuracy=None,
        accuracy={},
        log_loss={},
        reason="",
        noise=observed.noise,
    )


def _with_layer(
    plain: Deployment, observed: Observed, layered: Ensemble, verdict: _Verdict
) -> Deployment:
    """What is deployed: the layer, or what it would have refined."""
    reason = "; ".join(part for part in (plain.reason, f"CoFT: {verdict.why}") if part)
    plain = replace(plain, reason=reason)
    if verdict.accuracy is not None and verdict.log_loss is not None:
        plain = replace(
            plain,
            accuracy={**plain.accuracy, COFT: verdict.accuracy},
            log_loss={**plain.log_loss, COFT: verdict.log_loss},
        )
    if not verdict.kept:
        return plain
    temperature = verdict.calibration.temperature if verdict.calibration else 1.0
    return replace(
        plain,
        strategy=COFT,
        question=observed.question,
        ensemble=layered._replace(temperature=temperature),
        zero_shot=observed.readout,
        calibration=verdict.calibration,
    )


def _said(
    evidence: Evidence,
    verdict: _Verdict,
    zero_shot: Logits,
    tuned: Logits,
    class_names: tuple[str, ...],
) -> Unlabelled:
    labels = predicted(tuned)
    share = np.bincount(labels, minlength=len(class_names)) / len(labels)
    return Unlabelled(
        n_images=len(labels),
        kept=verdict.kept,
        why=verdict.why,
        coverage=evidence.coverage,
        agreement=evidence.agreement,
        cleanliness=evidence.cleanliness,
        confidence=evidence.confidence,
        agreement_with_refined=evidence.agreement_with_refined,
        agreement_with_zero_shot=float((labels == predicted(zero_shot)).mean()),
        class_share=dict(zip(class_names, share.tolist(), strict=True)),
    )
