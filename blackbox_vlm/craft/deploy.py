"""After the search: fit the refiner that is deployed, and let the guard choose (ours).

Everything here works on scores that were paid for already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from blackbox_vlm.craft.craft import Logits, fit_refiner, fresh_refiner
from blackbox_vlm.craft.guard import Strategy, Verdict, decide
from blackbox_vlm.craft.recipes import Recipe
from blackbox_vlm.craft.refine import Refiner, RefinerState, refine

Labels = NDArray[np.int64]


class FoldSearch(NamedTuple):
    """What a search on one fold left: all images under its prompt `(N, C)`, and its refiner."""

    logits: Logits
    refiner: RefinerState


def judge(
    recipe: Recipe,
    seed: int,
    labels: Labels,
    plain: Logits,
    members: Sequence[Sequence[int]],
    searches: Sequence[FoldSearch] = (),
) -> Verdict:
    """Choose a strategy by out-of-fold predictions.

    Args:
        recipe, seed: of the run.
        labels: `(N,)`.
        plain: zero-shot logits, `(N, C)`.
        members: for each fold, the images that its models may learn from; the others are judged.
        searches: for each fold, its search; without any, only zero-shot and refiner compete.
    """
    names = tuple(Strategy) if searches else (Strategy.ZERO_SHOT, Strategy.REFINER)
    out = {name: np.empty_like(plain) for name in names}
    for fold, indices in enumerate(members):
        seen = np.zeros(len(plain), dtype=bool)
        seen[list(indices)] = True
        out[Strategy.ZERO_SHOT][~seen] = plain[~seen]
        alone = refiner_alone(recipe, seed, plain[seen], labels[seen])
        out[Strategy.REFINER][~seen] = refined(alone, plain[~seen])
        if searches:
            logits = searches[fold].logits
            both = fit_refiner(recipe, searches[fold].refiner, logits[seen], labels[seen], seed)
            out[Strategy.PROMPT][~seen] = logits[~seen]
            out[Strategy.BOTH][~seen] = refined(both, logits[~seen])
    return decide(out, labels)


def refiner_alone(recipe: Recipe, seed: int, plain: Logits, labels: Labels) -> Refiner:
    """A refiner of the plain predictions, without any search."""
    fresh = fresh_refiner(recipe, plain.shape[1], seed)
    return fit_refiner(recipe, fresh, plain, labels, seed)


def refined(refiner: Refiner, logits: Logits) -> Logits:
    """`Y_O` of centred logits, as numpy."""
    result: Logits = refine(refiner, torch.from_numpy(logits)).numpy()
    return result
