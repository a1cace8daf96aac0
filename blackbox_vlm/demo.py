"""The images that ship with the package: colour emoji drawings, for the demo and the tests."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def demo_folder() -> Path:
    """The folder with `train` and `test`; its README says what they are, and their licences."""
    return Path(str(files("blackbox_vlm") / "data" / "emoji"))
