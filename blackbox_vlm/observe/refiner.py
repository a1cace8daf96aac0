"""CraFT's prediction refinement as a head: `Y_O = Y_I + g(Y_I)` on the zero-shot logits.

Wang et al., arXiv 2402.04050, equation 2; see `blackbox_vlm.craft`. It sees the zero-shot logits
alone, and is trained as CraFT's own guard trains it, with the settings of our recipe.
"""

from __future__ import annotations

import numpy as np

from blackbox_vlm.craft.craft import fit_refiner
from blackbox_vlm.craft.recipes import CRAFT
from blackbox_vlm.observe.heads import Labels, Residual, Seen


def fit(seen: Seen, labels: Labels, *, seed: int = 0) -> Residual:
    """Fit the refiner; the features play no part."""
    refiner = fit_refiner(CRAFT, np.ascontiguousarray(seen.zero_shot), labels, seed)
    return Residual(*(tensor.numpy() for tensor in refiner))
