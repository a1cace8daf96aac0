"""Low-rank updates of weights: LoRA (Hu et al., arXiv 2106.09685), for any tower.

    W' = W + B A,   A (r, n_in) ~ N(0, 1 / n_in),   B (n_out, r) = 0

so that at the start nothing changes. A weight is a matrix whatever layer holds it: of a linear
layer, of the packed projection of an attention layer, of a convolution (n_out, n_in x kernel);
depthwise convolutions have no rank to lower. torch's own parametrisation puts W' in the place of W,
hence no layer is replaced. `peft` would bring transformers and accelerate along for these lines.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Weight = tuple[nn.Module, str]  # a module and the name of its weight


class LowRank(nn.Module):
    """`W -> W + B A` for one weight."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        n_out, n_in = weight.flatten(1).shape
        down = torch.randn(rank, n_in, generator=generator) * n_in**-0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(torch.zeros(n_out, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def adaptable(tower: nn.Module) -> Iterator[Weight]:
    """The weights that a low-rank update suits, in the order of the modules."""
    for module in tower.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield module, "in_proj_weight"
        elif isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1
        ):
            yield module, "weight"


def add_lora(
    tower: nn.Module, rank: int, share: float, generator: torch.Generator
) -> list[nn.Parameter]:
    """Put low-rank updates on the last `share` of a tower's weights; returns what to train.

    The tower's own parameters are left without gradients.
    """
    tower.requires_grad_(False)
    weights = list(adaptable(tower))
    trained: list[nn.Parameter] = []
    for module, name in weights[len(weights) - max(1, round(share * len(weights))) :]:
        update = LowRank(getattr(module, name), rank, generator)
        parametrize.register_parametrization(module, name, update)
        trained += update.parameters()
    return trained


def merge_lora(tower: nn.Module) -> None:
    """Write every update into its weight and take it off."""
    for module, name in list(adaptable(tower)):
        if parametrize.is_parametrized(module, name):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
