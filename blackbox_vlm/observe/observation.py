"""What an endpoint answered about images, and how its own prediction is read from it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.scores import centred

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


class Observation(NamedTuple):
    """The numbers that a pass over images brought.

    Attributes:
        answers: `(n_images, K)` float32. Unit vectors (embeddings), logits of K texts, centred per
            image (scores), or votes (labels).
        readout: `(K, n_classes)` float32; `answers @ readout` are the zero-shot logits. For vectors
            it holds the class texts' vectors times the logit scale; for scores it averages the
            columns of a class over its templates.
    """

    answers: Floats
    readout: Floats

    @property
    def zero_shot(self) -> Floats:
        """The endpoint's own logits, centred per image, `(n_images, n_classes)`."""
        return centred(self.answers @ self.readout)

    @property
    def n_classes(self) -> int:
        return int(self.readout.shape[1])

    def of(self, images: NDArray[np.bool_] | NDArray[np.int64]) -> Observation:
        """The observation of some of the images, by mask or index."""
        return Observation(self.answers[images], self.readout)
