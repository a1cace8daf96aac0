"""What the endpoint says of a task's images, as centred logits, whatever its access level.

The two questions that everything else is made of: the plain predictions under the task's own texts,
and the predictions under soft prompts. Both go through the meter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.backend import (
    Access,
    Array,
    Capabilities,
    ImageEmbeddings,
    Labels,
    PromptScores,
    Request,
    TextEmbeddings,
    TextScores,
)
from blackbox_vlm.images import Image
from blackbox_vlm.meter import Meter
from blackbox_vlm.scores import centred
from blackbox_vlm.task import Classes

Logits = NDArray[np.float32]

LABEL_CONFIDENCE = 0.9  # what a bare label is worth as a probability; nothing better is known


def plain_requests(
    capabilities: Capabilities, images: tuple[Image, ...], classes: Classes
) -> list[Request]:
    """The observations behind the plain predictions, by access level."""
    if capabilities.access is Access.EMBEDDINGS:
        return [ImageEmbeddings(images), TextEmbeddings(classes.texts)]
    if capabilities.access is Access.LABEL:
        return [Labels(images, classes.texts)]
    return [TextScores(images, classes.texts)]


async def plain_logits(
    meter: Meter, images: tuple[Image, ...], classes: Classes, purpose: str
) -> Logits:
    """Zero-shot logits, centred per image, `(n_images, n_classes)` float32."""
    capabilities = meter.capabilities
    arrays = await meter.observe(plain_requests(capabilities, images, classes), purpose)
    if capabilities.access is Access.EMBEDDINGS:
        return _cosine_logits(arrays[0], arrays[1], capabilities.logit_scale)
    if capabilities.access is Access.LABEL:
        return label_logits(arrays[0], len(classes.names))
    return centred(arrays[0])


def prompt_requests(
    images: tuple[Image, ...], classes: Classes, offsets: NDArray[np.float32]
) -> list[Request]:
    """One observation per soft prompt; `offsets` is `(n_prompts, context_tokens, width)`."""
    return [PromptScores(images, classes.names, classes.template, offset) for offset in offsets]


async def prompt_logits(
    meter: Meter,
    images: tuple[Image, ...],
    classes: Classes,
    offsets: NDArray[np.float32],
    purpose: str,
) -> Logits:
    """Logits under each soft prompt, centred, `(n_prompts, n_images, n_classes)` float32."""
    requests = prompt_requests(images, classes, offsets)
    return centred(np.stack(await meter.observe(requests, purpose)))


def label_logits(labels: Array, n_classes: int) -> Logits:
    """A bare label as logits: `LABEL_CONFIDENCE` on it, the rest shared evenly.

    `NO_LABEL` says nothing of any class: its row is zero.
    """
    margin = np.log(LABEL_CONFIDENCE / (1 - LABEL_CONFIDENCE) * (n_classes - 1))
    chosen = (labels[:, None] == np.arange(n_classes)).astype(np.float32)
    return centred(chosen * np.float32(margin))


def _cosine_logits(images: Array, texts: Array, scale: float) -> Logits:
    return centred(_unit(images) @ _unit(texts).T * np.float32(scale))


def _unit(vectors: Array) -> Array:
    unit: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit
