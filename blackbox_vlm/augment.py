"""Augmented views of an image: a random crop, flipped or not, drawn once per image and view.

As in the public code of CraFT (torchvision's RandomResizedCrop with scale 0.5 to 1, and a
horizontal flip), but seeded by the image's hash: the same view is the same picture everywhere, so
that it is asked once and can be replayed.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import PIL.Image

from blackbox_vlm.images import Image

SCALE = (0.5, 1.0)  # share of the area that is kept
RATIO = (3 / 4, 4 / 3)  # width to height of the crop


@dataclass(frozen=True, slots=True)
class AugmentedImage(Image):
    """View number `view` of an image. Its `sha256` is its own; the path is the original's."""

    original: Image
    view: int

    @property
    def is_file(self) -> bool:
        return False

    def load(self) -> PIL.Image.Image:
        """The view as RGB, at the crop's own size. Raises as `Image.load`."""
        picture = self.original.load()
        random = np.random.default_rng(int(self.sha256[:16], 16))
        crop = picture.crop(_box(picture.width, picture.height, random))
        if random.random() < 0.5:
            return crop.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        return crop


def augmented(image: Image, view: int) -> Image:
    """View number `view` of an image."""
    digest = hashlib.sha256(f"{image.sha256} view {view}".encode()).hexdigest()
    return AugmentedImage(image.path, digest, image, view)


def _box(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    area = width * height * random.uniform(*SCALE)
    ratio = math.exp(random.uniform(*np.log(RATIO)))
    across = min(max(round(math.sqrt(area * ratio)), 1), width)
    down = min(max(round(math.sqrt(area / ratio)), 1), height)
    left = int(random.integers(width - across + 1))
    top = int(random.integers(height - down + 1))
    return (left, top, left + across, top + down)
