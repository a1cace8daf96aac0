"""The bank of texts: what is in it, how large it is and why, and what leaving texts out costs."""

from __future__ import annotations

import numpy as np
import pytest
from doubles import declare

from blackbox_vlm.backend import Capabilities, Price, ScoreKind, TextScores
from blackbox_vlm.batching import split
from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.bank import (
    BILLED_TEXTS,
    FREE_TEXTS,
    ROUNDED_TEXTS,
    Bank,
    bank_size,
    make_bank,
    predictive,
    prune,
    restrict,
    words,
)
from blackbox_vlm.observe.observation import Observation

TEMPLATE = "a photo of a {}."


def names(count: int) -> list[str]:
    return [f"class {index}" for index in range(count)]


def test_the_words_are_many_distinct_and_plain() -> None:
    listed = words()
    assert len(set(listed)) == len(listed) >= 1024
    assert all(word == word.strip() and word.replace(" ", "").isalpha() for word in listed)


def test_classes_come_first_and_are_read_alone() -> None:
    bank = make_bank(["cat", "dog"], "a drawing of a {}.", declare())
    assert bank.texts[:2] == ("a drawing of a cat.", "a drawing of a dog.")
    assert len(bank.texts) == len(set(bank.texts)) == FREE_TEXTS
    scores = np.random.default_rng(0).standard_normal((3, FREE_TEXTS)).astype(np.float32)
    np.testing.assert_array_equal(scores @ bank.readout, scores[:, :2])
    assert bank.readout.dtype == np.float32


def test_a_class_that_is_a_word_is_asked_once() -> None:
    word = words()[0]
    bank = make_bank([word, "cat"], TEMPLATE, declare(), size=50)
    assert len(bank.texts) == len(set(bank.texts)) == 50
    assert bank.texts.count(TEMPLATE.replace("{}", word)) == 1


def test_a_bank_ends_where_the_words_end() -> None:
    bank = make_bank(["cat"], "{}!", declare(), size=10**6)
    assert len(bank.texts) == 1 + len(words()) == len(bank.readout)


@pytest.mark.parametrize(
    ("classes", "template", "size", "message"),
    [
        (["cat", "dog"], "a photo", None, "no place"),
        (["cat", "cat"], TEMPLATE, None, "distinct"),
        ([], TEMPLATE, None, "at least one"),
        (["cat", "dog"], TEMPLATE, 1, "leaves out"),
    ],
)
def test_a_bank_that_cannot_be_is_refused(
    classes: list[str], template: str, size: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_bank(classes, template, declare(), size=size)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (declare(), FREE_TEXTS),
        (declare(decimals=4), FREE_TEXTS),  # logits keep their digits whatever stands beside them
        (declare(score_kind=ScoreKind.SOFTMAX), FREE_TEXTS),
        (declare(score_kind=ScoreKind.SOFTMAX, decimals=4), ROUNDED_TEXTS),
        (declare(score_kind=ScoreKind.SOFTMAX, decimals=8), FREE_TEXTS),
        (declare(top_k=20), 20),
        (declare(top_k=3), 10),
        (declare(texts_per_request=64), 64),
        (declare(price=Price(per_image=0.01)), FREE_TEXTS),
        (declare(price=Price(per_text=0.01)), BILLED_TEXTS),
    ],
)
def test_the_size_follows_from_what_the_endpoint_can(
    capabilities: Capabilities, expected: int
) -> None:
    assert bank_size(10, capabilities) == expected


def test_more_classes_than_a_bank_are_all_asked() -> None:
    assert bank_size(1000, declare(top_k=20)) == 1000


@pytest.mark.parametrize("kind", [ScoreKind.SOFTMAX, ScoreKind.LOGITS])
@pytest.mark.parametrize("n_classes", [1, 2, 5, 8, 9, 15, 16, 17, 40])
def test_a_limit_is_filled_and_costs_no_request_more(kind: ScoreKind, n_classes: int) -> None:
    capabilities = declare(score_kind=kind, texts_per_request=8)
    texts = make_bank(names(n_classes), TEMPLATE, capabilities).texts

    def requests(count: int) -> int:
        return len(split(TextScores((), tuple(map(str, range(count)))), capabilities))

    assert requests(len(texts)) == requests(n_classes)
    assert requests(len(texts) + 1) == requests(n_classes) + 1


# Leaving texts out


def world(n_images: int = 60, n_texts: int = 30, dim: int = 4, seed: int = 0) -> Observation:
    """Scores of texts that span few dimensions; the classes are the first three texts."""
    rng = np.random.default_rng(seed)
    texts = rng.standard_normal((n_texts, dim)) * 3
    images = rng.standard_normal((n_images, dim))
    answers = (images @ texts.T).astype(np.float32)
    return Observation(answers, np.eye(n_texts, 3, dtype=np.float32))


def left_over(answers: np.ndarray, target: np.ndarray, kept: np.ndarray) -> float:
    """The share of the target's variance that the kept columns do not predict."""
    centred, goal = answers - answers.mean(axis=0), target - target.mean(axis=0)
    found = centred[:, kept] @ np.linalg.lstsq(centred[:, kept], goal, rcond=None)[0]
    return float(((goal - found) ** 2).sum() / (goal**2).sum())


def test_as_many_texts_as_dimensions_tell_everything() -> None:
    answers = world().answers
    kept = predictive(answers, answers, 4)
    assert len(set(kept.tolist())) == 4
    assert left_over(answers, answers, kept) < 1e-6 < left_over(answers, answers, kept[:3])


def test_no_text_is_taken_twice_even_when_nothing_is_left_to_tell() -> None:
    answers = world().answers
    assert sorted(predictive(answers, answers[:, :1], 30)) == list(range(30))
    assert sorted(predictive(np.ones((3, 5), np.float32), answers[:3], 5)) == list(range(5))


def test_the_texts_that_make_the_target_are_found() -> None:
    answers = np.random.default_rng(1).standard_normal((100, 40)).astype(np.float32)
    target = answers[:, [31, 7]] @ np.array([[1, 2], [3, -1]], dtype=np.float32)
    assert set(predictive(answers, target, 2).tolist()) == {7, 31}
    assert set(predictive(answers, target, 5, first=3).tolist()) == {0, 1, 2, 7, 31}


def test_the_choice_tells_more_than_a_random_one() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((200, 40)) * np.geomspace(1, 0.05, 40)
    answers = (vectors @ rng.standard_normal((40, 80))).astype(np.float32)
    target = (vectors @ rng.standard_normal((40, 3))).astype(np.float32)
    chosen = left_over(answers, target, predictive(answers, target, 8))
    drawn = [left_over(answers, target, rng.permutation(80)[:8]) for _ in range(20)]
    assert chosen < min(drawn)


def test_repeated_and_constant_texts_are_left_to_the_last() -> None:
    answers = world().answers[:, :4]
    doubled = np.hstack([answers, answers, np.ones((len(answers), 2), dtype=np.float32)])
    kept = predictive(doubled, answers, 6)
    assert sorted(kept[:4] % 4) == [0, 1, 2, 3]
    assert max(kept[:4]) < 8


def labelled_by_what_classes_hide(observation: Observation) -> np.ndarray:
    """Labels that follow a direction of which the scores of the classes show nothing."""
    centred = observation.answers - observation.answers.mean(axis=0)
    shown = centred[:, :3]
    hidden = centred - shown @ np.linalg.lstsq(shown, centred, rcond=None)[0]
    direction = np.linalg.svd(hidden)[0][:, 0]
    return np.digitize(direction, np.quantile(direction, [1 / 3, 2 / 3])).astype(np.int64)


def test_pruning_measures_its_loss() -> None:
    observation = world()
    labels = labelled_by_what_classes_hide(observation)
    enough, too_few = (prune(observation, labels, size, seed=0) for size in (5, 3))
    assert enough.kept[:3].tolist() == too_few.kept.tolist() == [0, 1, 2]
    assert enough.before == too_few.before
    assert enough.after.accuracy > enough.before.accuracy - 0.1 > 0.6
    assert too_few.after.accuracy < enough.after.accuracy - 0.2
    assert too_few.after.log_loss > enough.after.log_loss


def test_a_pruning_is_judged_by_images_that_it_has_not_seen() -> None:
    """Labels that mean nothing: a choice of texts that had seen them would look good."""
    rng = np.random.default_rng(3)
    answers = rng.standard_normal((40, 60)).astype(np.float32)
    noise = Observation(answers, np.eye(60, 2, dtype=np.float32))
    pruning = prune(noise, np.arange(40) % 2, 6, seed=0)
    assert 0.2 < pruning.before.accuracy < 0.7
    assert 0.2 < pruning.after.accuracy < 0.7


def test_one_image_per_class_judges_no_text() -> None:
    with pytest.raises(InputError, match="one image per class"):
        prune(world(n_images=3), np.arange(3), 5, seed=0)


@pytest.mark.parametrize("size", [2, 31])
def test_pruning_keeps_the_classes_and_invents_no_text(size: int) -> None:
    with pytest.raises(InputError, match="wanted 3"):
        prune(world(), np.repeat([0, 1, 2], 20), size, seed=0)


def test_a_restricted_bank_reads_the_same_zero_shot_logits() -> None:
    observation = world()
    bank = Bank(tuple(map(str, range(30))), observation.readout)
    kept = np.array([7, 2, 0, 5, 1])
    smaller = restrict(bank, kept)
    assert smaller.texts == tuple(str(index) for index in kept)
    np.testing.assert_array_equal(
        observation.answers[:, kept] @ smaller.readout, observation.answers @ bank.readout
    )
