"""Class descriptions as class texts: asks a language model for them, and for their vectors.

The order of a run: the language model first (`describe`), then what its sentences are used for,
which is vectors (`described_readouts`) or columns of a bank (`observe.bank.make_bank`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.backend import Backend, Capabilities, Completion, TextEmbeddings, check_texts
from blackbox_vlm.errors import InputError
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import Floats, unit
from blackbox_vlm.plan import Step, make_step
from blackbox_vlm.prompts.describing import (
    COUNT,
    Descriptions,
    batches,
    instruction,
    merged,
    read_sentences,
)
from blackbox_vlm.prompts.templates import PLACE
from blackbox_vlm.task import Classes

PURPOSE = "describe"


def describe_step(writer: Capabilities, classes: Classes, count: int = COUNT) -> Step:
    """What `describe` will ask, to the query.

    Raises:
        InputError: the endpoint writes no text, or `count` is none that an answer can hold.
    """
    why = f"a language model says how {len(classes.names)} classes look, {count} sentences each"
    return make_step(PURPOSE, _asked(classes, count), writer, why)


async def describe(writer: Meter, classes: Classes, count: int = COUNT) -> Descriptions:
    """Sentences about how classes look, at most `count` each, from a language model.

    Args:
        writer: a meter over a backend of text access, on the ledger of the run.
        classes: names, and the template that tells of their domain.
        count: sentences that are asked for per class.

    Returns:
        by class name. A class whose answer was of no use is missing and keeps its templates.

    Raises:
        InputError: as `describe_step`; nothing was asked.
        BudgetError, Interrupted, BackendError: as `Meter.observe`.
    """
    answers = await writer.observe(_asked(classes, count), PURPOSE)
    texts = [answer.tobytes().decode("utf-8", "replace") for answer in answers]
    found = map(read_sentences, texts, batches(classes.names, count))
    return merged(found, classes.names, count)


def that_fit(backend: Backend, descriptions: Mapping[str, Sequence[str]]) -> Descriptions:
    """The descriptions that a model can read, as far as its backend knows; sends nothing."""
    fitting = {
        name: [text for text in texts if _fits(backend, text.replace(PLACE, name))]
        for name, texts in descriptions.items()
    }
    return {name: texts for name, texts in fitting.items() if texts}


def texts_of(lists: Sequence[Sequence[str]], described: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The different texts of templates and descriptions, as `described_readouts` asks for them."""
    return tuple(dict.fromkeys(text for texts in (*lists, *described) for text in texts))


def placeholders(classes: Classes, count: int = COUNT) -> tuple[tuple[str, ...], ...]:
    """As many texts as will be written at most, to plan with before they are.

    Each holds a line break, and so is none of the texts that are asked for anyway.
    """
    return tuple(tuple(f"{name}\n{n}" for n in range(count)) for name in classes.names)


async def described_readouts(
    meter: Meter,
    lists: Sequence[Sequence[str]],
    described: Sequence[Sequence[str]],
    purpose: str,
) -> Floats:
    """Ask for the vectors of templates' and descriptions' texts: readouts of images' vectors.

    Args:
        meter: over an endpoint that embeds.
        lists: the class texts under each template, `n_templates` times one text per class.
        described: the descriptions of each class, in label order; a class may have none.
        purpose: of the queries.

    Returns:
        `(n_templates + 1, dim, n_classes)` float32: as `observations.text_readouts`, and last that
        of the descriptions, each class's mean made a unit vector. A class without any has the mean
        of its templates there.

    Raises:
        as `Meter.observe`.
    """
    texts = texts_of(lists, described)
    [answer] = await meter.observe([TextEmbeddings(texts)], purpose)
    vectors = dict(zip(texts, unit(answer), strict=True))
    templates = np.stack([[vectors[text] for text in texts] for texts in lists])
    means = [
        np.mean([vectors[text] for text in own] if own else templates[:, label], axis=0)
        for label, own in enumerate(described)
    ]
    every = np.concatenate([templates, unit(np.stack(means))[None]])
    return _as_readout(every, meter.capabilities.logit_scale)


def evenly(readouts: Floats, scale: float) -> Floats:
    """One readout in which the templates weigh as much as the descriptions, `(dim, n_classes)`.

    On seven development sets without labels (the embedded model, 3 to 5 descriptions per class in
    five wordings) classes evened out came from 32.7 % with 16 templates to 35.0 to 36.0 %;
    descriptions alone were at 25.6 to 35.1 %, lowest where they named no class. After CoFT it was
    38.2 % with templates, 41.2 % with both, and 39.3 % with both where they named no class.

    Args:
        readouts: as `described_readouts` returns them.
        scale: the endpoint's logit scale.
    """
    templates = unit(readouts[:-1].mean(axis=0).T)
    return _as_readout(unit(templates + unit(readouts[-1].T)), scale)


def _as_readout(vectors: NDArray[np.float32], scale: float) -> Floats:
    """Text vectors `(..., n_texts, dim)` as what makes logits of images' vectors."""
    return np.asarray(np.swapaxes(vectors, -1, -2) * scale, dtype=np.float32)


def _asked(classes: Classes, count: int) -> list[Completion]:
    return [
        Completion(instruction(batch, classes.names, classes.template, count))
        for batch in batches(classes.names, count)
    ]


def _fits(backend: Backend, text: str) -> bool:
    try:
        check_texts(backend, PLACE, (text,))
    except InputError:
        return False
    return True
