"""Draws blackbox_vlm/data/background: overlapping shapes of all sizes, with colours and textures.

    python scripts/draw_background.py

Asked about a bank of texts, these pictures of nothing in particular show how the texts' geometry
distorts its scores, which `observe.features.fit_metric` undoes. They are the dead leaves model
(Lee, Mumford, Huang, "Occlusion Models for Natural Images", IJCV 2001): sizes follow a power law,
so that they have the edges, the occlusion and the scale invariance of photographs. Ours: each shape
carries a texture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Random = np.random.Generator

FOLDER = Path(__file__).parent.parent / "blackbox_vlm" / "data" / "background"
COUNT = 250  # twice as many recovered a point more
SIDE = 160  # pixels
MOST_SHAPES = 90
SMALLEST, LARGEST, EXPONENT = 0.03, 0.5, 1.2  # radii, in sides


def main() -> None:
    for index in range(COUNT):
        drawn = PIL.Image.fromarray(picture(index))
        drawn.save(FOLDER / f"{index:03}.jpg", quality=75)


def picture(index: int) -> NDArray[np.uint8]:
    """The `index`-th picture, `(SIDE, SIDE, 3)` RGB; the same for ever."""
    random = np.random.default_rng(index)
    canvas = texture(random)
    for _ in range(int(MOST_SHAPES ** random.random())):
        canvas = np.where(shape(random)[..., None], paint(random), canvas)
    return np.asarray(np.clip(canvas, 0, 1) * 255, dtype=np.uint8)


def paint(random: Random) -> Doubles:
    """What a shape is filled with: a texture or one colour."""
    if random.random() < 0.5:
        return texture(random)
    return random.random((1, 1, 3))


def shape(random: Random) -> NDArray[np.bool_]:
    """The pixels of an ellipse, a rectangle or a triangle."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - random.random(2)[:, None, None]
    radius = np.clip(SMALLEST * (1 + random.pareto(EXPONENT)), SMALLEST, LARGEST)
    angle, flatness = random.uniform(0, np.pi), random.uniform(0.2, 1)
    along = (x * np.cos(angle) + y * np.sin(angle)) / radius
    across = (y * np.cos(angle) - x * np.sin(angle)) / (radius * flatness)
    kinds = (
        np.hypot(along, across) < 1,
        np.maximum(abs(along), abs(across)) < 1,
        (across > -1) & (across + 2 * abs(along) < 1),
    )
    return np.asarray(kinds[random.integers(len(kinds))], dtype=np.bool_)


def texture(random: Random) -> Doubles:
    """Two colours mixed by a pattern, `(SIDE, SIDE, 3)`."""
    mix = PATTERNS[random.integers(len(PATTERNS))](random)[..., None]
    first, second = random.random((2, 3))
    return np.asarray(mix * first + (1 - mix) * second)


def stripes(random: Random) -> Doubles:
    """Straight or wavy."""
    phase = slope(random) * random.uniform(2, 30)
    if random.random() < 0.5:
        phase = phase + clouds(random, 2)
    return np.asarray(np.sin(2 * np.pi * phase) / 2 + 0.5)


def checks(random: Random) -> Doubles:
    cells = np.floor(np.mgrid[:SIDE, :SIDE] / SIDE * random.uniform(2, 15))
    return np.asarray(cells.sum(axis=0) % 2)


def dots(random: Random) -> Doubles:
    cells = np.mgrid[:SIDE, :SIDE] / SIDE * random.uniform(2, 15)
    return np.asarray(np.hypot(*(cells % 1 - 0.5)) < 0.3, dtype=np.float64)


def slope(random: Random) -> Doubles:
    """From 0 to 1 in some direction."""
    angle = random.uniform(0, np.pi)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    return np.asarray(np.clip(x * np.cos(angle) + y * np.sin(angle), 0, 1))


def haze(random: Random) -> Doubles:
    return np.asarray(np.clip(clouds(random, random.uniform(0.3, 2)) / 4 + 0.5, 0, 1))


PATTERNS = (stripes, checks, dots, slope, haze)


def clouds(random: Random, steepness: float) -> Doubles:
    """Noise whose amplitude falls with frequency to the power of `steepness`, of deviation 1."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(random.standard_normal((SIDE, SIDE))) / frequency**steepness
    noise = np.asarray(np.fft.ifft2(spectrum).real)
    return np.asarray((noise - noise.mean()) / noise.std())


if __name__ == "__main__":
    main()
