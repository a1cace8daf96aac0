"""The dual prompt: DeFT's loss, with CoFT's change. All functions are of logits.

    s+ = scale * cos(I, T+)       s- = scale * cos(I, T-)
    p_yes(i, c) = sigmoid(s+_ic - s-_ic)
    cleanliness of i = p_yes(i, y_i), and i is clean where it is above one half
    L_neg = E_c~q_i[-log(1 - p_yes(i, c))] - log p_yes(i, y_i)

with s+ detached in p_yes. In DeFT the image vector is detached in s- too; in CoFT L_neg reaches the
visual adaptation through it. q_i are the complementary labels: DeFT draws one uniformly from the
wrong ones, here the expectation is taken, under q_i = softmax(s+_i / temperature) without y_i.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def own(scores: Tensor, labels: Tensor) -> Tensor:
    """The entries (b,) of scores (b, C) that belong to labels (b,)."""
    return scores.gather(1, labels[:, None])[:, 0]


def cleanliness(positive: Tensor, negative: Tensor, labels: Tensor) -> Tensor:
    """Probability (b,) that each label is clean, from s+ and s- (b, C)."""
    return torch.sigmoid(own(positive - negative, labels))


def negative_loss(
    positive: Tensor, negative: Tensor, labels: Tensor, affirmed: Tensor, temperature: float
) -> Tensor:
    """L_neg of each image, (b,).

    Args:
        positive, negative: s+ and s-, (b, C).
        labels: (b,) given labels; all others are complementary.
        affirmed: (b,) labels to say yes to: the given ones, or corrected ones.
        temperature: of q; inf makes it uniform.
    """
    margin = positive.detach() - negative
    hidden = (positive.detach() / temperature).scatter(1, labels[:, None], -torch.inf)
    wrong = hidden.softmax(dim=1)
    return -(wrong * logsigmoid(-margin)).sum(dim=1) - logsigmoid(own(margin, affirmed))
