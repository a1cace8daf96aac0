"""What contrast of views comes to where the features are given.

CoFT+ (arXiv 2602.04337) adds "momentum contrastive learning": views of one image are drawn
together and those of others apart, by an encoder that learns it (He et al., arXiv 1911.05722;
contrast.py has it for encoders of one's own, see `whitebox`). Behind an endpoint the features are
given, and what is left to learn is a linear map of them. Trained by momentum contrast, with a key
encoder and a queue, such a map changed the accuracy on development sets by -16 to +2 points: a few
hundred images do not hold it. Its aim has a closed form (ours): directions in which the views of
one image differ say nothing of its class, so that features are whitened by the covariance of these
differences, as `observe.features` whitens scores by drawings: within-class whitening, with every
image as a class of its own.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.observe.heads import Floats


def differences(views: NDArray[np.floating]) -> Floats:
    """Differences of every two views, both ways, `(n_views (n_views - 1) n, d)`.

    Args:
        views: features of the same images in every view, `(n_views, n, d)`, two at least.
    """
    one_way = np.concatenate([first - second for first, second in combinations(views, 2)])
    return np.concatenate([one_way, -one_way]).astype(np.float32)
