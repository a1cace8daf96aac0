"""Votes: what is learned from an endpoint that only names the best of some texts (ours).

An answer is one of the texts that were offered, and nothing more. But nobody says that the texts
must be the classes: "which of these colours", "which of these tools" is answered as well, and
images of one class tend to get the same answer, sensible or not. So an image is described by its
votes on a few lists of words (`questions.py`) beside its vote on the classes, and naive Bayes makes
logits of them. It is the one head here: on votes it was better than those of `choose.py`, by 2 to 4
points with five questions, and only it kept what zero-shot knows.

Each question is one query per image, at every prediction too. The plain question stays, so that
what is deployed starts from the endpoint's own label. Where not all may be asked, the others are
chosen greedily by out-of-fold log loss, while it falls. (To stop where one standard error cannot
tell more questions from fewer saved one query per prediction and cost 2 to 3 points at 2 and 4
images per class: among so few images the error is large.) Where all may be asked, for instance
because a query carries all images, all are: to choose would lose 2 to 5 points.

How many to keep was fixed on the training images of the development sets that `choose.py` names.
Tried there and given up, as words told more per query: the classes under other templates, halves of
the classes, the classes without those that attract every image, words drawn at random, and all
words in one list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blackbox_vlm.craft.guard import stratified_folds
from blackbox_vlm.errors import InputError
from blackbox_vlm.observe import naive_bayes
from blackbox_vlm.observe.ballots import label_confidence, question_columns, vote_readout
from blackbox_vlm.observe.calibration import calibrate, log_loss
from blackbox_vlm.observe.choose import HEADS, ZERO_SHOT, Choice, zero_shot_wins
from blackbox_vlm.observe.ensemble import Ensemble, Member, flatten
from blackbox_vlm.observe.features import FeatureMap
from blackbox_vlm.observe.heads import Doubles, Floats, Labels, Seen, as_float32, class_counts
from blackbox_vlm.observe.naive_bayes import evidence, weight
from blackbox_vlm.observe.observation import Observation
from blackbox_vlm.observe.pooling import scaled_loss
from blackbox_vlm.scores import accuracy_of

MOST_QUESTIONS = 5  # for a prediction
FOLDS = 5


class Chosen(NamedTuple):
    """Which questions to ask for a prediction, and what to make of the answers.

    Attributes:
        kept: their indices among the candidates; the first is the plain question.
        ensemble: reads the one-hot votes on them, in this order.
        choice: the evidence: "heads" is what is deployed unless "zero-shot" is, and "3 questions"
            is what the first three of those chosen come to, also where fewer are kept. Without
            figures where no class has a second image: then the first candidates are kept, in their
            own order.
    """

    kept: tuple[int, ...]
    ensemble: Ensemble
    choice: Choice


def choose_questions(
    answers: Floats,
    labels: Labels,
    sizes: Sequence[int],
    n_classes: int,
    *,
    most: int = MOST_QUESTIONS,
    seed: int,
) -> Chosen:
    """Choose up to `most` questions to ask for a prediction, and fit what reads the answers.

    Args:
        answers: one-hot votes on all candidates, `(n, sum of sizes)`, see `ballots.encode_votes`.
        labels: `(n,)`.
        sizes: texts of each question; the first lists the classes.
        n_classes: C.
        most: questions for a prediction, the plain one among them; at least 1.
        seed: of the folds.

    Returns:
        the questions, their classifier and the evidence, which is the best of a few and therefore
        flattered a little, unless all are kept.

    Raises:
        InputError: answers or labels that do not fit.
    """
    _check(answers, labels, sizes, n_classes)
    order, most = list(range(len(sizes))), max(1, min(most, len(sizes)))
    zero_shot = _plain(answers, labels, sizes, n_classes)
    if class_counts(labels, n_classes).max() < 2:
        choice = Choice(HEADS, {}, {}, {ZERO_SHOT: zero_shot}, len(labels), None)
        return _fitted(answers, labels, sizes, tuple(order[:most]), choice)
    said = _out_of_fold(answers, labels, sizes, n_classes, seed)
    if most < len(sizes):
        order = _greedy(said, labels, most)
    pools = [as_float32(_pooled(said, order[:length])) for length in range(1, most + 1)]
    losses = [scaled_loss(pool, labels) for pool in pools]
    enough = most if most == len(sizes) else int(np.argmin(losses)) + 1
    choice = _judge(zero_shot, pools, enough, labels, seed)
    kept = tuple(order[:enough]) if choice.chosen == HEADS else (0,)
    return _fitted(answers, labels, sizes, kept, choice)


def _check(answers: Floats, labels: Labels, sizes: Sequence[int], n_classes: int) -> None:
    if answers.shape[1:] != (sum(sizes),) or list(sizes[:1]) != [n_classes]:
        raise InputError(
            f"got answers {answers.shape} to lists of {list(sizes)} texts; wanted a column for "
            f"each text, and the {n_classes} classes as the first list"
        )
    if len(labels) != len(answers) or not len(labels):
        raise InputError(f"got {len(labels)} labels for {len(answers)} images; wanted one for each")
    if labels.min() < 0 or labels.max() >= n_classes:
        raise InputError(f"wanted labels from 0 to {n_classes - 1}, got {labels.tolist()[:9]}")


def _plain(answers: Floats, labels: Labels, sizes: Sequence[int], n_classes: int) -> Floats:
    right = label_confidence(answers[:, :n_classes], labels)
    return Observation(answers, vote_readout(sizes, n_classes, right)).zero_shot


def _out_of_fold(
    answers: Floats, labels: Labels, sizes: Sequence[int], n_classes: int, seed: int
) -> Doubles:
    """What every question adds to every image's logits, learned from other images, `(Q, n, C)`."""
    n_folds = min(FOLDS, int(class_counts(labels, n_classes).max()))
    folds = stratified_folds(labels, n_folds, seed)
    said = np.empty((len(sizes), len(labels), n_classes))
    for fold in range(n_folds):
        held = folds == fold
        table = evidence(answers[~held], labels[~held], sizes, n_classes)
        for question in range(len(sizes)):
            columns = question_columns(sizes, [question])
            said[question, held] = answers[held][:, columns] @ table[columns]
    return said


def _greedy(said: Doubles, labels: Labels, most: int) -> list[int]:
    """Questions in the order in which each lowers the log loss most, after the plain one."""
    order, rest = [0], list(range(1, len(said)))
    while len(order) < most:
        best = min(rest, key=lambda q: float(log_loss(_pooled(said, [*order, q]), labels).mean()))
        order.append(best)
        rest.remove(best)
    return order


def _pooled(said: Doubles, questions: Sequence[int]) -> Doubles:
    """The logits of some questions, `(n, C)`, as `naive_bayes.fit` weighs them."""
    plain, *others = questions
    pooled: Doubles = said[plain] + weight(len(questions)) * said[others].sum(axis=0)
    return pooled


def _judge(
    zero_shot: Floats, pools: Sequence[Floats], enough: int, labels: Labels, seed: int
) -> Choice:
    """Whether the evidence or the bare label is deployed; figures for every number of questions."""
    shown = {ZERO_SHOT: zero_shot, HEADS: pools[enough - 1]}
    all_shown = {**shown, **{f"{n} questions": p for n, p in enumerate(pools, 1)}}
    accuracy = {n: accuracy_of(v, labels) for n, v in all_shown.items()}
    loss = {name: scaled_loss(values, labels) for name, values in all_shown.items()}
    chosen = ZERO_SHOT if zero_shot_wins(accuracy, loss) else HEADS
    calibration = calibrate(shown[chosen], labels, seed=seed)
    return Choice(chosen, accuracy, loss, shown, len(labels), calibration)


def _fitted(
    answers: Floats, labels: Labels, sizes: Sequence[int], kept: tuple[int, ...], choice: Choice
) -> Chosen:
    """The classifier of the answers to the questions kept, fitted to all images."""
    n_classes, asked = sizes[0], [sizes[q] for q in kept]
    votes = answers[:, question_columns(sizes, kept)]
    right = label_confidence(votes[:, :n_classes], labels)
    observation = Observation(votes, vote_readout(asked, n_classes, right))
    temperature = choice.calibration.temperature if choice.calibration else 1.0
    ensemble = Ensemble(observation.readout, (), prior=1.0, temperature=temperature)
    if choice.chosen == HEADS:
        fitted = naive_bayes.fit(Seen(votes, observation.zero_shot), labels, sizes=asked)
        n_answers = votes.shape[1]
        as_it_is = FeatureMap(np.zeros(n_answers, np.float32), np.eye(n_answers, dtype=np.float32))
        head = Member(as_it_is, fitted, 1.0)
        ensemble = flatten(ensemble._replace(members=(head,), prior=0.0))
    return Chosen(kept, ensemble, choice)
