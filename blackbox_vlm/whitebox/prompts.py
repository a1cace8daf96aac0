"""Soft contexts before class names, with gradients (Zhou et al., arXiv 2109.01134).

    [SOS] [v_1] ... [v_M] [class name] [rest of the template] [EOT]

One context v (M, width) serves all classes; the text tower is frozen. DeFT draws it at random; here
it starts as the words that stand before the name in the template (completed on the left with those
of "a photo of a", as `backends.dual_encoder` does), plus a little noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blackbox_vlm.whitebox.model import WhiteBox, check_length, run_text_tower, words

FILLER = "a photo of a"  # as under soft-prompt access


@dataclass(frozen=True, slots=True)
class ClassPrompts:
    """The class prompts of a template around a context of M tokens.

    Attributes:
        model: whose text tower reads them.
        before: (b, width) embeddings of [SOS] and of the words before the context.
        start: (M, width) where a context starts: embeddings of the words that it replaces.
        after: (C, tokens, width) embeddings of the class names, the rest, [EOT] and padding.
        ends: (C,) place of [EOT] in the whole prompt.
        anchors: (C, d) mean of unit vectors of more texts, added to the class vector; or None.
    """

    model: WhiteBox
    before: Tensor
    start: Tensor
    after: Tensor
    ends: Tensor
    anchors: Tensor | None = None

    def class_vectors(self, context: Tensor) -> Tensor:
        """Unit vectors (C, d) of the classes under a context (M, width)."""
        head = torch.cat([self.before, context]).expand(len(self.after), -1, -1)
        embedded = torch.cat([head, self.after], dim=1)
        vectors = run_text_tower(self.model.text, embedded, self.ends)
        return vectors if self.anchors is None else F.normalize(vectors + self.anchors, dim=-1)

    def new_context(self, noise: float, generator: torch.Generator) -> nn.Parameter:
        """A context to be trained: the template's words plus noise of that deviation."""
        drawn = torch.randn(self.start.shape, generator=generator).to(self.start)
        return nn.Parameter(self.start + noise * drawn)


def class_prompts(
    model: WhiteBox,
    class_names: Sequence[str],
    template: str,
    context_tokens: int,
    anchors: Tensor | None = None,
) -> ClassPrompts:
    """Tokenise and embed the class prompts.

    Raises:
        InputError: a prompt is longer than the model's context.
    """
    head, tail = template.split("{}")
    start = words(model, head)
    filler = words(model, FILLER)
    missing = max(0, context_tokens - len(start))
    start = (filler * (missing // len(filler) + 1))[:missing] + start
    ends = [words(model, name + tail) for name in class_names]
    for name, ids in zip(class_names, ends, strict=True):
        check_length(model, template.replace("{}", name), len(start) + len(ids) + 2)
        ids.append(model.tokenize.eot_token_id)
    embed = model.text.token_embedding
    with torch.no_grad():
        first = embed(torch.tensor([model.tokenize.sot_token_id, *start], device=model.device))
        padded = nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ends], batch_first=True)
        after = embed(padded.to(model.device))
    reads = torch.tensor([len(first) + len(ids) - 1 for ids in ends], device=model.device)
    split = len(first) - context_tokens
    return ClassPrompts(model, first[:split], first[split:], after, reads, anchors)
