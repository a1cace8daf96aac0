"""Momentum contrast (He et al., arXiv 1911.05722): a key encoder that follows slowly, and a queue.

CoFT+ names "momentum contrastive learning" and says no more; weight, temperature, momentum and
queue are those of MoCo and of Co-Reg (arXiv 2406.18550), whose supervised variant is here as well.
Everything is a function of tensors and of a state that is never changed in place, for any encoder
whose parameters are given as a tuple.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from blackbox_vlm.backend import NO_LABEL


class Contrast(NamedTuple):
    """The state.

    Attributes:
        keys: parameters of the key encoder, in the order of the query encoder's.
        queue: (m, d) unit vectors of earlier keys, oldest first; m grows up to the limit.
        labels: (m,) int64 pseudo-labels of them, -1 where there is none.
    """

    keys: tuple[Tensor, ...]
    queue: Tensor
    labels: Tensor


def init(parameters: Sequence[Tensor], dim: int) -> Contrast:
    """A key encoder equal to the query encoder, and an empty queue of vectors of length `dim`."""
    keys = tuple(parameter.detach().clone() for parameter in parameters)
    like = keys[0] if keys else torch.empty(0)
    queue = torch.empty(0, dim, dtype=torch.float32, device=like.device)
    return Contrast(keys, queue, torch.empty(0, dtype=torch.int64, device=like.device))


def follow(state: Contrast, parameters: Sequence[Tensor], momentum: float) -> Contrast:
    """keys <- momentum * keys + (1 - momentum) * parameters (MoCo, eq. 2)."""
    pairs = zip(state.keys, parameters, strict=True)
    keys = tuple(torch.lerp(new.detach(), key, momentum) for key, new in pairs)
    return state._replace(keys=keys)


def enqueue(state: Contrast, keys: Tensor, labels: Tensor, limit: int) -> Contrast:
    """Append a batch of keys (b, d) and their labels (b,); the oldest beyond `limit` leave."""
    queue = torch.cat([state.queue, keys.detach()])[-limit:]
    return state._replace(queue=queue, labels=torch.cat([state.labels, labels])[-limit:])


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """-log exp(q k+ / t) / (exp(q k+ / t) + sum over the queue exp(q k / t)) (MoCo, eq. 1).

    Args:
        queries: (b, d) unit vectors of one view, with gradients.
        keys: (b, d) unit vectors of another view of the same images, from the key encoder.
        queue: (m, d); with an empty one the loss is zero.
        temperature: t.

    Returns:
        The mean over the batch.
    """
    positive = (queries * keys.detach()).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=keys.device))


def supervised(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    temperature: float,
    ignored: Tensor | None = None,
) -> Tensor:
    """Supervised contrast (Khosla et al., arXiv 2004.11362, L_out) with trusted labels only.

    A key is a positive where both labels are there and equal, a negative where they differ or one
    is missing. The key of the image's own other view comes first in `keys` and is always a
    positive. After Co-Reg: what has the same guess but is not trusted is neither; say so in
    `ignored`.

    Args:
        queries: (b, d) unit vectors, with gradients.
        labels: (b,) trusted pseudo-labels, -1 where there is none.
        keys: (b + m, d): those of the same images, in order, then the queue.
        key_labels: (b + m,) likewise.
        temperature: t.
        ignored: (b, b + m) True where a key is left out; None: nowhere.

    Returns:
        The mean over the batch.
    """
    logits = queries @ keys.detach().T / temperature
    itself = torch.eye(len(queries), len(keys), dtype=torch.bool, device=keys.device)
    same = (labels[:, None] == key_labels) & (labels != NO_LABEL)[:, None]
    if ignored is not None:
        logits = logits.masked_fill(ignored & ~itself, -torch.inf)
        same = same & ~ignored
    positive = same | itself
    log_p = logits.log_softmax(dim=1).masked_fill(~positive, 0.0)
    return -(log_p.sum(dim=1) / positive.sum(dim=1)).mean()
