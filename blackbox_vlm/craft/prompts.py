"""Prompt generation (PG) in an intrinsic subspace: CraFT's first module, equation (1).

    p = p0 + A z                                                                             (1)

`p0` are the embeddings of the template's words, which stay inside the endpoint; `A` is a fixed
random projection; `z` is the intrinsic vector that the optimiser searches. What leaves is the
offset `A z`.

Scale of `A`: the public code draws its entries with standard deviation 0.2 or 1 whatever the model,
so that `A z` can be hundreds of times larger than a token embedding. Here an offset of a unit
normal `z` has the standard deviation of the model's own token embeddings (as in Sun et al.,
"Black-Box Tuning", arXiv 2201.03514), so that one step size serves every model and data set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.backend import SoftPrompts


class PromptSpace(NamedTuple):
    """The subspace in which prompts are searched.

    Attributes:
        projection: `A`, `(context_tokens * width, intrinsic_dimension)` float32.
        context_tokens: how many token embeddings an offset covers.
    """

    projection: NDArray[np.float32]
    context_tokens: int


def prompt_space(
    soft: SoftPrompts, intrinsic_dimension: int, *, entry_std: float | None, seed: int
) -> PromptSpace:
    """Draw `A` from its own generator.

    Args:
        soft: the shape and scale of the endpoint's soft prompts.
        intrinsic_dimension: the length of `z`.
        entry_std: the standard deviation of the entries of `A`; None scales `A z` to the model's
            token embeddings.
        seed: of the projection.
    """
    if entry_std is None:
        entry_std = soft.token_std / np.sqrt(intrinsic_dimension)
    shape = (soft.context_tokens * soft.width, intrinsic_dimension)
    entries = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return PromptSpace(entries * np.float32(entry_std), soft.context_tokens)


def offsets(space: PromptSpace, intrinsic: NDArray[np.float64]) -> NDArray[np.float32]:
    """`A z` for each row of `intrinsic` `(n, intrinsic_dimension)`.

    Returns:
        `(n, context_tokens, width)` float32.
    """
    flat = intrinsic.astype(np.float32) @ space.projection.T
    return flat.reshape(len(intrinsic), space.context_tokens, -1)
