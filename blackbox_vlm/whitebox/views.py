"""Pictures decoded once, and random views of them drawn where they are needed.

A view is a random crop, flipped or not, as in `augment`, but drawn afresh at every step on tensors:
here an image costs no query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from blackbox_vlm.augment import RATIO, SCALE
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image

THREADS = 2


def load_pixels(images: Sequence[Image], preprocess: Callable[[PIL.Image.Image], Tensor]) -> Tensor:
    """Pictures as the model wants them, (n, 3, side, side) float16: 0.3 MB each at a side of 224.

    Raises:
        InputError: there are no images, or a file cannot be read or has changed.
    """
    if not images:
        raise InputError("there are no images; give at least one")
    with ThreadPoolExecutor(THREADS) as pool:
        ready = pool.map(lambda image: preprocess(image.load()).half(), images)
        return torch.stack(list(ready))


def random_views(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """One view of each picture: (b, 3, s, s) -> (b, 3, side, side) float32."""
    area, ratio, across, down, flip = torch.rand(5, len(pixels), generator=generator)
    area = SCALE[0] + area * (SCALE[1] - SCALE[0])
    low, high = torch.tensor(RATIO).log()
    ratio = torch.exp(low + ratio * (high - low))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = width * torch.where(flip < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * across - 1), (1 - height) * (2 * down - 1)
    grid = F.affine_grid(theta.to(pixels.device), [len(pixels), 3, side, side], align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)


def whole_pictures(pixels: Tensor, side: int) -> Tensor:
    """Pictures (b, 3, s, s) at another size, (b, 3, side, side) float32."""
    if pixels.shape[-1] == side:
        return pixels.float()
    return F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
