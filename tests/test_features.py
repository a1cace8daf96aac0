"""Answers to features: what a view flattens, what a metric undoes, what must not disturb them."""

from __future__ import annotations

import numpy as np
import pytest

from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.features import (
    Metric,
    View,
    apply,
    before,
    features,
    fit_map,
    fit_metric,
    observe_in,
)
from blackbox_vlm.observe.observation import Observation

VIEWS = [View(), View(0.5), View(1.0), View(0.25, rank=3)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gram(values: np.ndarray) -> np.ndarray:
    return values @ values.T


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_features_are_centred_and_of_mean_squared_length_one(view: View) -> None:
    answers = normal(20, 8) * np.geomspace(1, 30, 8).astype(np.float32) + 5
    seen = features(fit_map(answers, view), answers)
    np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-5)
    assert (seen**2).sum(axis=1).mean() == pytest.approx(1, rel=1e-4)
    assert seen.dtype == np.float32


def test_no_power_keeps_the_answers_geometry_and_full_power_whitens() -> None:
    answers = normal(20, 8) * np.geomspace(1, 30, 8).astype(np.float32)
    centred = answers - answers.mean(axis=0)
    plain = gram(features(fit_map(answers, View()), answers))
    np.testing.assert_allclose(plain / plain[0, 0], gram(centred) / gram(centred)[0, 0], atol=1e-4)
    white = features(fit_map(answers, View(1.0)), answers)
    np.testing.assert_allclose(white.T @ white, np.eye(8) * 20 / 8, atol=1e-3)


def test_a_rank_keeps_the_directions_of_most_variance() -> None:
    answers = normal(40, 5) * np.array([1, 9, 1, 8, 1], dtype=np.float32)
    projection = fit_map(answers, View(rank=2)).projection
    assert projection.shape == (5, 2)
    assert set(np.argsort(-(projection**2).sum(axis=1))[:2]) == {1, 3}


@pytest.mark.parametrize("view", VIEWS[:3], ids=str)
def test_constants_and_repeated_answers_add_nothing(view: View) -> None:
    answers, held_out = normal(12, 6), normal(5, 6, seed=1)
    constant = np.full((12, 1), 1e3, dtype=np.float32)
    more = np.hstack([answers, constant])
    expected = gram(features(fit_map(answers, view), held_out))
    shown = features(fit_map(more, view), np.hstack([held_out, constant[:5]]))
    np.testing.assert_allclose(gram(shown), expected, atol=1e-3)
    twice = fit_map(np.hstack([answers, answers]), view)
    assert twice.projection.shape[1] == 6
    np.testing.assert_allclose(
        gram(features(twice, np.hstack([held_out, held_out]))), expected, atol=1e-3
    )


def test_whitening_does_not_blow_up_the_rounding_of_float32() -> None:
    """Scores of many texts in few dimensions: the other directions hold rounding alone."""
    vectors, texts = normal(30, 4), normal(100, 4, seed=1)
    answers = (vectors @ texts.T + 300).astype(np.float32)
    assert fit_map(answers, View(1.0)).projection.shape == (100, 4)


@pytest.mark.parametrize("answers", [np.ones((4, 3)), np.ones((1, 3)), np.zeros((2, 1))])
def test_answers_that_say_nothing_are_one_feature_of_zero(answers: np.ndarray) -> None:
    fitted = fit_map(answers.astype(np.float32), View(0.5))
    np.testing.assert_array_equal(features(fitted, answers.astype(np.float32)), 0)
    assert fitted.projection.shape == (answers.shape[1], 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gaps_are_refused(bad: float) -> None:
    answers = normal(4, 3)
    answers[1, 2] = bad
    with pytest.raises(InputError, match="1 that are not"):
        fit_map(answers, View())
    with pytest.raises(InputError, match="finite"):
        fit_map(answers[:0], View())


# A metric: an image's vector seen through distorting texts, and pictures of anything


@pytest.fixture
def texts() -> np.ndarray:
    """Forty texts in five dimensions that they share very unevenly."""
    return normal(40, 5, seed=2) * np.array([9, 4, 1, 0.3, 0.3], dtype=np.float32)


def test_a_metric_gives_back_the_geometry_of_the_vectors(texts: np.ndarray) -> None:
    metric = fit_metric(normal(2000, 5, seed=3) @ texts.T, ridge=1e-6)
    vectors = normal(6, 5, seed=4)
    seen = gram(apply(metric, vectors @ texts.T))
    np.testing.assert_allclose(seen, gram(vectors), rtol=0.1, atol=0.3)
    plain = gram(vectors @ texts.T)
    assert np.corrcoef(seen.ravel(), gram(vectors).ravel())[0, 1] > 0.99
    assert np.corrcoef(plain.ravel(), gram(vectors).ravel())[0, 1] < 0.9


def test_a_ridge_bounds_how_far_a_direction_is_stretched(texts: np.ndarray) -> None:
    background = normal(200, 5, seed=3) @ texts.T
    for ridge in (0.01, 1.0):
        metric = fit_metric(background, ridge)
        assert metric.scales.max() <= metric.outside
        variances = np.sort(np.linalg.svd(background - background.mean(0))[1][:5] ** 2 / 200)
        np.testing.assert_allclose(
            np.sort(metric.scales)[::-1], (variances + ridge * variances.mean()) ** -0.5, rtol=1e-4
        )
        assert metric.outside == pytest.approx((ridge * variances.mean()) ** -0.5, rel=1e-4)


def test_zero_shot_is_the_same_in_a_metric(texts: np.ndarray) -> None:
    observation = Observation(normal(7, 5) @ texts.T, np.eye(40, 3, dtype=np.float32))
    changed = observe_in(fit_metric(normal(20, 5, seed=3) @ texts.T), observation)
    np.testing.assert_allclose(changed.zero_shot, observation.zero_shot, rtol=1e-3, atol=1e-3)
    assert changed.readout.dtype == changed.answers.dtype == np.float32
    assert np.abs(changed.answers - observation.answers).max() > 0.1


def test_a_map_in_a_metric_is_a_map_of_plain_answers(texts: np.ndarray) -> None:
    answers = normal(7, 5) @ texts.T + 2
    metric = fit_metric(normal(20, 5, seed=3) @ texts.T)
    inside = fit_map(apply(metric, answers), View(0.5))
    expected = features(inside, apply(metric, answers))
    np.testing.assert_allclose(features(before(metric, inside), answers), expected, atol=1e-4)


def test_pictures_that_all_answer_alike_measure_nothing() -> None:
    with pytest.raises(InputError, match="no geometry"):
        fit_metric(np.ones((5, 3), dtype=np.float32))


def test_a_metric_does_not_depend_on_a_constant_of_the_background(texts: np.ndarray) -> None:
    background = normal(20, 5, seed=3) @ texts.T
    a, b = fit_metric(background), fit_metric(background + 3)
    answers = normal(4, 40)
    assert isinstance(a, Metric)
    np.testing.assert_allclose(apply(a, answers), apply(b, answers), rtol=1e-2, atol=1e-3)


def test_many_images_are_worked_on_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scatter matrix, block by block, shows the same components as all images at once."""
    answers = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * np.arange(1, 7)
    answers = answers.astype(np.float32)
    whole = fit_map(answers, View(0.5))
    expected = features(whole, answers)
    monkeypatch.setattr("blackbox_vlm.observe.features.MANY", 16)
    blocks = fit_map(answers, View(0.5))
    shown = features(blocks, answers)
    np.testing.assert_allclose(shown @ shown.T, expected @ expected.T, atol=1e-5)
