"""The text tower for many short prompts that begin alike.

CLIP's text towers are causal and read their vector at the end-of-text token. Two savings follow,
both exact. Nothing after the end of the longest prompt matters, so sequences are cut there. And a
beginning that several prompts share is computed once: prompts are laid side by side after it, as
branches of a tree, and a mask lets each token see the beginning and its own branch only:

    [SOS] a photo of a | cat . [EOT] | black cat . [EOT] | dog . [EOT]

In the last layer only the end-of-text tokens are computed. Everything runs on weights packed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BRANCH_TOKENS = 48  # in one row; attention is quadratic in it
CHUNK_BYTES = 16 * 2**20  # of the widest activation in one pass
ROWS_HINT = 1024  # oneDNN lays weights out for about this many rows

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Block:
    """One transformer block: attention and a perceptron, each after a layer norm."""

    heads: int
    norm_1: Layer
    qkv: Layer
    out: Layer
    norm_2: Layer
    mlp: Layer

    def __call__(self, x: Tensor, mask: Tensor, read: Tensor | None) -> Tensor:
        """x (rows, tokens, width), mask (tokens, tokens) -> the same, or the read tokens only.

        Args:
            x: the tokens of each row.
            mask: True where the row's token may look at the column's.
            read: (rows, branches) places whose output is wanted, or None for all.
        """
        rows, tokens, _ = x.shape
        q, k, v = (
            part.view(rows, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        if read is not None:
            every = torch.arange(rows, device=x.device)[:, None]
            x = x[every, read]
            q = q.transpose(1, 2)[every, read].transpose(1, 2)
            mask = mask[read][:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm_2(x))


class TextTower:
    """A causal CLIP text tower, on the weights of open_clip's own, packed.

    Args:
        source: what `text_source` found.
        dtype: of the computation.
    """

    def __init__(self, source: Any, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self._tokens: Tensor = source.token_embedding.weight.detach()  # (vocabulary, width)
        self._places: Tensor = source.positional_embedding.detach()  # (context, width)
        self._blocks = [_block(block, dtype) for block in source.transformer.resblocks]
        self._norm = _norm(source.ln_final, dtype)
        self._projection = _projection(source.text_projection, dtype)
        self.width = self._tokens.shape[1]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> token embeddings (..., width) float32, without their places."""
        return self._tokens[ids]

    @torch.inference_mode()
    def nearest(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Of the tokens `ids` (n,), the one of highest cosine to each of `vectors` (k, width).

        Returns:
            (k,) token ids.
        """
        table = F.normalize(self._tokens[ids], dim=-1)
        return ids[(F.normalize(vectors, dim=-1) @ table.T).argmax(dim=1)]

    @torch.inference_mode()
    def __call__(self, starts: Tensor, ends: Tensor, reads: Tensor) -> Tensor:
        """Encode every start followed by every end.

        Args:
            starts: (n_starts, start_tokens, width) float32 token embeddings, one per candidate.
            ends: (n_ends, end_tokens) token ids, one per class, filled up on the right.
            reads: (n_ends,) place of the end-of-text token in each end.

        Returns:
            (n_starts, n_ends, dim) float32, L2-normalised.
        """
        first, length, device = starts.shape[1], ends.shape[1], ends.device
        branches = max(1, min(len(ends), BRANCH_TOKENS // length))
        groups = -(-len(ends) // branches)  # rows that one start needs
        filled = torch.arange(groups * branches, device=device).clamp(max=len(ends) - 1)
        trunks = (starts + self._places[:first]).to(self._dtype)
        leaves = self._tokens[ends[filled]] + self._places[first : first + length]
        leaves = leaves.view(groups, -1, self.width).to(self._dtype)
        read = reads[filled].view(groups, branches)
        read = read + first + length * torch.arange(branches, device=device)
        mask = _tree(first, branches, length, device)
        rows = max(1, CHUNK_BYTES // (16 * self.width * len(mask)))
        vectors = []
        for at in range(0, len(starts) * groups, rows):
            i = torch.arange(at, min(at + rows, len(starts) * groups), device=device)
            x = torch.cat([trunks[i // groups], leaves[i % groups]], dim=1)
            vectors.append(self._rows(x, mask, read[i % groups]))
        return torch.cat(vectors).view(len(starts), len(filled), -1)[:, : len(ends)]

    def _rows(self, x: Tensor, mask: Tensor, read: Tensor) -> Tensor:
        """x (rows, tokens, width), read (rows, branches) -> (rows, branches, dim)."""
        for block in self._blocks[:-1]:
            x = block(x, mask, None)
        x = self._blocks[-1](x, mask, read)
        return F.normalize(self._projection(self._norm(x)).float(), dim=-1)


def text_source(model: Any) -> Any | None:
    """The module that holds a causal CLIP text tower; None where the model has another kind.

    Towers that look both ways or read at the last place (SigLIP), that append a class token (CoCa)
    and those of other libraries are not served: there, what stands after the text matters.
    """
    source = getattr(model, "text", model)
    return source if _serves(source) else None


def _serves(source: Any) -> bool:
    """Whether the tower is causal, reads at the highest token id ([EOT]) and has plain blocks."""
    from open_clip.transformer import ResidualAttentionBlock

    wanted = ("token_embedding", "positional_embedding", "transformer", "ln_final", "attn_mask")
    if any(getattr(source, name, None) is None for name in wanted):
        return False
    pool = getattr(source, "pool_type", None) or getattr(source, "text_pool_type", None)
    return (
        pool == "argmax"
        and getattr(source, "cls_emb", None) is None
        and not getattr(source, "use_pad_mask", False)
        and all(type(b) is ResidualAttentionBlock for b in source.transformer.resblocks)
        and all(b.attn.in_proj_weight is not None for b in source.transformer.resblocks)
    )


def _tree(start: int, branches: int, length: int, device: torch.device) -> Tensor:
    """Mask (tokens, tokens): a token sees what stands before it in the start or its own branch."""
    branch = torch.arange(branches, device=device).repeat_interleave(length) + 1
    branch = torch.cat([branch.new_zeros(start), branch])
    same = (branch[:, None] == branch) | (branch == 0)
    return same.tril()


def _block(block: Any, dtype: torch.dtype) -> _Block:
    attention, mlp = block.attn, block.mlp
    inner, outer = _linear(mlp.c_fc, dtype), _scaled(mlp.c_proj, block.ls_2, dtype)
    return _Block(
        heads=attention.num_heads,
        norm_1=_norm(block.ln_1, dtype),
        qkv=_packed(attention.in_proj_weight, attention.in_proj_bias, dtype),
        out=_scaled(attention.out_proj, block.ls_1, dtype),
        norm_2=_norm(block.ln_2, dtype),
        mlp=lambda x: outer(mlp.gelu(inner(x))),
    )


def _norm(norm: Any, dtype: torch.dtype) -> Layer:
    weight, bias = (None if t is None else t.detach().to(dtype) for t in (norm.weight, norm.bias))
    return lambda x: F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _projection(projection: Any, dtype: torch.dtype) -> Layer:
    """open_clip keeps a linear layer, a bare (width, dim) matrix or nothing at all."""
    if projection is None:
        return lambda x: x
    if isinstance(projection, nn.Linear):
        return _linear(projection, dtype)
    return _packed(projection.t(), None, dtype)


def _linear(layer: Any, dtype: torch.dtype) -> Layer:
    return _packed(layer.weight, layer.bias, dtype)


def _scaled(layer: Any, scale: Any, dtype: torch.dtype) -> Layer:
    """A linear layer with the layer scale after it, if there is one, multiplied in."""
    gamma = getattr(scale, "gamma", None)
    if gamma is None:
        return _linear(layer, dtype)
    bias = None if layer.bias is None else layer.bias * gamma
    return _packed(layer.weight * gamma[:, None], bias, dtype)


@torch.no_grad()
def _packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Layer:
    """x (..., inputs) -> (..., outputs), by oneDNN on packed weights where torch has it."""
    weight = weight.detach().to(dtype).contiguous()
    bias = None if bias is None else bias.detach().to(dtype)
    if weight.is_cuda or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)

    def run(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return y

    return run
