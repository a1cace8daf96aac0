"""torchvision beside a torch without its compiled operators, in fresh interpreters."""

import subprocess
import sys

WORKS = """
from blackbox_vlm.backends._torchvision import ensure_torchvision
ensure_torchvision()
ensure_torchvision()  # again, now that it is imported
import torchvision.transforms, open_clip
"""

# A torchvision that imports: nothing may be declared in its name.
HARMLESS = """
import sys, types
sys.modules["torchvision"] = types.ModuleType("torchvision")
from blackbox_vlm.backends import _torchvision
_torchvision.ensure_torchvision()
assert _torchvision._library is None
import torch
assert not hasattr(torch.ops.torchvision, "nms")
"""

# A torchvision that fails for its own reasons: the reason must come through.
FAILS = """
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from blackbox_vlm.backends._torchvision import ensure_torchvision
with TemporaryDirectory() as folder:
    Path(folder, "torchvision.py").write_text("raise RuntimeError('disk on fire')")
    sys.path.insert(0, folder)
    try:
        ensure_torchvision()
    except RuntimeError as error:
        assert str(error) == "disk on fire"
    else:
        raise SystemExit("the error was swallowed")
"""

# The operators exist, and torchvision still fails as if they did not: they are not declared twice.
DECLARED = """
import torch
from blackbox_vlm.backends import _torchvision
real = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    real.define(name + _torchvision._SCHEMA)
_torchvision._declare_operators()
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_open_clip_imports() -> None:
    run(WORKS)


def test_no_effect_where_torchvision_works() -> None:
    run(HARMLESS)


def test_another_error_is_not_hidden() -> None:
    run(FAILS)


def test_existing_operators_are_left_alone() -> None:
    run(DECLARED)
