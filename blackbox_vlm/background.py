"""Pictures of nothing in particular, which show how an endpoint's texts distort its scores.

They ship with the package (`scripts/draw_background.py` drew them), so that they are the same
everywhere: an endpoint that was asked about them with some bank need not be asked again.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from blackbox_vlm.images import Image


@cache
def background_images() -> tuple[Image, ...]:
    """All of them, in a fixed order."""
    folder = Path(str(files("blackbox_vlm") / "data" / "background"))
    return tuple(Image.from_file(path) for path in sorted(folder.glob("*.jpg")))
