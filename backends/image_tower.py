"""Makes an open_clip image tower fast on the machine at hand, without changing what it says.

On a CPU the tower is captured once with `torch.export` for one batch shape; then, on that graph,
batch norms are folded into the convolutions before them, and every convolution and linear layer
becomes one oneDNN call on weights laid out for it, with the activation or the residual sum that
follows computed in the same pass. These are the steps of `torch.compile`'s CPU backend that need no
compiler on the user's machine. TorchScript would be the older way; it is deprecated, and slower.

The operators in `torch.ops.mkldnn` are not a public interface. So nothing is taken on trust: the
result is compared with the plain tower, and the plain tower is used where they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

TOLERANCE = 1e-3  # largest difference allowed in an L2-normalised vector

Tower = Callable[[Tensor], Tensor]
Activation = tuple[str, list[Any], str]  # oneDNN's name, its scalars, its algorithm

_log = logging.getLogger(__name__)
_aten = torch.ops.aten
_NONE: Activation = ("none", [], "")
_ADDITIONS = (_aten.add.Tensor, _aten.add_.Tensor)
_SIMPLE = {
    _aten.relu.default: "relu",
    _aten.relu_.default: "relu",
    _aten.silu.default: "swish",
    _aten.silu_.default: "swish",
    _aten.hardswish.default: "hardswish",
    _aten.hardswish_.default: "hardswish",
}


def fast_image_tower(visual: nn.Module, example: Tensor) -> Tower:
    """The same tower, faster, for batches of exactly the example's shape.

    Args:
        visual: an open_clip image tower in evaluation mode, on the example's device.
        example: (batch, 3, height, width) float32; pictures to check the result on.

    Returns:
        A function from (batch, 3, height, width) float32 to (batch, dim) float32. Its L2-normalised
        vectors differ from the tower's own by at most `TOLERANCE` on the example.
    """
    visual.requires_grad_(False)
    plain = _eager(visual)
    candidates = _on_cuda(visual) if example.is_cuda else _on_cpu(visual, example)
    reference = F.normalize(plain(example), dim=-1)
    for name, build in candidates:
        try:
            tower = build()
            difference = (F.normalize(tower(example), dim=-1) - reference).abs().max().item()
        except Exception as error:  # whatever stops the fast path, the plain one still serves
            _log.info("image tower: %s failed, %s: %s", name, type(error).__name__, error)
            continue
        if difference <= TOLERANCE:
            return tower
        _log.info("image tower: %s differs by %.1e, which is too much", name, difference)
    return plain


def independent_of_place(tower: Tower, example: Tensor) -> bool:
    """Whether a picture gets the same bits at each place of a batch, whatever its neighbours."""
    return torch.equal(tower(example).roll(1, dims=0), tower(example.roll(1, dims=0)))


def _eager(module: nn.Module) -> Tower:
    """The module as it is, always in channels-last order, without autograd."""

    @torch.inference_mode()
    def run(batch: Tensor) -> Tensor:
        output = module(batch.contiguous(memory_format=torch.channels_last))
        vectors: Tensor = output[0] if isinstance(output, tuple) else output  # CoCa adds its tokens
        return vectors.float()

    return run


def _on_cuda(visual: nn.Module) -> list[tuple[str, Callable[[], Tower]]]:
    """Half precision, the wider exponent first; the caller checks whether it agrees."""
    visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def autocast(dtype: torch.dtype) -> Callable[[], Tower]:
        def run(batch: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype):
                return _eager(visual)(batch)

        return lambda: run

    return [(str(dtype), autocast(dtype)) for dtype in (torch.bfloat16, torch.float16)]


def _on_cpu(visual: nn.Module, example: Tensor) -> list[tuple[str, Callable[[], Tower]]]:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        _log.info("image tower: this torch has no oneDNN; running it as it is")
        return []
    return [("oneDNN fusion", lambda: _eager(_fused(visual, example)))]


@torch.no_grad()
def _fused(visual: nn.Module, example: Tensor) -> fx.GraphModule:
    """Capture the tower and rewrite its convolutions and linear layers."""
    batch = example.contiguous(memory_format=torch.channels_last)
    module = torch.export.export(visual, (batch,)).module()
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"torch.export made a {type(module).__name__}")
    _Fusion(module).run()
    return module


class _Fusion:
    """Rewrites one captured graph in place."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.packed = 0

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.target is _aten.conv2d.default:
                self._convolution(node)
            elif node.target is _aten.linear.default:
                self._linear(node)
        self.graph.eliminate_dead_code()
        self._drop_unused_weights()
        self.module.recompile()

    def _convolution(self, node: fx.Node) -> None:
        """conv2d [+ batch norm] [+ activation | + sum [+ relu]] -> one call."""
        image, weight, bias, stride, padding, dilation, groups = _arguments(
            node, (None, None, None, [1, 1], [0, 0], [1, 1], 1)
        )
        if not _is_weight(weight) or not (bias is None or _is_weight(bias)):
            return
        chain = [node]
        kernel, shift = self._value(weight), None if bias is None else self._value(bias)
        norm = _only_user(node)
        if norm is not None and norm.target is _aten.batch_norm.default:
            kernel, shift = self._folded(norm, kernel, shift)
            chain.append(norm)
        geometry = (_pair(padding), _pair(stride), _pair(dilation), groups)
        kernel = torch.ops.mkldnn._reorder_convolution_weight(
            kernel.contiguous(memory_format=torch.channels_last), *geometry, _shape(image)
        )
        operands = (self._constant(chain[-1], kernel), self._constant(chain[-1], shift), *geometry)
        other = _summand(chain[-1])
        if other is None:
            activation = _activation(chain)
            operator = torch.ops.mkldnn._convolution_pointwise.default
            self._replace(chain, operator, (image, *operands, *activation))
            return
        chain.append(next(iter(chain[-1].users)))
        name, scalars, algorithm = _activation(chain, only=("relu",))
        after = (None if name == "none" else name, scalars, algorithm)
        operator = torch.ops.mkldnn._convolution_pointwise.binary
        self._replace(chain, operator, (image, other, *operands, "add", 1.0, *after))

    def _linear(self, node: fx.Node) -> None:
        """linear [+ activation] -> one call."""
        rows, weight, bias = _arguments(node, (None, None, None))
        if not _is_weight(weight) or not (bias is None or _is_weight(bias)):
            return
        kernel = self._value(weight)
        count = rows.meta["val"].numel() // kernel.shape[1]
        kernel = torch.ops.mkldnn._reorder_linear_weight(kernel, count)
        shift = None if bias is None else self._value(bias)
        operands = (self._constant(node, kernel), self._constant(node, shift))
        chain = [node]
        activation = _activation(chain)
        operator = torch.ops.mkldnn._linear_pointwise.default
        self._replace(chain, operator, (rows, *operands, *activation))

    def _folded(self, norm: Any, kernel: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """The convolution that does what convolution and batch norm did together."""
        gain, offset, mean, variance, _, _, epsilon, _ = norm.args[1:]
        scale = (self._value(variance) + epsilon).rsqrt()
        if gain is not None:
            scale = scale * self._value(gain)
        moved = scale * ((0 if shift is None else shift) - self._value(mean))
        if offset is not None:
            moved = moved + self._value(offset)
        return kernel * scale[:, None, None, None], moved

    def _value(self, node: Any) -> Tensor:
        value: Tensor = attrgetter(node.target)(self.module)
        return value.detach()

    def _constant(self, before: fx.Node, value: Tensor | None) -> fx.Node | None:
        """Store a tensor with the module; its node stands where every use can follow."""
        if value is None:
            return None
        name = f"packed_{self.packed}"
        self.packed += 1
        self.module.register_buffer(name, value)
        with self.graph.inserting_before(before):
            return self.graph.get_attr(name)

    def _replace(self, chain: list[fx.Node], operator: Any, arguments: tuple[Any, ...]) -> None:
        """Put one call in the place of a chain in which each node feeds only the next."""
        last = chain[-1]
        with self.graph.inserting_before(last):
            call = self.graph.call_function(operator, arguments)
        call.meta = last.meta
        last.replace_all_uses_with(call)
        for node in reversed(chain):  # in-place operators would survive dead code elimination
            self.graph.erase_node(node)

    def _drop_unused_weights(self) -> None:
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        for name, _ in list(self.module.named_parameters(remove_duplicate=False)):
            if name not in used:
                owner, _, leaf = name.rpartition(".")
                delattr(self.module.get_submodule(owner), leaf)


def _arguments(node: fx.Node, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Positional arguments of an ATen call, filled up with the operator's defaults."""
    if node.kwargs:
        raise ValueError(f"unexpected keyword arguments: {sorted(node.kwargs)}")
    return (*node.args, *defaults[len(node.args) :])


def _is_weight(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _shape(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


def _pair(value: list[int]) -> list[int]:
    return value * 2 if len(value) == 1 else value


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(chain: list[fx.Node], only: tuple[str, ...] = ()) -> Activation:
    """The activation that is all that follows the chain; it joins the chain."""
    user = _only_user(chain[-1])
    if user is None:
        return _NONE
    found = _NONE
    if user.target in _SIMPLE:
        found = (_SIMPLE[user.target], [], "")
    elif user.target in (_aten.hardtanh.default, _aten.hardtanh_.default):
        found = ("hardtanh", list(_arguments(user, (None, -1.0, 1.0))[1:]), "")
    elif user.target is _aten.gelu.default:
        found = ("gelu", [], str(user.kwargs.get("approximate", "none")))
    if found is _NONE or (only and found[0] not in only):
        return _NONE
    chain.append(user)
    return found


def _summand(node: fx.Node) -> fx.Node | None:
    """What a residual sum adds to the node, if that sum is all that follows it."""
    user = _only_user(node)
    if user is None or user.target not in _ADDITIONS or user.kwargs or len(user.args) != 2:
        return None
    if user.target is _aten.add_.Tensor and user.args[0] is not node:
        return None  # it would write into a tensor that others read
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node) or other is node or _shape(other) != _shape(node):
        return None
    return other
