"""From declared scores to logits: what is exact, what is exact up to a constant, what is filled."""

from __future__ import annotations

import numpy as np
import pytest
from doubles import declare
from scipy.special import expit, softmax

from blackbox_vlm.backend import NO_LABEL, ScoreKind
from blackbox_vlm.observe.ballots import encode_votes, vote_readout
from blackbox_vlm.scores import (
    SMALLEST_PROBABILITY,
    SMALLEST_REST,
    accuracy_of,
    centred,
    clearly_positive,
    fill_censored,
    log_probabilities,
    predicted,
    spread_missing_mass,
    to_logits,
)

NAN = float("nan")


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (5, 7))


def test_logits_pass_unchanged(logits: np.ndarray) -> None:
    result = to_logits(logits.astype(np.float32), declare())
    np.testing.assert_array_equal(result, logits.astype(np.float32))
    assert result.dtype == np.float32


def test_cosines_are_scaled(logits: np.ndarray) -> None:
    capabilities = declare(score_kind=ScoreKind.COSINE, logit_scale=25.0)
    np.testing.assert_allclose(to_logits(logits / 25, capabilities), logits, rtol=1e-6)


def test_sigmoid_makes_the_round_trip(logits: np.ndarray) -> None:
    capabilities = declare(score_kind=ScoreKind.SIGMOID)
    np.testing.assert_allclose(to_logits(expit(logits), capabilities), logits, rtol=1e-5, atol=1e-6)


def test_softmax_gives_logits_up_to_one_constant_per_image(logits: np.ndarray) -> None:
    result = to_logits(softmax(logits, axis=1), declare(score_kind=ScoreKind.SOFTMAX))
    constant = result - logits
    np.testing.assert_allclose(constant, constant[:, :1].repeat(7, axis=1), atol=1e-5)
    np.testing.assert_allclose(centred(result), centred(logits), atol=1e-5)
    np.testing.assert_allclose(result, log_probabilities(logits), atol=1e-5)


@pytest.mark.parametrize("kind", [ScoreKind.SOFTMAX, ScoreKind.SIGMOID])
@pytest.mark.parametrize(
    ("decimals", "floor"), [(2, 0.005), (4, 0.00005), (None, SMALLEST_PROBABILITY)]
)
def test_a_probability_of_zero_becomes_half_the_last_digit(
    kind: ScoreKind, decimals: int | None, floor: float
) -> None:
    capabilities = declare(score_kind=kind, decimals=decimals)
    result = to_logits(np.array([[0.0, 1.0]]), capabilities)
    expected = np.log(floor) if kind is ScoreKind.SOFTMAX else np.log(floor / (1 - floor))
    assert result[0, 0] == pytest.approx(expected, rel=1e-6)
    top = 0.0 if kind is ScoreKind.SOFTMAX else -expected
    assert result[0, 1] == pytest.approx(top, rel=1e-4)


@pytest.mark.parametrize("kind", [ScoreKind.LOGITS, ScoreKind.COSINE, ScoreKind.SIGMOID])
def test_texts_left_out_get_the_lowest_score_of_their_image(kind: ScoreKind) -> None:
    values = np.array([[0.2, NAN, 0.6, NAN], [NAN, 0.3, 0.4, 0.9]])
    filled = np.array([[0.2, 0.2, 0.6, 0.2], [0.3, 0.3, 0.4, 0.9]])
    capabilities = declare(score_kind=kind, top_k=2)
    np.testing.assert_array_equal(
        to_logits(values, capabilities), to_logits(filled, declare(score_kind=kind))
    )
    np.testing.assert_array_equal(fill_censored(values), filled)


def test_the_mass_that_top_k_left_over_is_shared() -> None:
    values = np.array([[0.6, 0.2, NAN, NAN], [0.4, 0.1, NAN, NAN], [0.7, 0.3, NAN, NAN]])
    expected = [
        [0.6, 0.2, 0.1, 0.1],  # 0.2 left over, shared
        [0.4, 0.1, 0.1, 0.1],  # 0.25 each would be above the lowest that was returned
        [0.7, 0.3, SMALLEST_REST / 2, SMALLEST_REST / 2],  # nothing left that float32 could show
    ]
    np.testing.assert_allclose(spread_missing_mass(values), expected, atol=1e-12)
    result = to_logits(values, declare(score_kind=ScoreKind.SOFTMAX, top_k=2))
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result[0], np.log(expected[0]), rtol=1e-6)
    assert result[2, 2] == pytest.approx(np.log(SMALLEST_REST / 2))


def test_rounding_up_leaves_no_negative_mass() -> None:
    assert spread_missing_mass(np.array([[0.67, 0.34, NAN]]))[0, 2] == SMALLEST_REST


@pytest.mark.parametrize("seed", range(5))
def test_the_rounding_of_float32_is_no_mass(seed: int) -> None:
    """Scores that sum to 1 but for their last bits: the bits do not decide about the others."""
    shown = np.random.default_rng(seed).dirichlet(np.ones(20)).astype(np.float32)
    row = np.append(shown, [NAN, NAN]).astype(np.float64)[None]
    assert spread_missing_mass(row)[0, -1] == pytest.approx(SMALLEST_REST / 2, rel=0.2)


def test_a_label_is_a_logit_and_no_label_says_nothing() -> None:
    votes = encode_votes(np.array([[2], [NO_LABEL], [0]]), [4])
    logits = centred(votes @ vote_readout([4], 4, 0.9))
    confident = np.exp(log_probabilities(logits))
    np.testing.assert_allclose(confident[0], [1 / 30, 1 / 30, 0.9, 1 / 30], rtol=1e-5)
    np.testing.assert_array_equal(logits[1], 0)
    np.testing.assert_allclose(confident[2, 0], 0.9, rtol=1e-5)


def test_complete_rows_are_left_alone(logits: np.ndarray) -> None:
    assert fill_censored(logits) is logits
    assert spread_missing_mass(logits) is logits


def test_centred_rows_have_mean_zero(logits: np.ndarray) -> None:
    result = centred(logits + 100)
    np.testing.assert_allclose(result.mean(axis=1), 0, atol=1e-5)
    assert result.dtype == np.float32


def test_log_probabilities_survive_extreme_logits() -> None:
    result = log_probabilities(np.array([[1e4, 0.0], [-1e4, -1e4]]))
    np.testing.assert_allclose(result, [[0, -1e4], [np.log(0.5), np.log(0.5)]])


def test_a_row_that_prefers_nothing_predicts_nothing() -> None:
    logits = np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [3.0, 1.0, 0.0]], dtype=np.float32)
    assert predicted(logits).tolist() == [NO_LABEL, 1, 0]
    assert accuracy_of(logits, np.array([0, 1, 0])) == pytest.approx(2 / 3)


def test_a_clear_gain_exceeds_its_standard_errors() -> None:
    gain = np.array([1.0, 1.0, 1.0, -1.0])  # mean 0.5, standard error 0.433
    assert clearly_positive(gain)
    assert not clearly_positive(gain, errors=2)
    assert not clearly_positive(np.zeros(4))
