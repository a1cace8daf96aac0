"""Blackbox-VLM: tune a vision-language model that you can only query, inside a budget that holds.

from blackbox_vlm import Options, Task, open_backend, tune

task = Task.from_folder("photos/train").sample(shots=16, seed=0)
result = tune(task, open_backend("local"), "runs/photos", Options(budget=8000))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blackbox_vlm._version import __version__

if TYPE_CHECKING:
    from blackbox_vlm.adapter import Adapter, Predictions
    from blackbox_vlm.backend import Backend, Capabilities, open_backend
    from blackbox_vlm.demo import demo_folder
    from blackbox_vlm.endpoint import open_endpoint
    from blackbox_vlm.errors import BlackboxError
    from blackbox_vlm.evaluation import Evaluation, evaluate
    from blackbox_vlm.images import Image
    from blackbox_vlm.result import TuneResult
    from blackbox_vlm.task import Task
    from blackbox_vlm.tuning import Options, dry_run, tune

_HOMES = {
    "Adapter": "adapter",
    "Backend": "backend",
    "BlackboxError": "errors",
    "Capabilities": "backend",
    "Evaluation": "evaluation",
    "Image": "images",
    "Options": "tuning",
    "Predictions": "adapter",
    "Task": "task",
    "TuneResult": "result",
    "demo_folder": "demo",
    "dry_run": "tuning",
    "evaluate": "evaluation",
    "open_backend": "backend",
    "open_endpoint": "endpoint",
    "tune": "tuning",
}

__all__ = [
    "Adapter",
    "Backend",
    "BlackboxError",
    "Capabilities",
    "Evaluation",
    "Image",
    "Options",
    "Predictions",
    "Task",
    "TuneResult",
    "__version__",
    "demo_folder",
    "dry_run",
    "evaluate",
    "open_backend",
    "open_endpoint",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing the package costs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
