"""An open_clip model as two functions, pictures to vectors and texts to vectors, made fast.

Soft prompts follow CraFT (arXiv 2402.04050): a context p = p0 + A z of continuous tokens stands
before the class name. Only the offset A z comes in; p0 is the embedding of the template's own
words, so no weight ever has to leave. We encode a whole population's class prompts together, where
the paper's code goes through the text tower candidate by candidate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image, fromarray
from torch import Tensor
from torch.nn import functional as F

from blackbox_vlm.errors import InputError

from ._open import Opened, open_model
from .image_tower import TOLERANCE, fast_image_tower, independent_of_place
from .text_tower import TextTower, text_source

FILLER = "a photo of a"  # completes a template whose text before {} is shorter than the context
CONVOLUTIONAL_BATCH = 4  # large activations: more would leave the allocator's reusable memory
TRANSFORMER_BATCH = 8
TEXTS_AT_ONCE = 64
PREPROCESS_THREADS = 4  # Pillow resizes without holding the interpreter's lock
IMAGES_AHEAD = 64  # preprocessed and waiting for the tower; bounds memory
SAMPLES = 256  # values of each weight that enter the identity

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Class prompts in tokens, split where the class name begins.

    Attributes:
        start: (start_tokens,) [SOS], filler and the template's text; the context is its tail.
        ends: (n_classes, end_tokens) class name, rest of the template, [EOT], padding.
        reads: (n_classes,) place of [EOT] in each end.
    """

    start: Tensor
    ends: Tensor
    reads: Tensor


class DualEncoder:
    """Encodes pictures and texts into one space. Opened by `DualEncoder.load`.

    Attributes:
        identity: "open_clip:<model>@<weights>#<digest>", the same for the same weights.
        dim: of a vector.
        logit_scale: what a cosine is multiplied with to make a logit.
        logit_bias: added to it, for models trained with a sigmoid (SigLIP); else None.
        context_length: tokens of a text, its begin and end marks included.
        device: "cpu" or "cuda".
        token_width: of a token embedding; None where soft prompts are not supported.
        token_std: standard deviation of the token embedding table; None likewise.
    """

    def __init__(self, opened: Opened, device: torch.device) -> None:
        model: Any = opened.model.requires_grad_(False).to(device)
        self.identity = f"open_clip:{opened.label}#{_digest(model)}"
        self.logit_scale = float(model.logit_scale.exp())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias)
        self.context_length = int(model.context_length)
        self.device = device.type
        self._device = device
        self._preprocess, self._tokenize = opened.preprocess, opened.tokenize
        self._visual: torch.nn.Module | None = model.visual
        self._load_text_tower(model)
        word = self._token_ids(["a"])
        self.dim = int(self._encode_ids(word, word.argmax(dim=1)).shape[-1])
        del model.visual  # kept until the first picture, which builds a fast tower from it

    @classmethod
    def load(
        cls, model: str = "nano", pretrained: str | None = None, *, device: str = "auto"
    ) -> DualEncoder:
        """Open a model with its weights.

        Args:
            model: "nano" (embedded), a name ("ViT-B-32"), "hf-hub:org/name", or a folder.
            pretrained: tag or file of the weights, for open_clip names.
            device: "auto", "cpu", "cuda" or "cuda:N".

        Raises:
            InputError: unknown model, weights or device, or weights that cannot be had.
        """
        place = _device(device)
        return cls(open_model(model, pretrained), place)

    def encode_images(self, images: Sequence[Image]) -> Floats:
        """Pictures -> (n, dim) float32, L2-normalised.

        A picture's vector has the same bits whatever else is in the call, and in whatever order.
        """
        vectors = np.empty((len(images), self.dim), np.float32)
        if self._visual is not None and len(images):
            self._build_image_tower(self._visual)
        for at, batch, count in self._batches(images):
            features = F.normalize(self._tower(batch.to(self._device)), dim=-1)
            vectors[at : at + count] = features[:count].cpu().numpy()
        return vectors

    def encode_texts(self, texts: Sequence[str]) -> Floats:
        """Texts -> (n, dim) float32, L2-normalised.

        Raises:
            InputError: a text is longer than the model's context.
        """
        vectors = np.empty((len(texts), self.dim), np.float32)
        if not len(texts):
            return vectors
        ids = self._token_ids(texts)
        reads = ids.argmax(dim=1)
        order = reads.argsort(stable=True) if self._texts else torch.arange(len(ids))
        for at in range(0, len(order), TEXTS_AT_ONCE):
            chunk = order[at : at + TEXTS_AT_ONCE]
            vectors[chunk.numpy()] = self._encode_ids(ids[chunk], reads[chunk]).cpu().numpy()
        return vectors

    def encode_prompts(
        self, template: str, class_names: Sequence[str], offsets: NDArray[np.float32]
    ) -> Floats:
        """Class prompts under soft contexts: p = p0 + offset (CraFT section 3; offset = A z).

        The context is the last n_ctx tokens of the template's text before {}; a shorter text is
        completed on its left with tokens of "a photo of a".

        Args:
            template: a text with {} where the class name goes.
            class_names: (n_classes,)
            offsets: (n_candidates, n_ctx, token_width), added to the context's token embeddings.

        Returns:
            (n_candidates, n_classes, dim) float32, L2-normalised.

        Raises:
            InputError: the model takes no soft prompts, the shapes do not fit, or a text is longer
                than the model's context.
        """
        texts, offsets = self._soft(offsets)
        if not len(offsets) or not len(class_names):
            return np.empty((len(offsets), len(class_names), self.dim), np.float32)
        prompts = self._prompts(template, class_names, offsets.shape[1])
        starts = texts.embed(prompts.start.to(self._device)).repeat(len(offsets), 1, 1)
        context = starts.shape[1] - offsets.shape[1]
        starts[:, context:] += torch.from_numpy(offsets).to(self._device)
        ends, reads = prompts.ends.to(self._device), prompts.reads.to(self._device)
        vectors: Floats = texts(starts, ends, reads).cpu().numpy()
        return vectors

    def nearest_text(self, template: str, offset: NDArray[np.float32]) -> str:
        """The template of words that is nearest to a soft context, token by token, by cosine.

        Words are the vocabulary's entries that stand for a whole word of letters: each is a token
        of its own in any text.

        Args:
            template: a text with {} where the class name goes.
            offset: (n_ctx, token_width), as in `encode_prompts`.

        Raises:
            InputError: as `encode_prompts`.
        """
        texts, offsets = self._soft(offset[None])
        start = self._prompts(template, ["a"], offsets.shape[1]).start[1:]  # without [SOS]
        plain = len(start) - offsets.shape[1]
        context = texts.embed(start[plain:].to(self._device))
        context = context + torch.from_numpy(offsets[0]).to(self._device)
        words = torch.tensor(self._whole_words(), device=self._device)
        ids = [*start[:plain].tolist(), *texts.nearest(context, words).tolist()]
        return f"{self._tokenize.decode(ids).strip()} {template[template.index('{}') :]}"

    def check_texts(self, template: str, class_names: Sequence[str], context: int) -> None:
        """Check that every class prompt fits, as text and under a soft context of that length.

        Raises:
            InputError: a text is longer than the model's context, or runs into the class name.
        """
        self._token_ids([template.replace("{}", name) for name in class_names])
        if context:
            self._prompts(template, class_names, context)

    def _batches(self, images: Sequence[Image]) -> Iterator[tuple[int, Tensor, int]]:
        """(place of the first, batch of the one constant shape, pictures in it)."""
        with ThreadPoolExecutor(PREPROCESS_THREADS) as pool:
            for block in range(0, len(images), IMAGES_AHEAD):
                ready = list(pool.map(self._preprocess, images[block : block + IMAGES_AHEAD]))
                for at in range(0, len(ready), self._batch):
                    part = ready[at : at + self._batch]
                    fill = [torch.zeros_like(part[0])] * (self._batch - len(part))
                    yield block + at, torch.stack(part + fill), len(part)

    def _build_image_tower(self, visual: torch.nn.Module) -> None:
        """Make the tower fast: takes a second or more, so it waits for the first picture."""
        convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in visual.modules())
        self._batch = CONVOLUTIONAL_BATCH if convolutions > 4 else TRANSFORMER_BATCH
        example = self._example(self._batch)
        self._tower = fast_image_tower(visual, example)
        if not independent_of_place(self._tower, example):
            self._batch = 1
            self._tower = fast_image_tower(visual, example[:1])
        self._visual = None  # the tower has its own copy of the weights

    def _example(self, count: int) -> Tensor:
        """Pictures of coarse random patches, preprocessed: (count, 3, height, width)."""
        patches = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), np.uint8)
        pictures = [fromarray(patch).resize((256, 256)) for patch in patches]
        return torch.stack([self._preprocess(p) for p in pictures]).to(self._device)

    def _load_text_tower(self, model: Any) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self._texts: TextTower | None = None
        self.token_width: int | None = None
        self.token_std: float | None = None
        source = text_source(model)
        if source is None or not isinstance(self._tokenize, SimpleTokenizer):
            self._encode_text = model.encode_text
            return
        self._texts = TextTower(source)
        self.token_width = self._texts.width
        self.token_std = float(source.token_embedding.weight.std())
        if self._device.type == "cuda":
            self._halve_texts(source)

    def _halve_texts(self, source: Any) -> None:
        """Use bfloat16 for the texts where it says the same."""
        probes = ["a photo of a cat.", "a satellite photo of a river", "red", "an old oak tree."]
        exact, self._texts = self.encode_texts(probes), TextTower(source, torch.bfloat16)
        if np.abs(self.encode_texts(probes) - exact).max() > TOLERANCE:
            self._texts = TextTower(source)

    def _encode_ids(self, ids: Tensor, reads: Tensor) -> Tensor:
        """Token ids (n, context_length), end-of-text places (n,) -> (n, dim)."""
        if self._texts is None:
            with torch.inference_mode():
                return F.normalize(self._encode_text(ids.to(self._device)).float(), dim=-1)
        ids, reads = ids[:, : int(reads.max()) + 1].to(self._device), reads.to(self._device)
        return self._texts(self._texts.embed(ids[:1, :1]), ids[:, 1:], reads - 1)[0]

    def _token_ids(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (n, context_length) int64; none is cut."""
        for text, count in zip(texts, self._token_counts(texts), strict=True):
            self._check_length(text, count)
        ids: Tensor = self._tokenize(list(texts), context_length=self.context_length)
        return ids

    def _token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, marks included: where a long row differs from an empty text's."""
        rows = self._tokenize(["", *texts], context_length=8 * self.context_length)
        differs = rows[1:] != rows[:1]
        places = torch.arange(1, rows.shape[1] + 1)
        return [max(2, count) for count in (differs * places).max(dim=1).values.tolist()]

    def _check_length(self, text: str, count: int) -> None:
        if count > self.context_length:
            shown = repr(text if len(text) <= 80 else text[:77] + "...")
            raise InputError(
                f"the text {shown} has {count} tokens; the model's context holds "
                f"{self.context_length}. Shorten it: nothing is cut silently"
            )

    def _prompts(self, template: str, class_names: Sequence[str], n_ctx: int) -> _Prompts:
        """Tokenise each class prompt as a whole and split it before the class name."""
        if template.count("{}") != 1:
            raise InputError(
                f"the template {template!r} needs {{}} once, where the class name goes"
            )
        before = template[: template.index("{}")]
        head = self._words(before)
        texts = [template.replace("{}", name) for name in class_names]
        words = [self._words(text) for text in texts]
        filler = self._words(FILLER)
        missing = max(0, n_ctx - len(head))
        start = (filler * (missing // len(filler) + 1))[:missing] + head
        for text, ids in zip(texts, words, strict=True):
            if ids[: len(head)] != head:
                raise InputError(
                    f"the text {text!r} runs the words before the class name into it; "
                    f"put a space before {{}} in the template {template!r}"
                )
            self._check_length(text, 2 + missing + len(ids))
        sot, eot = self._tokenize.sot_token_id, self._tokenize.eot_token_id
        ends = [torch.tensor([*ids[len(head) :], eot]) for ids in words]
        return _Prompts(
            start=torch.tensor([sot, *start]),
            ends=torch.nn.utils.rnn.pad_sequence(ends, batch_first=True),
            reads=torch.tensor([len(end) - 1 for end in ends]),
        )

    def _soft(self, offsets: NDArray[np.float32]) -> tuple[TextTower, Floats]:
        """The tower that takes soft prompts, and offsets (n_candidates, n_ctx, token_width)."""
        if self._texts is None:
            raise InputError(
                f"{self.identity} has a text tower that takes no soft prompts (only causal CLIP "
                "towers do); use text prompts: --access scores or embeddings"
            )
        offsets = np.asarray(offsets, np.float32)
        if offsets.ndim != 3 or offsets.shape[2] != self.token_width:
            raise InputError(
                f"offsets have shape {offsets.shape}; wanted (n_candidates, n_ctx, "
                f"{self.token_width})"
            )
        return self._texts, offsets

    def _whole_words(self) -> list[int]:
        """Ids of the tokens that are a whole word of lower-case ASCII letters."""
        entries = self._tokenize.encoder.items()
        words = ((text.removesuffix("</w>"), text, token) for text, token in entries)
        return [
            token
            for word, text, token in words
            if word != text and word.isascii() and word.isalpha() and word.islower()
        ]

    def _words(self, text: str) -> list[int]:
        ids: list[int] = self._tokenize.encode(text)
        return ids


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; wanted auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported; wanted auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"no device {name!r}: torch sees {torch.cuda.device_count()} CUDA "
            "devices; use --device cpu"
        )
    return device


def _digest(model: torch.nn.Module) -> str:
    """16 hex digits over the names, the shapes and evenly spaced values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().flatten()
        step = max(1, -(-flat.numel() // SAMPLES))
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
