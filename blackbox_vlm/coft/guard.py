"""May the layer stay? (ours)

Without labels nothing proves that it helps. Confidence, agreement and cleanliness all rise with
errors that are systematic: on the development sets the student's mean confidence was 0.9 where its
accuracy was 0.45. So the guards do not look for success. They object to what cannot be right: two
models that see different halves of the answers and agree on next to nothing, classes that died out,
predictions that have little to do with those that they started from.

With labels, the gain on images held out decides, weighed against what the layer gains elsewhere, as
in `observe.choose.expected_gain`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from blackbox_vlm.coft.coft import Evidence

# Each bound is far outside of what was seen on the development sets, where the lowest agreement of
# the models was 0.42, the least share of classes left 0.7 and the lowest agreement with the refined
# predictions 0.50. They are there for pools and endpoints that are unlike all of those.
LEAST_AGREEMENT = 0.25
LEAST_CLASSES = 0.5  # of the effective number of classes of the refined predictions
LEAST_FAITH = 0.3  # share of images whose class is still the refined one
GAIN, GAIN_DEVIATION = 0.03, 0.04  # of the layer over refined predictions, 1 to 16 labels per class


def objections(evidence: Evidence) -> list[str]:
    """What speaks against the layer where no label does, a clause each; none: it may stay."""
    found = []
    chance = 1 / len(evidence.mass)
    if evidence.agreement < max(LEAST_AGREEMENT, 1.5 * chance):
        found.append(f"the two models agree on {100 * evidence.agreement:.0f} % of the images")
    before, after = (effective_classes(m) for m in (evidence.refined_mass, evidence.mass))
    if after < LEAST_CLASSES * before:
        found.append(f"of {before:.1f} classes, by their entropy, {after:.1f} are left")
    if evidence.agreement_with_refined < max(LEAST_FAITH, 1.5 * chance):
        found.append(
            f"{100 * evidence.agreement_with_refined:.0f} % of the images keep the class that the "
            "pseudo-labels started from"
        )
    return found


def effective_classes(mass: NDArray[np.float64]) -> float:
    """How many even classes have the entropy of a class mass `(C,)`."""
    return float(np.exp(entr(mass).sum()))


def expected_gain(gains: NDArray[np.float64]) -> float:
    """The layer's gain in accuracy, from one per image held out: -1, 0 or 1.

    The posterior mean under a normal prior.
    """
    precision = len(gains) / (gains.var() + 1 / len(gains))
    prior = GAIN_DEVIATION**-2
    return float((prior * GAIN + precision * gains.mean()) / (prior + precision))
