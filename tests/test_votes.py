"""Label endpoints: what to ask them, what their votes are worth, and which questions to keep."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from doubles import declare, images
from numpy.typing import NDArray

from blackbox_vlm.backend import NO_LABEL, Access, Capabilities, Labels
from blackbox_vlm.batching import distinct
from blackbox_vlm.craft.guard import stratified_folds
from blackbox_vlm.errors import InputError
from blackbox_vlm.observe import naive_bayes
from blackbox_vlm.observe.ballots import (
    encode_votes,
    label_confidence,
    question_columns,
    vote_readout,
)
from blackbox_vlm.observe.choose import HEADS, ZERO_SHOT
from blackbox_vlm.observe.ensemble import ensemble_logits
from blackbox_vlm.observe.heads import Seen, logits
from blackbox_vlm.observe.naive_bayes import SMOOTHING, confidence, evidence, margin, weight
from blackbox_vlm.observe.observation import Observation
from blackbox_vlm.observe.questions import (
    affordable_questions,
    candidate_questions,
    n_candidates,
    question_queries,
    word_questions,
)
from blackbox_vlm.observe.votes import Chosen, choose_questions
from blackbox_vlm.scores import predicted

Ints = NDArray[np.int64]

N_CLASSES = 4
WORDS = 6  # texts of a question about words


def votes_of(
    labels: Ints, telling: dict[int, float], n_questions: int, *, right: float, seed: int
) -> Ints:
    """Votes `(n, n_questions)` of an endpoint.

    Its vote on the classes is right with probability `right`, and else for class 0. A question in
    `telling` gets the class's own word so often, and any word else; the others get any word.
    """
    random = np.random.default_rng(seed)
    n = len(labels)
    columns = [np.where(random.random(n) < right, labels, 0)]
    for question in range(1, n_questions):
        own = random.random(n) < telling.get(question, 0.0)
        columns.append(np.where(own, (labels + question) % WORDS, random.integers(WORDS, size=n)))
    return np.stack(columns, axis=1).astype(np.int64)


def sizes_of(n_questions: int) -> list[int]:
    return [N_CLASSES, *[WORDS] * (n_questions - 1)]


def balanced(shots: int) -> Ints:
    return np.repeat(np.arange(N_CLASSES), shots)


def choose(votes: Ints, labels: Ints, *, most: int, seed: int = 0) -> Chosen:
    sizes = sizes_of(votes.shape[1])
    return choose_questions(
        encode_votes(votes, sizes), labels, sizes, N_CLASSES, most=most, seed=seed
    )


def accuracy(chosen: Chosen, votes: Ints, labels: Ints) -> float:
    """Of what a prediction makes of the votes on the questions kept."""
    kept = list(chosen.kept)
    answers = encode_votes(votes[:, kept], [sizes_of(votes.shape[1])[q] for q in kept])
    return float((predicted(ensemble_logits(chosen.ensemble, answers)) == labels).mean())


# -- votes as an observation -------------------------------------------------------------------


def test_a_vote_is_one_hot_and_no_label_says_nothing() -> None:
    answers = encode_votes(np.array([[2, 0], [NO_LABEL, 1]]), [3, 2])
    assert answers.dtype == np.float32
    assert answers.tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("votes", [[[3, 0]], [[0, 2]], [[0, -2]], [[0, 0, 0]], [0, 0]])
def test_votes_for_what_was_not_offered_are_refused(votes: list[object]) -> None:
    with pytest.raises(InputError):
        encode_votes(np.array(votes), [3, 2])


@pytest.mark.parametrize("right", [0.3, 0.6, 0.95])
def test_a_bare_label_is_worth_its_probability_of_being_right(right: float) -> None:
    answers = encode_votes(np.array([[1, 0], [NO_LABEL, 2]]), [4, 3])
    zero_shot = Observation(answers, vote_readout([4, 3], 4, right)).zero_shot
    probabilities = np.exp(zero_shot) / np.exp(zero_shot).sum(axis=1, keepdims=True)
    assert probabilities[0, 1] == pytest.approx(right, abs=1e-5)
    assert np.allclose(probabilities[0, [0, 2, 3]], (1 - right) / 3, atol=1e-5)
    assert predicted(zero_shot).tolist() == [1, NO_LABEL]


def test_the_probability_of_being_right_is_counted_among_labels_that_were_given() -> None:
    labels = np.array([0, 1, 2, 3, 0, 0])
    votes = encode_votes(np.array([[0], [1], [2], [0], [NO_LABEL], [0]]), [4])
    assert label_confidence(votes, labels) == pytest.approx(confidence(4, 5))
    assert confidence(0, 0) == pytest.approx(0.9)  # before any is checked
    assert confidence(300, 1000) == pytest.approx(0.3, abs=0.01)  # the images decide


def test_a_label_that_is_wrong_more_often_than_chance_is_ignored() -> None:
    assert margin(0.1, 4) == 0.0
    assert margin(0.4, 4) == pytest.approx(math.log(2))


# -- evidence ----------------------------------------------------------------------------------


def test_evidence_is_the_smoothed_log_ratio() -> None:
    """Two classes and a question of two words: every number by hand."""
    votes = np.array([[0, 0], [0, 0], [0, 1], [1, 1]])
    labels = np.array([0, 0, 1, 1])
    table = evidence(encode_votes(votes, [2, 2]), labels, [2, 2], 2)

    right = (3 + 5 * 0.9) / (4 + 5)
    odds = right / (1 - right)
    p0, p1 = 4 / 6, 2 / 6  # of a vote for class 0 and 1, with one image added to each
    wanted = math.log((2 + SMOOTHING * p0 * odds / (p0 * odds + p1)) / (2 + SMOOTHING) / p0)
    assert table[0, 0] == pytest.approx(wanted)
    wanted = math.log((1 + SMOOTHING * p0 / (p0 + p1 * odds)) / (2 + SMOOTHING) / p0)
    assert table[0, 1] == pytest.approx(wanted)
    word = math.log((2 + SMOOTHING / 2) / (0 + SMOOTHING / 2))  # class 0 rather than class 1
    assert table[2, 0] - table[2, 1] == pytest.approx(word)


def test_with_many_images_evidence_is_the_confusion_matrix() -> None:
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.full(WORDS, 10.0), size=N_CLASSES)  # of the words, by class
    labels = balanced(20_000)
    words = np.concatenate([random.choice(WORDS, 20_000, p=share) for share in shares])
    votes = np.stack([np.zeros_like(labels), words], axis=1)
    table = evidence(encode_votes(votes, sizes_of(2)), labels, sizes_of(2), N_CLASSES)[N_CLASSES:]
    expected = np.log(shares.T)
    expected -= expected.mean(axis=1, keepdims=True)
    assert np.allclose(table, expected, atol=0.05)


def test_a_word_says_nothing_of_a_class_without_images() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    votes = np.stack([labels, [0, 0, 1, 1, 2, 2]], axis=1)
    table = evidence(encode_votes(votes, sizes_of(2)), labels, sizes_of(2), N_CLASSES)
    assert np.allclose(table[N_CLASSES:, 3], 0)
    assert np.allclose(table[N_CLASSES:, :3].sum(axis=1), 0)
    assert table[3].argmax() == 3  # but its own name still does


def test_the_head_is_linear_and_without_a_vote_silent() -> None:
    labels = balanced(5)
    votes = votes_of(labels, {1: 0.8, 2: 0.8}, 3, right=0.5, seed=1)
    sizes = sizes_of(3)
    answers = encode_votes(votes, sizes)
    zero_shot = Observation(answers, vote_readout(sizes, N_CLASSES, 0.5)).zero_shot
    fitted = naive_bayes.fit(Seen(answers, zero_shot), labels, sizes=sizes)
    table = evidence(answers, labels, sizes, N_CLASSES)
    assert np.allclose(logits(fitted, Seen(answers, zero_shot)), answers @ table, atol=1e-5)
    silent = encode_votes(np.full((1, 3), NO_LABEL), sizes)
    assert not logits(fitted, Seen(silent, zero_shot[:1])).any()


def test_many_questions_share_their_weight() -> None:
    assert [weight(n) for n in (1, 2, 9)] == [1, 1, 1]
    assert weight(33) == pytest.approx(0.5)


def test_the_head_weighs_words_and_not_the_plain_question() -> None:
    labels = balanced(4)
    sizes = sizes_of(33)
    answers = encode_votes(votes_of(labels, {1: 0.9}, 33, right=0.7, seed=2), sizes)
    fitted = naive_bayes.fit(Seen(answers, answers[:, :N_CLASSES]), labels, sizes=sizes)
    table = evidence(answers, labels, sizes, N_CLASSES)
    assert np.allclose(fitted.weight[:N_CLASSES], table[:N_CLASSES], atol=1e-6)
    assert np.allclose(fitted.weight[N_CLASSES:], table[N_CLASSES:] / 2, atol=1e-6)


# -- which questions ---------------------------------------------------------------------------


def test_columns_of_questions_come_in_the_order_asked() -> None:
    assert question_columns([4, 2, 3], [0, 2, 1]).tolist() == [0, 1, 2, 3, 6, 7, 8, 4, 5]


def test_telling_questions_are_found_among_many() -> None:
    labels = balanced(16)
    votes = votes_of(labels, {4: 0.9, 7: 0.8}, 10, right=0.1, seed=3)
    chosen = choose(votes, labels, most=3)
    assert chosen.kept == (0, 4, 7)
    fresh = balanced(100)
    seen = votes_of(fresh, {4: 0.9, 7: 0.8}, 10, right=0.1, seed=4)
    assert accuracy(chosen, seen, fresh) > 0.9
    assert accuracy(chosen, seen, fresh) > (seen[:, 0] == fresh).mean() + 0.5
    figures = chosen.choice.accuracy
    assert figures["1 questions"] < figures["2 questions"] < figures["3 questions"]
    assert figures[HEADS] == figures["3 questions"]


def test_out_of_fold_figures_are_honest_about_noise() -> None:
    """Many words that say nothing: in their own images they would look telling."""
    labels = balanced(8)
    votes = votes_of(labels, {}, 30, right=0.0, seed=5)
    chosen = choose(votes, labels, most=30)
    assert chosen.choice.accuracy["30 questions"] < 0.45  # chance is 0.25
    everything = encode_votes(votes, sizes_of(30))
    fitted = naive_bayes.fit(
        Seen(everything, everything[:, :N_CLASSES]), labels, sizes=sizes_of(30)
    )
    learned = logits(fitted, Seen(everything, everything[:, :N_CLASSES]))
    assert (learned.argmax(axis=1) == labels).mean() > 0.7  # which is what folds are for


def test_out_of_fold_predictions_are_those_of_the_head_that_is_deployed() -> None:
    labels, sizes = balanced(5), sizes_of(33)
    answers = encode_votes(votes_of(labels, {1: 0.9}, 33, right=0.5, seed=11), sizes)
    chosen = choose_questions(answers, labels, sizes, N_CLASSES, most=33, seed=4)
    folds = stratified_folds(labels, 5, 4)
    for fold in range(5):
        held = folds == fold
        learned = Seen(answers[~held], answers[~held, :N_CLASSES])
        shown = Seen(answers[held], answers[held, :N_CLASSES])
        expected = logits(naive_bayes.fit(learned, labels[~held], sizes=sizes), shown)
        assert np.allclose(chosen.choice.out_of_fold[HEADS][held], expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_good_label_is_not_spoiled_by_noise(seed: int) -> None:
    labels, fresh = balanced(8), balanced(200)
    votes = votes_of(labels, {}, 10, right=0.9, seed=seed)
    seen = votes_of(fresh, {}, 10, right=0.9, seed=seed + 50)
    plain = float((seen[:, 0] == fresh).mean())
    assert accuracy(choose(votes, labels, most=5), seen, fresh) >= plain - 0.03


def test_no_more_questions_than_help() -> None:
    labels = balanced(16)
    votes = votes_of(labels, {2: 1.0}, 10, right=0.1, seed=6)
    assert len(choose(votes, labels, most=8).kept) < 8
    assert choose(votes, labels, most=2).kept == (0, 2)


def test_where_all_may_be_asked_all_are() -> None:
    labels = balanced(4)
    votes = votes_of(labels, {2: 1.0}, 6, right=0.1, seed=7)
    assert choose(votes, labels, most=6).kept == (0, 1, 2, 3, 4, 5)
    assert choose(votes, labels, most=99).kept == (0, 1, 2, 3, 4, 5)


def test_the_bare_label_is_deployed_where_it_predicts_better() -> None:
    """Words that mislead: in one fold's images they say the opposite of what they say in others."""
    labels = np.tile(np.arange(N_CLASSES), 3)
    votes = np.stack([labels, (labels + np.arange(12) // 4) % N_CLASSES], axis=1)
    votes = np.hstack([votes, np.repeat(votes[:, 1:], 8, axis=1)])
    votes[:3, 0] = (labels[:3] + 1) % N_CLASSES
    chosen = choose(votes, labels, most=10)
    assert chosen.choice.chosen == ZERO_SHOT
    assert chosen.kept == (0,)
    assert accuracy(chosen, votes, labels) == pytest.approx(9 / 12)


def test_one_image_per_class_takes_the_first_questions() -> None:
    labels = balanced(1)
    votes = votes_of(labels, {}, 10, right=0.5, seed=8)
    chosen = choose(votes, labels, most=4)
    assert chosen.kept == (0, 1, 2, 3)
    assert chosen.choice.accuracy == {}
    assert chosen.choice.chosen == HEADS


def test_the_classifier_reads_the_questions_in_their_new_order() -> None:
    labels = balanced(16)
    votes = votes_of(labels, {1: 0.6, 3: 0.8}, 4, right=0.2, seed=9)
    chosen = choose(votes, labels, most=3)
    assert chosen.kept == (0, 3, 1)
    sizes = [N_CLASSES, WORDS, WORDS]
    answers = encode_votes(votes[:, [0, 3, 1]], sizes)
    expected = answers @ evidence(answers, labels, sizes, N_CLASSES)
    expected -= expected.mean(axis=1, keepdims=True)
    assert chosen.choice.calibration is not None
    made = ensemble_logits(chosen.ensemble, answers) * chosen.choice.calibration.temperature
    assert np.allclose(made, expected, atol=1e-4)


def test_the_choice_repeats_itself() -> None:
    labels = balanced(8)
    votes = votes_of(labels, {2: 0.4, 5: 0.4}, 10, right=0.3, seed=10)
    one, two = (choose(votes, labels, most=5, seed=3) for _ in range(2))
    assert one.kept == two.kept
    assert one.choice.log_loss == two.choice.log_loss


@pytest.mark.parametrize(
    ("labels", "sizes"),
    [
        ([0, 1], [4, 6]),  # a label is missing
        ([0, 1, 4], [4, 6]),
        ([0, 1, -1], [4, 6]),
        ([0, 1, 2], [4, 5]),
        ([0, 1, 2], [3, 7]),  # the first list are not the classes
        ([0, 1, 2], []),
    ],
)
def test_what_does_not_fit_is_refused(labels: list[int], sizes: list[int]) -> None:
    answers = encode_votes(np.zeros((3, 2), dtype=np.int64), [4, 6])
    with pytest.raises(InputError, match="wanted"):
        choose_questions(answers, np.array(labels), sizes, N_CLASSES, seed=0)


# -- what to ask and what it costs -------------------------------------------------------------


def test_the_plain_question_comes_first() -> None:
    questions = candidate_questions(["cat", "dog"], "a photo of a {}.", limit=None, most=5)
    assert questions[0] == ("a photo of a cat.", "a photo of a dog.")
    assert questions[1:] == word_questions()[:4]
    assert len(candidate_questions(["cat", "dog"], "{}", limit=None, most=99)) == 41


def test_lists_are_cut_to_what_a_request_takes() -> None:
    questions = candidate_questions(["cat", "dog"], "{}", limit=3, most=10)
    assert [len(question) for question in questions] == [2, *[3] * 9]
    with pytest.raises(InputError, match="all 2 classes"):
        candidate_questions(["cat", "dog"], "{}", limit=1, most=10)


def test_a_list_that_is_the_classes_is_not_asked_twice() -> None:
    [colours] = [q for q in word_questions() if "a photo of something turquoise." in q]
    names = [text.removeprefix("a photo of something ").removesuffix(".") for text in colours]
    questions = candidate_questions(names, "a photo of something {}.", limit=None, most=99)
    assert len(questions) == len(set(questions)) == 40


def test_the_lists_that_ship_are_sound() -> None:
    assert len(word_questions()) == 40
    for question in word_questions():
        assert 10 < len(question) <= 18
        assert len({text.lower() for text in question}) == len(question)
        assert all("{" not in text and text == text.strip() for text in question)


def test_candidates_grow_with_the_images_there_are_to_choose_by() -> None:
    assert [n_candidates(shots, 5) for shots in (1, 2, 4, 8, 16)] == [5, 10, 10, 19, 19]
    assert n_candidates(16, 41) == 41


@pytest.mark.parametrize("at_once", [1, 3, 64, None])
def test_the_stated_cost_is_what_is_asked(at_once: int | None) -> None:
    capabilities: Capabilities = declare(Access.LABEL, images_per_request=at_once)
    questions = candidate_questions(["cat", "dog"], "{}", limit=None, most=4)
    requests = distinct([Labels(images(7), question) for question in questions], capabilities)
    assert question_queries(7, 4, capabilities) == len(requests)
    per_pass = len(requests) // 4
    assert affordable_questions(7, 4 * per_pass, capabilities) == 4
    assert affordable_questions(7, 4 * per_pass - 1, capabilities) == 3


def test_nothing_is_asked_about_no_images() -> None:
    assert question_queries(0, 5, replace(declare(Access.LABEL), images_per_request=1)) == 0
