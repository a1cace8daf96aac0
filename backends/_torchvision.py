"""Makes torchvision importable beside a CPU-only torch.

The torchvision wheel on PyPI is linked against CUDA libraries. Beside a CPU-only torch its compiled
operators do not load, and torchvision then fails at import because it registers shape functions
for two operators that were never declared (pytorch/vision#8289, pytorch/pytorch#157648).
open_clip imports torchvision for its transforms only; declaring the two schemas is enough for them.
Where a matching torchvision is installed nothing here has any effect.
"""

from __future__ import annotations

import importlib
import sys

import torch

_MISSING = "operator torchvision::nms does not exist"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # the declarations live as long as this object


def ensure_torchvision() -> None:
    """Import torchvision; where only its compiled operators are missing, declare them first.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision fails for any other reason than its missing operators.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
        _declare_operators()
        _forget_torchvision()
        importlib.import_module("torchvision")


def _declare_operators() -> None:
    """Declare the schemas of the operators that torchvision describes at import."""
    global _library
    _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _library.define(name + _SCHEMA)  # type: ignore[no-untyped-call]


def _forget_torchvision() -> None:
    """Drop the half-imported modules, so that the next import starts afresh."""
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
