"""Which texts to ask an image about, beside the names of its classes (ours).

An image's score against a text is one linear measurement of the image's vector. The class names
alone give as many measurements as there are classes; a bank adds words, so that one request tells
much of what the vector would. The words stand in `data/words.txt`, ordered so that every beginning
of the list spreads well, by vectors that have nothing to do with any image model.

What was measured on the development sets (see choose.py) with the embedded model: everyday words
and random WordNet nouns do alike; more templates for the classes add nothing to the features, and
averaging them makes the zero-shot classifier no better than the user's own template alone. How many
texts there are matters (`bank_size`), and how their scores become features matters most
(features.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.backend import Capabilities, ScoreKind
from blackbox_vlm.craft.guard import stratified_folds
from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.calibration import log_loss
from blackbox_vlm.observe.choose import choose
from blackbox_vlm.observe.ensemble import Ensemble, ensemble_logits
from blackbox_vlm.observe.observation import Observation
from blackbox_vlm.scores import accuracy_of, centred

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

WORD_TEMPLATE = "a photo of a {}."
FREE_TEXTS = 512  # twice as many add less than a point of accuracy
ROUNDED_TEXTS = 256  # of a softmax: among more, each probability keeps too few digits
BILLED_TEXTS = 128  # the gain per text falls from here
COARSE = 5  # decimals up to which a softmax over many texts is called rounded
FLOOR = 0.1  # in mean variances of a text: of this size is what pruning takes for noise
FOLDS = 4  # of the measurement of a pruning


class Bank(NamedTuple):
    """The texts of one observation, and how zero-shot logits are read from their scores.

    Attributes:
        texts: `(K,)`, distinct; the first `n_classes` are the classes in the user's own template.
        readout: `(K, n_classes)` float32: `scores @ readout` are the zero-shot logits, the mean of
            those under the template and under the descriptions where a class has some.
    """

    texts: tuple[str, ...]
    readout: Floats


def make_bank(
    class_names: Sequence[str],
    template: str,
    capabilities: Capabilities,
    *,
    size: int | None = None,
    descriptions: Sequence[Sequence[str]] = (),
) -> Bank:
    """The classes in `template`, then words, `size` texts in all (or fewer: the list is finite).

    Descriptions take the place of words, as many of every class as leave room for the same number
    of each, so that what the texts cost does not depend on what they say.

    Args:
        class_names: distinct.
        template: the user's, with `{}` for the name.
        capabilities: of the endpoint; they decide the size.
        size: overrides `bank_size`.
        descriptions: texts of each class, in label order; a class may have none.

    Raises:
        InputError: the template has no place for a name, two classes make the same text, or `size`
            leaves out a class.
    """
    if "{}" not in template:
        raise InputError(f"template {template!r} has no place for a class name; write {{}} in it")
    classes = [template.replace("{}", name) for name in class_names]
    if len(set(classes)) < len(classes) or not classes:
        raise InputError(f"wanted distinct class names, at least one; got {', '.join(class_names)}")
    size = bank_size(len(classes), capabilities) if size is None else size
    if size < len(classes):
        raise InputError(f"a bank of {size} texts leaves out some of {len(classes)} classes")
    room = size // len(classes) - 1
    described = [tuple(dict.fromkeys(texts))[:room] for texts in descriptions]
    spread = (WORD_TEMPLATE.replace("{}", word) for word in words())
    texts = tuple(dict.fromkeys([*classes, *chain(*described), *spread]))[:size]
    return Bank(texts, _readout(texts, len(classes), described))


def _readout(texts: Sequence[str], n_classes: int, described: Sequence[Sequence[str]]) -> Floats:
    """Each class's own text, and the mean of its descriptions with the same weight if it has any.

    On the development sets of `describing.evenly`, classes evened out came from 32.4 % to 34.7 and
    35.8 % so; with one weight for every text, to 34.2 and 31.4 %.
    """
    readout = np.eye(len(texts), n_classes, dtype=np.float32)
    place = {text: at for at, text in enumerate(texts)}
    for label, own in enumerate(described):
        if own:
            readout[label, label] = 0.5
        for text in own:
            readout[place[text], label] += 0.5 / len(own)
    return readout


def bank_size(n_classes: int, capabilities: Capabilities) -> int:
    """How many texts are worth asking about, in as few requests as the classes alone need.

    A request costs the same however many texts it carries, up to the endpoint's limit, which is
    therefore filled. Four things speak for fewer:

    - a softmax shown with few decimals: each text beside lowers the others' probabilities, and with
      them their digits (4 decimals: 256 texts did better than 1,000);
    - top-k: what is not shown is a guess (with 20 shown, 20 texts did better than 30 or 1,000);
    - texts that are billed;
    - nothing is gained beyond `FREE_TEXTS`.
    """
    best = FREE_TEXTS
    softmax = capabilities.score_kind is ScoreKind.SOFTMAX
    if softmax and capabilities.decimals is not None and capabilities.decimals <= COARSE:
        best = min(best, ROUNDED_TEXTS)
    if capabilities.price is not None and capabilities.price.per_text > 0:
        best = min(best, BILLED_TEXTS)
    if capabilities.top_k is not None:
        best = min(best, capabilities.top_k)
    if capabilities.texts_per_request is not None:
        best = min(best, _filled(n_classes, capabilities.texts_per_request, anchors=int(softmax)))
    return max(n_classes, best)


def _filled(n_classes: int, limit: int, *, anchors: int) -> int:
    """How many texts fill the requests that the classes need; each repeats the anchors."""
    fresh = max(limit - anchors, 1)
    requests = max(-(-(n_classes - anchors) // fresh), 1)
    return anchors + requests * fresh


@cache
def words() -> tuple[str, ...]:
    """The word list, most spreading first."""
    text = (files("blackbox_vlm") / "data" / "words.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


class Held(NamedTuple):
    """How well images are predicted that nothing has learned from; log loss in nats."""

    accuracy: float
    log_loss: float


class Pruning(NamedTuple):
    """Which texts are kept, and what leaving out the others costs.

    Attributes:
        kept: `(size,)` indices into the bank, the classes first.
        before, after: out-of-fold, with all texts, and with as many as `kept` chosen without the
            held-out images.
    """

    kept: NDArray[np.int64]
    before: Held
    after: Held


def prune(
    observation: Observation,
    labels: Labels,
    size: int,
    *,
    seed: int,
    only: Sequence[str] | None = None,
) -> Pruning:
    """Keep the classes and the texts from which the classifier is best predicted; measure the loss.

    The loss is that of the whole procedure: in every fold the classifier, the texts and the
    classifier of the texts are made without the images that judge them.

    Args:
        observation: of the training images, `(n, K)` scores of a bank.
        labels: `(n,)`.
        size: how many texts stay, at least one per class.
        seed: of the folds.
        only: the heads that may take part, as in `choose`.

    Raises:
        InputError: `size` leaves out a class, or is more than there is; no class has two images.
    """
    n_texts, n_classes = observation.readout.shape
    if not n_classes <= size <= n_texts:
        raise InputError(f"wanted {n_classes} (the classes) to {n_texts} texts to stay, got {size}")
    counts = np.bincount(labels, minlength=n_classes)
    if counts.max() < 2:
        raise InputError("what texts contribute cannot be judged on one image per class; keep all")
    folds = stratified_folds(labels, int(min(FOLDS, counts.max())), seed)
    shown = np.empty((2, len(labels), n_classes), dtype=np.float32)
    for fold in np.unique(folds):
        held = folds == fold
        _, *classifiers = _reduced(observation.of(~held), labels[~held], size, seed, only)
        for logits, (texts, ensemble) in zip(shown, classifiers, strict=True):
            logits[held] = ensemble_logits(ensemble, reduced(observation.answers[held], texts))
    kept, _, _ = _reduced(observation, labels, size, seed, only)
    return Pruning(kept, *(_held(logits, labels) for logits in shown))


_Classifier = tuple[NDArray[np.int64], Ensemble]  # the texts that it reads


def _reduced(
    observation: Observation, labels: Labels, size: int, seed: int, only: Sequence[str] | None
) -> tuple[NDArray[np.int64], _Classifier, _Classifier]:
    """The texts to keep, and the classifiers of all texts and of these."""
    whole, _ = choose(observation, labels, seed=seed, only=only)
    target = ensemble_logits(whole, observation.answers)
    n_texts, n_classes = observation.readout.shape
    kept = predictive(observation.answers, target, size, first=n_classes)
    left = Observation(reduced(observation.answers, kept), observation.readout[kept])
    smaller, _ = choose(left, labels, seed=seed, only=only)
    return kept, (np.arange(n_texts), whole), (kept, smaller)


def reduced(answers: Floats, kept: NDArray[np.int64]) -> Floats:
    """Answers `(n, K)` as they are when only the kept texts are asked about: centred over them."""
    return centred(answers[:, kept])


def _held(logits: Floats, labels: Labels) -> Held:
    return Held(accuracy_of(logits, labels), float(log_loss(logits, labels).mean()))


def restrict(bank: Bank, kept: NDArray[np.int64]) -> Bank:
    """The bank of the kept texts."""
    return Bank(tuple(bank.texts[index] for index in kept), bank.readout[kept])


def predictive(answers: Floats, target: Floats, size: int, *, first: int = 0) -> NDArray[np.int64]:
    """The columns of `answers` from which `target` is best predicted linearly, one after the other.

    Simultaneous orthogonal matching pursuit (Tropp, Gilbert, Strauss, "Algorithms for Simultaneous
    Sparse Approximation", Signal Processing 2006): each step takes the column that explains most of
    what the earlier ones leave of the target. Ours: a column of which little is left counts less,
    because that little is noise.

    Args:
        answers: `(n, K)`.
        target: `(n, m)`.
        size: how many columns to take.
        first: so many first columns are taken before any choice.
    """
    rest, goal = _centred_columns(answers), _centred_columns(target)
    floor = max(FLOOR * float((rest**2).sum(axis=0).mean()), np.finfo(np.float64).tiny)
    taken = np.empty(size, dtype=np.int64)
    for step in range(size):
        length = (rest**2).sum(axis=0) + floor
        gain = ((rest.T @ goal) ** 2).sum(axis=1) / length
        gain[taken[:step]] = -1
        column = step if step < first else int(gain.argmax())
        taken[step] = column
        direction = rest[:, column] / np.sqrt(length[column])
        goal -= np.outer(direction, direction @ goal)
        rest -= np.outer(direction, direction @ rest)
    return taken


def _centred_columns(values: Floats) -> NDArray[np.float64]:
    return np.asarray(values - values.mean(axis=0, dtype=np.float64))
