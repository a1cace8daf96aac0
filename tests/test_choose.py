"""The choice among heads: honest out-of-fold, guarded by zero-shot, and the same when flattened."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax

from blackbox_vlm.errors import InputError
from blackbox_vlm.observe import candidates
from blackbox_vlm.observe.candidates import (
    CANDIDATES,
    JOINS,
    TRUST,
    Candidate,
    Predictions,
    Weights,
    blend,
)
from blackbox_vlm.observe.choose import (
    Ensemble,
    choose,
    ensemble_logits,
    expected_gain,
    flatten,
    judge,
)
from blackbox_vlm.observe.features import View, fit_map
from blackbox_vlm.observe.heads import Floats, Kernel, Labels, Linear, Seen, as_float32
from blackbox_vlm.observe.observation import Observation
from blackbox_vlm.observe.pooling import pool

DIM, CLASSES = 24, 5


def world(
    shots: int | list[int], *, skill: float = 0.3, signal: float = 3.0, seed: int = 0
) -> tuple[Observation, Labels]:
    """Unit vectors of Gaussian classes; texts that point to a class mean as far as `skill` says."""
    truth = np.random.default_rng(7)
    means = truth.standard_normal((CLASSES, DIM))
    texts = skill * means + (1 - skill) * truth.standard_normal((CLASSES, DIM))
    readout = (10 * texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), shots)
    x = signal * means[labels] / 3 + random.standard_normal((len(labels), DIM))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Observation(as_float32(x), as_float32(readout)), labels


def accuracy(logits: Floats, labels: Labels) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def on_others(ensemble: Ensemble, **like: float) -> tuple[float, float]:
    """Accuracy of an ensemble and of zero-shot on other images of a world."""
    others, labels = world(60, seed=99, **like)  # type: ignore[arg-type]
    said = ensemble_logits(ensemble, others.answers)
    return accuracy(said, labels), accuracy(others.zero_shot, labels)


# What it is for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 2, 4, 16])
def test_the_heads_are_better_than_zero_shot_at_any_number_of_shots(shots: int) -> None:
    ensemble, choice = choose(*world(shots), seed=0)
    tuned, zero_shot = on_others(ensemble)
    assert choice.chosen == "heads"
    assert tuned > zero_shot + 0.1


@pytest.mark.parametrize("shots", [1, 2, 4, 8])
def test_zero_shot_that_no_images_can_better_is_hardly_spoilt_by_few(shots: int) -> None:
    gap, alone = [], []
    for seed in range(4):
        observation, labels = world(shots, skill=1.0, signal=2.0, seed=seed)
        ensemble, _ = choose(observation, labels, seed=seed)
        tuned, zero_shot = on_others(ensemble, skill=1.0, signal=2.0)
        gap.append(zero_shot - tuned)
        untrusting = ensemble._replace(members=ensemble.members[:2])  # no zero-shot in those
        alone.append(zero_shot - on_others(untrusting, skill=1.0, signal=2.0)[0])
    assert np.mean(alone) > 0.04
    assert np.mean(gap) < 0.06


def test_out_of_fold_accuracy_foretells_that_on_other_images() -> None:
    ensemble, choice = choose(*world(16), seed=0)
    assert choice.accuracy["heads"] == pytest.approx(on_others(ensemble)[0], abs=0.1)
    assert choice.n_images == 80
    assert "80 training images: zero-shot" in choice.reason


# Honesty ------------------------------------------------------------------------------------------


def noise(n: int = 240, views: int = 1) -> tuple[Observation, Labels, NDArray[np.int64]]:
    """Answers that say nothing about the labels; views repeat them exactly."""
    random = np.random.default_rng(0)
    x = as_float32(random.standard_normal((n, 60)))
    readout = as_float32(random.standard_normal((60, 4)))
    labels = np.arange(n) % 4
    return Observation(np.tile(x, (views, 1)), readout), labels, np.tile(np.arange(n), views)


@pytest.mark.parametrize("views", [1, 2])
def test_nothing_is_found_in_noise(views: int) -> None:
    observation, labels, owners = noise(views=views)
    _, choice = choose(observation, labels, seed=0, owners=owners)
    for name, found in choice.accuracy.items():
        assert found == pytest.approx(0.25, abs=0.1), name
        assert choice.log_loss[name] == pytest.approx(np.log(4), abs=0.1), name


def test_a_fold_is_mapped_without_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[set[bytes]] = []

    def remember(answers: Floats, view: View) -> object:
        shown.append({row.tobytes() for row in answers})
        return fit_map(answers, view)

    monkeypatch.setattr("blackbox_vlm.observe.choose.fit_map", remember)
    observation, labels = world(4)
    choose(observation, labels, seed=0)
    rows = {row.tobytes() for row in observation.answers}
    left_out = [rows - seen for seen in shown]
    views = {c.view for c in (*CANDIDATES, JOINS, TRUST)}
    assert sorted(map(len, left_out)) == [0] * len(views) + [5] * 4 * len(views)


def test_the_pool_of_a_fold_is_made_on_the_other_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[NDArray[np.bool_]] = []

    def remember(told: Predictions, labels: Labels, images: NDArray[np.bool_]) -> Weights:
        judged.append(images)
        return blend(told, labels, images)

    monkeypatch.setattr("blackbox_vlm.observe.choose.blend", remember)
    choose(*world(4), seed=0)
    everything, *folds = judged
    assert everything.all()
    np.testing.assert_array_equal(sum(~images for images in folds), np.ones(20))


def test_views_of_an_image_count_as_that_image() -> None:
    observation, labels = world(3)
    doubled = Observation(np.tile(observation.answers, (2, 1)), observation.readout)
    owners = np.tile(np.arange(len(labels)), 2)
    plain, one = choose(observation, labels, seed=0)
    viewed, two = choose(doubled, labels, seed=0, owners=owners)
    np.testing.assert_allclose(
        ensemble_logits(plain, observation.answers),
        ensemble_logits(viewed, observation.answers),
        atol=0.1,
    )
    assert two.out_of_fold["heads"].shape == one.out_of_fold["heads"].shape
    assert two.accuracy == pytest.approx(one.accuracy)


def test_the_same_seed_gives_the_same_classifier_and_another_seed_other_folds() -> None:
    observation, labels = world(4)
    (first, _), (again, _) = (
        choose(observation, labels, seed=1),
        choose(observation, labels, seed=1),
    )
    _, other = choose(observation, labels, seed=2)
    _, choice = choose(observation, labels, seed=1)
    answers = observation.answers
    np.testing.assert_array_equal(ensemble_logits(first, answers), ensemble_logits(again, answers))
    assert not np.array_equal(choice.out_of_fold["heads"], other.out_of_fold["heads"])


# The guard ----------------------------------------------------------------------------------------


def worthless(seen: Seen, labels: Labels) -> Linear:
    """A head that says the same of every image."""
    n_features, n_classes = seen.features.shape[1], seen.zero_shot.shape[1]
    always = 0.01 * np.arange(n_classes)
    weight = np.zeros((n_features, n_classes))
    return Linear(as_float32(weight), as_float32(always), as_float32(0))


def test_zero_shot_is_deployed_where_it_is_clearly_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "CANDIDATES", (Candidate("gaussian", View(0.5), worthless),))
    monkeypatch.setattr("blackbox_vlm.observe.trust.DILUTION", 0.0)  # no zero-shot in the pool
    observation, labels = world(4, skill=1.0)
    ensemble, choice = choose(observation, labels, seed=0, only=("gaussian",))
    assert choice.accuracy["zero-shot"] > choice.accuracy["heads"] + 0.3
    assert choice.chosen == "zero-shot"
    assert ensemble.members == ()
    said = ensemble_logits(ensemble, observation.answers) * ensemble.temperature
    np.testing.assert_allclose(said, observation.zero_shot, atol=1e-4)


@pytest.mark.parametrize(
    ("right_zero_shot", "right_heads", "chosen"),
    [(10, 7, "zero-shot"), (10, 9, "heads"), (7, 10, "heads")],
)
def test_among_24_images_three_more_right_are_clear_and_one_more_is_not(
    right_zero_shot: int, right_heads: int, chosen: str
) -> None:
    labels = np.zeros(24, dtype=np.int64)

    def predictions(right: int, first: int) -> Floats:
        logits = np.tile(as_float32([0, 1]), (24, 1))
        logits[first : first + right] = [1, 0]
        return logits

    shown = {
        "zero-shot": predictions(right_zero_shot, 0),
        "heads": predictions(right_heads, 3 if right_heads < 10 else 0),
    }
    assert judge(shown, labels, np.ones(24, dtype=bool), seed=0).chosen == chosen


def test_what_ten_images_say_against_the_heads_is_not_enough_but_a_hundred_are() -> None:
    gains = np.repeat([-1.0, 1.0, 0.0], [3, 1, 6])
    assert expected_gain(gains) > 0
    assert expected_gain(np.tile(gains, 10)) < 0


# Few images ---------------------------------------------------------------------------------------


def test_one_image_per_class_holds_nothing_out() -> None:
    observation, labels = world(1)
    ensemble, choice = choose(observation, labels, seed=0)
    assert (choice.accuracy, choice.log_loss, choice.calibration) == ({}, {}, None)
    np.testing.assert_array_equal(choice.out_of_fold["zero-shot"], observation.zero_shot)
    assert list(choice.out_of_fold) == ["zero-shot"]
    assert "fixed in advance" in choice.reason
    heads = [m.weight for m in ensemble.members]
    np.testing.assert_allclose(heads, [1 / 3, 1 / 3, 1 / 3, 2 / 3])


def test_classes_may_have_any_number_of_images() -> None:
    observation, labels = world([7, 4, 1, 3, 0])
    ensemble, choice = choose(observation, labels, seed=0)
    assert choice.n_images == 14  # an image alone in its class cannot be judged
    assert choice.out_of_fold["heads"].shape == (15, CLASSES)
    others, truth = world(40, seed=9)
    said = ensemble_logits(ensemble, others.answers)
    with_images = truth < 4
    assert accuracy(said[with_images], truth[with_images]) > 0.6


def test_mostly_single_images_are_not_judged() -> None:
    _, choice = choose(*world([2, 1, 1, 1, 1]), seed=0)
    assert choice.accuracy == {}


def test_answers_that_never_change_are_not_an_error() -> None:
    observation = Observation(np.ones((8, 3), dtype=np.float32), np.eye(3, dtype=np.float32))
    ensemble, _ = choose(observation, np.arange(8) % 2, seed=0)
    assert np.isfinite(ensemble_logits(ensemble, observation.answers)).all()


# The pool -----------------------------------------------------------------------------------------


def honest(n: int, seed: int) -> tuple[list[NDArray[np.float64]], Labels]:
    """Labels drawn by the sum of two predictions; a third is noise."""
    random = np.random.default_rng(seed)
    parts = [random.standard_normal((n, 3)) * 2 for _ in range(3)]
    drawn = (parts[0] + parts[1] + random.gumbel(size=(n, 3))).argmax(axis=1)
    return parts, drawn


def test_the_pool_finds_the_weights_by_which_labels_were_drawn() -> None:
    predictions, labels = honest(4000, 0)
    weights = pool(predictions, labels, np.full(3, 0.5), pull=1.0)
    np.testing.assert_allclose(weights, [1, 1, 0], atol=0.1)


def test_a_handful_of_images_moves_the_pool_little() -> None:
    predictions, labels = honest(6, 1)
    expected = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(pool(predictions, labels, expected, pull=1e4), expected, rtol=1e-2)
    few, many = (pool(predictions, labels, expected, pull=p) for p in (20.0, 1.0))
    assert np.abs(few / expected - 1).max() < np.abs(many / expected - 1).max()


def test_the_pool_is_at_its_minimum_and_never_negative() -> None:
    predictions, labels = honest(200, 2)
    expected = np.array([0.5, 0.3, 0.2])

    def loss(weights: NDArray[np.float64]) -> float:
        total = sum(w * p for w, p in zip(weights, predictions, strict=True))
        fit = -log_softmax(total, axis=1)[np.arange(200), labels].sum()
        return float(fit + ((weights / expected - 1) ** 2).sum())

    weights = pool(predictions, labels, expected, pull=2.0)
    assert (weights >= 0).all()
    random = np.random.default_rng(0)
    for _ in range(50):
        near = np.maximum(weights + 0.05 * random.standard_normal(3), 0)
        assert loss(near) > loss(weights) - 1e-3


def test_a_prediction_that_says_the_opposite_gets_no_weight() -> None:
    predictions, labels = honest(300, 5)
    weights = pool([predictions[0], -predictions[1]], labels, np.full(2, 0.5), pull=1.0)
    assert weights[0] > 0.5
    assert weights[1] == 0


@pytest.mark.parametrize("knows", [True, False])
def test_the_kernel_joins_where_it_lowers_the_loss(*, knows: bool) -> None:
    predictions, labels = honest(300, 3)
    told = {c: as_float32(predictions[2]) for c in (*CANDIDATES, TRUST)}
    told[CANDIDATES[0]] = as_float32(predictions[0])
    told[JOINS] = as_float32(predictions[1 if knows else 2])
    weights = blend(told, labels, np.ones(300, dtype=bool))
    assert (JOINS in weights) is knows


def test_of_a_head_the_candidate_of_lower_loss_stays() -> None:
    predictions, labels = honest(300, 4)
    told = {c: as_float32(predictions[2]) for c in (*CANDIDATES, TRUST)}
    told[CANDIDATES[1]] = as_float32(7 * predictions[0])  # overstated, yet the better one
    weights = blend(told, labels, np.ones(300, dtype=bool))
    assert CANDIDATES[1] in weights
    assert CANDIDATES[0] not in weights


# Ensembles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", [None, ("kernel", "gaussian"), ("refiner", "prototypes")])
def test_flattening_changes_nothing_but_the_size(only: tuple[str, ...] | None) -> None:
    observation, labels = world(4)
    ensemble, _ = choose(observation, labels, seed=0, only=only)
    ensemble = ensemble._replace(prior=0.3, temperature=1.7)
    flat = flatten(ensemble)
    others, _ = world(10, seed=5)
    np.testing.assert_allclose(
        ensemble_logits(flat, others.answers), ensemble_logits(ensemble, others.answers), atol=1e-4
    )
    kinds = [type(member.fitted) for member in flat.members]
    assert kinds.count(Linear) == 1
    assert flat.members[0].map.projection.shape == (DIM, CLASSES)
    assert len(flat.members) <= 2


def test_an_ensemble_is_the_weighted_sum_of_its_members_over_the_temperature() -> None:
    observation, labels = world(2)
    ensemble, _ = choose(observation, labels, seed=0)
    answers = observation.answers
    parts = [
        m.weight
        * ensemble_logits(Ensemble(ensemble.readout, (m._replace(weight=1.0),), 0, 1), answers)
        for m in ensemble.members
    ]
    whole = ensemble._replace(prior=0.5, temperature=2.0)
    expected = (sum(parts) + 0.5 * observation.zero_shot) / 2
    np.testing.assert_allclose(ensemble_logits(whole, answers), expected, atol=1e-4)


def test_the_temperature_makes_the_logits_calibrated() -> None:
    ensemble, choice = choose(*world(16), seed=0)
    assert choice.calibration is not None
    assert ensemble.temperature == choice.calibration.temperature
    assert choice.calibration.n == choice.n_images


# What may take part -------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["gaussian", "prototypes", "linear", "kernel", "refiner"])
def test_a_head_may_be_named(head: str) -> None:
    ensemble, choice = choose(*world(4), seed=0, only=(head,))
    assert list(choice.accuracy) == ["zero-shot", head, "heads"]
    assert len(ensemble.members) == 2  # it and the debiased zero-shot logits
    assert isinstance(ensemble.members[0].fitted, Kernel) is (head == "kernel")


@pytest.mark.parametrize("only", [("perceptron",), ()])
def test_an_unknown_head_is_refused_by_name(only: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="gaussian, prototypes, linear, kernel, refiner"):
        choose(*world(2), seed=0, only=only)


@pytest.mark.parametrize(
    ("labels", "owners"),
    [
        (np.arange(4), None),
        (np.array([0, 1, 2, 3, CLASSES]), None),
        (np.array([0, 1, 2, 3, -1]), None),
        (np.arange(3), np.array([0, 1, 2, 3, 0])),
        (np.arange(4), np.array([1, 0, 2, 3, 0])),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Labels, owners: Labels | None) -> None:
    observation, _ = world(1)
    with pytest.raises(InputError, match="wanted"):
        choose(observation, labels, seed=0, owners=owners)
