"""What is asked about images, and what the answers look like to a method.

A `Question` is asked about every image alike, while tuning and while predicting. Its answers are
numbers per image, `(n_images, K)` float32, whatever the access level: a unit vector, centred logits
of texts, or votes. A readout `(K, n_classes)` makes the endpoint's own logits of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

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
from blackbox_vlm.batching import distinct
from blackbox_vlm.images import Image
from blackbox_vlm.meter import Meter
from blackbox_vlm.observe.ballots import encode_votes, vote_readout
from blackbox_vlm.observe.naive_bayes import CONFIDENCE
from blackbox_vlm.scores import centred
from blackbox_vlm.task import Classes

Floats = NDArray[np.float32]
Logits = Floats


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked about an image.

    Attributes:
        lists: texts to be scored, or to choose from; an observation each. None where vectors are
            asked for, or scores under a soft prompt.
        offset: `A z` of a soft prompt, `(context_tokens, width)` float32, or None.
    """

    lists: tuple[tuple[str, ...], ...] = ()
    offset: NDArray[np.float32] | None = None

    def requests(
        self, images: tuple[Image, ...], classes: Classes, access: Access
    ) -> list[Request]:
        """The observations, of any size, that answer it for these images."""
        if self.offset is not None:
            return prompt_requests(images, classes, self.offset[None])
        if access is Access.EMBEDDINGS:
            return [ImageEmbeddings(images)]
        kind = Labels if access is Access.LABEL else TextScores
        return [kind(images, texts) for texts in self.lists]

    def queries(
        self, images: tuple[Image, ...], classes: Classes, capabilities: Capabilities
    ) -> int:
        """How many requests are sent to answer it for these images."""
        return len(distinct(self.requests(images, classes, capabilities.access), capabilities))


async def ask(
    meter: Meter,
    question: Question,
    images: tuple[Image, ...],
    classes: Classes,
    purpose: str,
) -> Floats:
    """The answers `(n_images, K)` to a question."""
    access = meter.capabilities.access
    arrays = await meter.observe(question.requests(images, classes, access), purpose)
    if access is Access.EMBEDDINGS:
        return unit(arrays[0])
    if access is Access.LABEL:
        return encode_votes(np.stack(arrays, axis=1), [len(texts) for texts in question.lists])
    return np.concatenate([centred(array) for array in arrays], axis=1)


def plain_question(access: Access, classes: Classes) -> Question:
    """What the endpoint's own prediction is read from."""
    return Question() if access is Access.EMBEDDINGS else Question((classes.texts,))


async def plain_readout(meter: Meter, classes: Classes, purpose: str) -> Floats:
    """What makes zero-shot logits of the answers to `plain_question`, `(K, n_classes)`.

    Asks for the class texts' vectors where the access level is embeddings, and nothing elsewhere.
    """
    access = meter.capabilities.access
    if access is Access.EMBEDDINGS:
        readout: Floats = (await text_readouts(meter, [classes.texts], purpose))[0]
        return readout
    return class_readout(access, len(classes.names))


def class_readout(access: Access, n_classes: int) -> Floats:
    """What makes zero-shot logits of scores of the classes, or of votes on them, `(C, C)`."""
    if access is Access.LABEL:
        return vote_readout([n_classes], n_classes, CONFIDENCE)
    return np.eye(n_classes, dtype=np.float32)


async def text_readouts(meter: Meter, lists: Sequence[Sequence[str]], purpose: str) -> Floats:
    """Ask for texts' vectors: the readouts of images' vectors, `(n_lists, dim, n_texts)`."""
    texts, places = together(lists)
    [vectors] = await meter.observe([TextEmbeddings(texts)], purpose)
    scale = meter.capabilities.logit_scale
    return np.stack([np.asarray(unit(vectors[at]).T * scale, dtype=np.float32) for at in places])


def together(lists: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Lists of equally many texts as one question.

    Returns:
        the different texts, and where among them each list's stand, `(n_lists, n_texts)`.
    """
    place = {text: at for at, text in enumerate(dict.fromkeys(chain.from_iterable(lists)))}
    return tuple(place), np.array([[place[text] for text in texts] for texts in lists])


async def plain_logits(
    meter: Meter, images: tuple[Image, ...], classes: Classes, purpose: str
) -> Logits:
    """Zero-shot logits, centred per image, `(n_images, n_classes)` float32."""
    question = plain_question(meter.capabilities.access, classes)
    answers = await ask(meter, question, images, classes, purpose)
    return centred(answers @ await plain_readout(meter, classes, purpose))


def plain_requests(
    capabilities: Capabilities, images: tuple[Image, ...], classes: Classes
) -> list[Request]:
    """The observations behind the plain predictions, by access level."""
    asked = plain_question(capabilities.access, classes).requests(
        images, classes, capabilities.access
    )
    texts = [TextEmbeddings(classes.texts)] if capabilities.access is Access.EMBEDDINGS else []
    return [*asked, *texts]


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


def unit(vectors: Array) -> Floats:
    """Rows divided by their length; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)
