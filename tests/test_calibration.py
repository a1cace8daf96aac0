"""Temperature, expected calibration error and intervals, against hand-made and known values."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from blackbox_vlm.observe.calibration import (
    calibrate,
    calibration_error,
    likely_temperature,
    log_loss,
    wilson_interval,
)


def honest(
    n: int, classes: int = 4, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits whose probabilities are those by which the labels are drawn."""
    random = np.random.default_rng(seed)
    logits = (2 * random.standard_normal((n, classes))).astype(np.float32)
    labels = np.array([random.choice(classes, p=p) for p in softmax(logits.astype(float), axis=1)])
    return logits, labels


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_the_temperature_of_overstated_logits_is_found(temperature: float) -> None:
    logits, labels = honest(4000)
    found = likely_temperature(temperature * logits, labels)
    assert found == pytest.approx(temperature, rel=0.1)
    losses = [
        log_loss(temperature * logits / t, labels).mean() for t in found * np.array([0.9, 1, 1.1])
    ]
    assert losses[1] == min(losses)


def test_three_images_all_right_are_as_sure_as_four_of_which_one_is_unknown() -> None:
    logits = 5 * np.eye(3, dtype=np.float32)
    temperature = likely_temperature(logits, np.arange(3))
    confidence = softmax(logits / temperature, axis=1).max()
    assert confidence == pytest.approx((3 + 1 / 3) / 4, abs=1e-4)


def test_the_temperature_has_an_end_where_all_is_wrong_or_equal() -> None:
    logits = 5 * np.eye(3, dtype=np.float32)
    assert likely_temperature(logits, np.array([1, 2, 0])) == pytest.approx(20)
    assert 0 < likely_temperature(0 * logits, np.arange(3)) <= 20


def test_expected_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1]] * 8 + [[0.4, 0.6]] * 8)
    labels = np.array([0] * 6 + [1] * 2 + [1] * 8)  # 6 of 8 and 8 of 8 right: two bins of 8
    by_hand = (8 * abs(0.9 - 6 / 8) + 8 * abs(0.6 - 1)) / 16
    assert calibration_error(probabilities, labels) == pytest.approx(by_hand)


def test_few_images_share_one_bin() -> None:
    probabilities = np.array([[0.8, 0.2]] * 4 + [[1.0, 0.0]])
    assert calibration_error(probabilities, np.array([0, 0, 0, 0, 1])) == pytest.approx(0.04)


def test_honest_probabilities_have_a_small_error_and_overstated_ones_a_large_one() -> None:
    logits, labels = honest(4000)
    assert calibration_error(softmax(logits, axis=1), labels) < 0.03
    assert calibration_error(softmax(5 * logits, axis=1), labels) > 0.1


def test_calibration_repairs_the_temperature_and_gives_an_interval() -> None:
    logits, labels = honest(600)
    result = calibrate(5 * logits, labels, seed=0)
    assert result == calibrate(5 * logits, labels, seed=0)
    assert result.temperature == pytest.approx(5, rel=0.2)
    assert 0 <= result.low <= result.ece <= result.high < 0.12
    assert result.low < result.high
    assert result.n == 600
    assert json.loads(json.dumps(asdict(result))) == asdict(result)


def test_the_interval_narrows_with_images() -> None:
    widths = []
    for n in (50, 2000):
        result = calibrate(*honest(n), seed=0)
        widths.append(result.high - result.low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_interval_has_its_known_values(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
