"""Several heads as one classifier: log-linear pooling.

The logits of an ensemble are a weighted sum of its members' and of the zero-shot logits, divided
by a temperature: Hinton's product of experts, Genest & Zidek's logarithmic opinion pool.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from blackbox_vlm.observe.features import FeatureMap, features
from blackbox_vlm.observe.heads import Fitted, Floats, Linear, Seen, as_float32, logits
from blackbox_vlm.observe.observation import Observation
from blackbox_vlm.scores import centred


class Member(NamedTuple):
    """A head, the features it reads, and its weight in the sum."""

    map: FeatureMap
    fitted: Fitted
    weight: float


class Ensemble(NamedTuple):
    """What reads answers `(n, K)`.

    Attributes:
        readout: `(K, C)` float32, makes zero-shot logits of answers.
        members: the heads.
        prior: weight of the zero-shot logits, beside what the members take of them.
        temperature: what the sum is divided by.
    """

    readout: Floats
    members: tuple[Member, ...]
    prior: float
    temperature: float


def ensemble_logits(ensemble: Ensemble, answers: Floats) -> Floats:
    """Logits of answers `(n, K)`, `(n, C)` float32, centred per image."""
    zero_shot = Observation(answers, ensemble.readout).zero_shot
    total = ensemble.prior * zero_shot
    for member in ensemble.members:
        seen = Seen(features(member.map, answers), zero_shot)
        total = total + np.float32(member.weight) * logits(member.fitted, seen)
    return centred(total / np.float32(ensemble.temperature))


def flatten(ensemble: Ensemble) -> Ensemble:
    """The same classifier with its linear members and the prior as one, the first.

    Its map is the weight `(K, C)` itself, so that an adapter stays as small as that.
    """
    straight = [m for m in ensemble.members if isinstance(m.fitted, Linear)]
    if not straight:
        return ensemble
    bent = tuple(m for m in ensemble.members if not isinstance(m.fitted, Linear))
    readout = ensemble.readout.astype(np.float64)
    weight, bias = ensemble.prior * readout, np.zeros(readout.shape[1])
    for member in straight:
        added, constant = _on_answers(member, readout)
        weight, bias = weight + added, bias + constant
    n_answers, n_classes = readout.shape
    one = Linear(np.eye(n_classes, dtype=np.float32), as_float32(bias), as_float32(0))
    projected = FeatureMap(np.zeros(n_answers, dtype=np.float32), as_float32(weight))
    return ensemble._replace(members=(Member(projected, one, 1.0), *bent), prior=0.0)


def _on_answers(member: Member, readout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A linear member's weight `(K, C)` and bias `(C,)`, as functions of the answers."""
    fitted = member.fitted
    assert isinstance(fitted, Linear)
    weight = member.map.projection.astype(np.float64) @ fitted.weight
    bias = fitted.bias - member.map.mean.astype(np.float64) @ weight
    return member.weight * (weight + fitted.prior * readout), member.weight * bias
