"""The choice among heads: honest out-of-fold, guarded by zero-shot, and the same when flattened."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax

from blackbox_vlm.errors import InputError
from blackbox_vlm.observe import candidates
from blackbox_vlm.observe.candidates import CANDIDATES, JOINS, TRUST, Candidate, blend
from blackbox_vlm.observe.choose import Choice, Ensemble, choose, ensemble_logits, flatten
from blackbox_vlm.observe.features import View
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
def test_good_zero_shot_is_not_spoilt_by_few_noisy_images(shots: int) -> None:
    like = {"skill": 1.0, "signal": 1.0}
    for seed in range(4):
        ensemble, _ = choose(*world(shots, seed=seed, **like), seed=seed)  # type: ignore[arg-type]
        tuned, zero_shot = on_others(ensemble, **like)
        assert tuned > zero_shot - 0.03


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

    from blackbox_vlm.observe.choose import fit_map

    monkeypatch.setattr("blackbox_vlm.observe.choose.fit_map", remember)
    observation, labels = world(4)
    choose(observation, labels, seed=0)
    rows = {row.tobytes() for row in observation.answers}
    left_out = [rows - seen for seen in shown]
    views = {c.view for c in (*CANDIDATES, JOINS, TRUST)}
    assert sorted(map(len, left_out)) == [0] * len(views) + [5] * 4 * len(views)


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
    (first, _), (again, _) = choose(observation, labels, seed=1), choose(observation, labels, seed=1)
    _, other = choose(observation, labels, seed=2)
    _, choice = choose(observation, labels, seed=1)
    answers = observation.answers
    np.testing.assert_array_equal(ensemble_logits(first, answers), ensemble_logits(again, answers))
    assert not np.array_equal(choice.out_of_fold["heads"], other.out_of_fold["heads"])


# The guard ----------------------------------------------------------------------------------------


def fixed(logits_of_label: Floats) -> Candidate:
    """A head that ignores the images and says the same of all."""

    def fit(seen: Seen, labels: Labels) -> Linear:
        n_features = seen.features.shape[1]
        weight = np.zeros((n_features, CLASSES), dtype=np.float32)
        return Linear(weight, as_float32(logits_of_label), as_float32(0))

    return Candidate("gaussian", View(), fit)


def test_zero_shot_is_deployed_where_it_is_clearly_better(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = fixed(as_float32(np.arange(CLASSES)))
    monkeypatch.setattr(candidates, "CANDIDATES", (nothing,))
    monkeypatch.setattr(candidates.TRUST.fit.__globals__["np"], "nothing", None, raising=False)
    monkeypatch.setattr("blackbox_vlm.observe.trust.DILUTION", 0.0)  # the pool has no way back
    observation, labels = world(4, skill=1.0)
    ensemble, choice = choose(observation, labels, seed=0, only=("gaussian",))
    assert choice.accuracy["zero-shot"] > choice.accuracy["heads"] + 0.3
    assert choice.chosen == "zero-shot"
    assert ensemble.members == ()
    said = ensemble_logits(ensemble, observation.answers) * ensemble.temperature
    np.testing.assert_allclose(said, observation.zero_shot, atol=1e-4)
