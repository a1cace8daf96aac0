"""An open_clip model with its weights in reach: gradients flow through both towers.

The black-box path never imports this; there a model is two functions (`backends.dual_encoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blackbox_vlm.errors import InputError

STRIDE = 32  # of the towers of convolutions in use: other sides would be cut unevenly


@dataclass(frozen=True, slots=True)
class WhiteBox:
    """A model in evaluation mode: dropout off, statistics of batch norms frozen, always.

    Attributes:
        label: "model@weights".
        visual: the image tower; (b, 3, side, side) -> (b, d).
        text: open_clip's module of a causal text tower.
        preprocess: PIL image -> (3, side, side) float32.
        tokenize: open_clip's tokeniser.
        logit_scale: what a cosine is multiplied with to make a logit.
        context_length: tokens of a text, its begin and end marks included.
        device: where both towers lie.
    """

    label: str
    visual: nn.Module
    text: Any
    preprocess: Callable[[PIL.Image.Image], Tensor]
    tokenize: Any
    logit_scale: float
    context_length: int
    device: torch.device


def open_whitebox(
    model: str = "nano", pretrained: str | None = None, *, device: str = "auto"
) -> WhiteBox:
    """Open a model with its weights; nothing in it requires a gradient yet.

    Args:
        model: "nano" (embedded), an open_clip name, "hf-hub:...", or a folder in its format.
        pretrained: tag of the weights, for open_clip names.
        device: "auto" (CUDA where there is one), or a device of torch.

    Raises:
        InputError: there is no such model, its weights cannot be had, or its text tower takes no
            soft prompts.
    """
    backends = "blackbox_vlm.backends."  # no module of the core imports them by statement
    opened = import_module(backends + "_open").open_model(model, pretrained)
    tokenizer = import_module("open_clip.tokenizer").SimpleTokenizer
    place = torch.device(_available() if device == "auto" else device)
    loaded: Any = opened.model.requires_grad_(False).to(place)
    source = import_module(backends + "text_tower").text_source(loaded)
    if source is None or not isinstance(opened.tokenize, tokenizer):
        raise InputError(
            f"{opened.label} has a text tower that takes no soft prompts (only causal CLIP towers "
            "do); white-box CoFT needs one: use another model"
        )
    return WhiteBox(
        label=opened.label,
        visual=loaded.visual.to(memory_format=torch.channels_last),  # on a CPU half as fast again
        text=source,
        preprocess=opened.preprocess,
        tokenize=opened.tokenize,
        logit_scale=float(loaded.logit_scale.exp()),
        context_length=int(loaded.context_length),
        device=place,
    )


def image_vectors(visual: nn.Module, pixels: Tensor) -> Tensor:
    """Unit vectors (b, d) of preprocessed pictures (b, 3, height, width)."""
    output = visual(pixels.contiguous(memory_format=torch.channels_last))
    vectors: Tensor = output[0] if isinstance(output, tuple) else output  # CoCa adds its tokens
    return F.normalize(vectors.float(), dim=-1)


def text_vectors(model: WhiteBox, texts: Sequence[str]) -> Tensor:
    """Unit vectors (n, d) of texts, without gradients.

    Raises:
        InputError: a text is longer than the model's context.
    """
    ids = [[model.tokenize.sot_token_id, *words(model, text)] for text in texts]
    for text, tokens in zip(texts, ids, strict=True):
        check_length(model, text, len(tokens) + 1)
        tokens.append(model.tokenize.eot_token_id)
    padded = nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True)
    ends = torch.tensor([len(tokens) - 1 for tokens in ids])
    with torch.no_grad():
        embedded = model.text.token_embedding(padded.to(model.device))
        return run_text_tower(model.text, embedded, ends.to(model.device))


def run_text_tower(source: Any, embedded: Tensor, ends: Tensor) -> Tensor:
    """Unit vectors (n, d) of token embeddings (n, tokens, width), read at `ends` (n,).

    This is open_clip's forward from the embeddings on; the tower is causal, hence what follows an
    end does not matter and sequences may be shorter than the context.
    """
    length = embedded.shape[1]
    x = embedded + source.positional_embedding[:length]
    x = source.transformer(x, attn_mask=source.attn_mask[:length, :length])
    x = source.ln_final(x)[torch.arange(len(x), device=x.device), ends]
    projection = source.text_projection
    if isinstance(projection, nn.Linear):
        x = projection(x)
    elif projection is not None:
        x = x @ projection
    return F.normalize(x.float(), dim=-1)


def words(model: WhiteBox, text: str) -> list[int]:
    """Token ids of a text, without marks."""
    ids: list[int] = model.tokenize.encode(text)
    return ids


def check_length(model: WhiteBox, text: str, count: int) -> None:
    """Raises InputError: that many tokens do not fit into the model's context."""
    if count > model.context_length:
        raise InputError(
            f"the text {text[:80]!r} has {count} tokens, soft context included; the model's "
            f"context holds {model.context_length}. Shorten it, or take fewer context tokens"
        )


def side_for(model: WhiteBox, share: float, side: int) -> int:
    """The side nearest to that share of the model's own, of those that its tower takes."""
    smaller = max(STRIDE, round(share * side / STRIDE) * STRIDE)
    blank = torch.zeros(1, 3, smaller, smaller, device=model.device)
    try:
        with torch.no_grad():
            image_vectors(model.visual, blank)
    except (RuntimeError, AssertionError):  # its places are learnt (open_clip), or checked (timm)
        return side
    return smaller


def _available() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
