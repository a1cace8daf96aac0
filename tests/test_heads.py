"""The heads: each against the formula of its paper, and what all of them promise."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from blackbox_vlm.craft.craft import fit_refiner, refined
from blackbox_vlm.craft.recipes import CRAFT
from blackbox_vlm.observe import gaussian, kernel, linear, prototypes, refiner, trust
from blackbox_vlm.observe.heads import Head, Linear, Seen, class_means, even_out, logits

DIM, CLASSES = 6, 4
HEADS: dict[str, Head] = {
    "gaussian": gaussian.fit,
    "prototypes": prototypes.fit,
    "linear": linear.fit,
    "kernel": kernel.fit,
    "refiner": refiner.fit,
    "trust": trust.fit,
}


def draw(
    shots: int = 5, *, skill: float = 1.0, classes: int = CLASSES, seed: int = 0
) -> tuple[Seen, NDArray[np.int64]]:
    """Gaussian classes, and zero-shot logits that know them as far as `skill` says."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), shots)
    x = 1.5 * np.eye(classes, DIM)[labels] + random.standard_normal((len(labels), DIM))
    zero_shot = skill * np.eye(CLASSES)[labels] + random.standard_normal((len(labels), CLASSES))
    zero_shot -= zero_shot.mean(axis=1, keepdims=True)
    x -= x.mean(axis=0)
    x /= np.sqrt((x**2).sum(axis=1).mean())
    return Seen(x.astype(np.float32), zero_shot.astype(np.float32)), labels


def cosine(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


# What all promise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_a_pure_function_and_speaks_float32(name: str) -> None:
    seen, labels = draw()
    before = [array.copy() for array in (seen.features, seen.zero_shot, labels)]
    first, again = HEADS[name](seen, labels), HEADS[name](seen, labels)
    said = logits(first, seen)
    assert said.shape == (len(labels), CLASSES)
    assert said.dtype == np.float32
    for one, two in zip(first, again, strict=True):
        assert np.asarray(one).dtype == np.float32
        np.testing.assert_array_equal(one, two)
    for array, copy in zip((seen.features, seen.zero_shot, labels), before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("name", [*set(HEADS) - {"trust"}])
def test_a_head_learns_its_images(name: str) -> None:
    seen, labels = draw(shots=12, skill=0.3)
    accuracy = (logits(HEADS[name](seen, labels), seen).argmax(axis=1) == labels).mean()
    assert accuracy > (seen.zero_shot.argmax(axis=1) == labels).mean() + 0.1


@pytest.mark.parametrize("name", ["gaussian", "prototypes", "linear", "kernel", "trust"])
def test_rows_that_show_one_image_count_as_one_image(name: str) -> None:
    seen, labels = draw()
    twice = Seen(np.tile(seen.features, (2, 1)), np.tile(seen.zero_shot, (2, 1)), views=2.0)
    once, both = HEADS[name](seen, labels), HEADS[name](twice, np.tile(labels, 2))
    np.testing.assert_allclose(logits(once, seen), logits(both, seen), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["gaussian", "prototypes", "linear", "kernel", "trust"])
def test_a_class_without_images_keeps_its_zero_shot_logit(name: str) -> None:
    seen, labels = draw(classes=CLASSES - 1)  # the last class has none
    fitted = HEADS[name](seen, labels)
    expected = float(fitted[-1]) * seen.zero_shot[:, -1]
    np.testing.assert_allclose(logits(fitted, seen)[:, -1], expected, atol=1e-5)


@pytest.mark.parametrize("name", [*set(HEADS) - {"refiner"}])
def test_one_image_of_one_class_is_enough_to_fit(name: str) -> None:
    seen = Seen(np.zeros((1, 1), dtype=np.float32), np.zeros((1, CLASSES), dtype=np.float32))
    said = logits(HEADS[name](seen, np.array([2])), seen)
    np.testing.assert_array_equal(said, np.zeros((1, CLASSES)))


# Gaussian discriminants ---------------------------------------------------------------------------


@pytest.mark.parametrize("shrinkage", [0.3, 1.0, 3.0])
def test_gaussian_is_the_papers_discriminant_up_to_scale(shrinkage: float) -> None:
    seen, labels = draw()
    fitted = gaussian.fit(seen, labels, shrinkage=shrinkage)
    means = np.stack([seen.features[labels == c].mean(axis=0) for c in range(CLASSES)])
    within = (seen.features - means[labels]).astype(np.float64)
    degrees = len(labels) - CLASSES  # of freedom: N - 1 in the paper's notation
    covariance = within.T @ within / degrees
    ridge = shrinkage * np.trace(covariance) * np.eye(DIM)
    inverse = DIM * np.linalg.pinv(degrees * covariance + ridge)
    weight = inverse @ means.T
    bias = -0.5 * np.diag(means @ weight)
    full = np.vstack([weight, bias])
    full -= full.mean(axis=1, keepdims=True)
    assert cosine(np.vstack([fitted.weight, fitted.bias]), full) > 0.99999


def test_gaussian_weighs_directions_by_their_spread_within_classes() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 50)
    sides = np.array([[-1.0, -1.0], [1.0, 1.0]])[labels]
    x = sides + random.standard_normal((100, 2)) * [0.1, 3.0]
    seen = Seen(x.astype(np.float32), np.zeros((100, 2), dtype=np.float32))
    weight = gaussian.fit(seen, labels, shrinkage=0.01).weight[:, 1]
    assert weight[0] > 20 * abs(weight[1])


def test_gaussian_of_one_image_per_class_is_the_nearest_mean() -> None:
    seen, labels = draw(shots=1)
    others, _ = draw(shots=20, seed=1)
    said = logits(gaussian.fit(seen, labels), others)
    distances = ((others.features[:, None] - seen.features) ** 2).sum(axis=2)
    np.testing.assert_array_equal(said.argmax(axis=1), labels[distances.argmin(axis=1)])


# Prototypes ---------------------------------------------------------------------------------------


def test_prototypes_are_cosines_to_class_means_sharper_with_more_images() -> None:
    seen, labels = draw(shots=4)
    means = np.stack([seen.features[labels == c].mean(axis=0) for c in range(CLASSES)])
    cosines = seen.features @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    expected = 5.0 * np.sqrt(4) * (cosines - cosines.mean(axis=1, keepdims=True))
    said = logits(prototypes.fit(seen, labels), seen)
    np.testing.assert_allclose(said, expected, rtol=1e-3, atol=1e-4)


# The linear probe ---------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.03, 0.3])
def test_linear_is_at_the_minimum_of_its_loss(penalty: float) -> None:
    seen, labels = draw()
    fitted = linear.fit(seen, labels, penalty=penalty)
    offset = float(fitted.prior) * seen.zero_shot.astype(np.float64)
    penalties = penalty * linear.adaptive(offset, labels)

    def loss(weight: NDArray[np.floating], bias: NDArray[np.floating]) -> float:
        log_p = log_softmax(seen.features @ weight + bias + offset, axis=1)
        fit = -log_p[np.arange(len(labels)), labels].sum()
        return float(fit + 0.5 * (penalties * weight**2).sum() + 0.005 * (bias**2).sum())

    least, random = loss(fitted.weight, fitted.bias), np.random.default_rng(0)
    for size in (0.03, 0.3):
        for _ in range(20):
            step = size * random.standard_normal(fitted.weight.shape)
            shift = size * random.standard_normal(fitted.bias.shape)
            assert loss(fitted.weight + step, fitted.bias + shift) > least


def test_linear_under_a_heavy_penalty_is_the_zero_shot_classifier() -> None:
    seen, labels = draw(shots=10, skill=4.0)
    fitted = linear.fit(seen, labels, penalty=1e6)
    assert np.abs(fitted.weight).max() < 1e-4
    expected = fitted.prior * seen.zero_shot + fitted.bias
    np.testing.assert_allclose(logits(fitted, seen), expected, atol=1e-3)


def test_the_penalty_is_heavier_where_zero_shot_is_better() -> None:
    labels = np.repeat([0, 1, 2], 2)
    known = 3.0 * np.eye(3)[labels]
    known[labels == 2] = [3.0, 0.0, 0.0]  # taken for class 0
    relative = linear.adaptive(known, labels)
    right, wrong = softmax([3.0, 0.0, 0.0])[:2]
    expected = np.array([right, right, wrong])
    np.testing.assert_allclose(relative, expected / expected.mean())


# Kernel ridge -------------------------------------------------------------------------------------


def test_kernel_solves_prokers_equation_up_to_scale() -> None:
    seen, labels = draw()
    fitted = kernel.fit(seen, labels, beta=2.0, penalty=0.5)
    distances = ((seen.features[:, None] - seen.features) ** 2).sum(axis=2, dtype=np.float64)
    gram = np.exp(-distances)
    prior = trust.fit(seen, labels)
    target = np.eye(CLASSES)[labels] - softmax(logits(prior, seen), axis=1)
    target -= target.mean(axis=1, keepdims=True)
    solved = (gram + 0.5 * np.eye(len(gram))) @ fitted.coefficients
    assert cosine(solved, target) > 0.99999


def test_kernel_logits_are_a_sum_over_the_support() -> None:
    seen, labels = draw(shots=2)
    fitted = kernel.fit(seen, labels, beta=0.7)
    x = seen.features[3]
    by_hand = sum(
        np.exp(-0.35 * ((x - support) ** 2).sum()) * row
        for support, row in zip(fitted.support, fitted.coefficients, strict=True)
    )
    np.testing.assert_allclose(logits(fitted, seen)[3], by_hand, rtol=1e-4, atol=1e-5)


# CraFT's refiner ----------------------------------------------------------------------------------


def test_refiner_is_crafts() -> None:
    seen, labels = draw()
    fitted = refiner.fit(seen, labels, seed=3)
    expected = refined(fit_refiner(CRAFT, seen.zero_shot, labels, 3), seen.zero_shot)
    np.testing.assert_allclose(logits(fitted, seen), expected, rtol=1e-5, atol=1e-5)


# Trust in zero-shot -------------------------------------------------------------------------------


def test_the_scale_is_the_likeliest_one() -> None:
    seen, labels = draw(shots=20, skill=2.0)
    scales = np.linspace(0, 3, 3001)
    rows = np.arange(len(labels))
    posterior = [
        log_softmax(t * seen.zero_shot, axis=1)[rows, labels].sum()
        - 0.5 * (t / trust.DEVIATION) ** 2
        for t in scales
    ]
    best = scales[int(np.argmax(posterior))]
    assert trust.likely_scale(seen.zero_shot, labels) == pytest.approx(best, abs=1e-3)


def test_useless_zero_shot_is_not_trusted_and_good_zero_shot_is() -> None:
    scale = {}
    for skill in (-2.0, 0.0, 3.0):
        seen, labels = draw(shots=20, skill=skill)
        scale[skill] = trust.likely_scale(seen.zero_shot, labels)
    assert scale[-2.0] == 0.0
    assert scale[0.0] < 0.15
    assert scale[3.0] > 1.0


def test_the_prior_is_debiased_each_class_counting_alike() -> None:
    seen, labels = draw(shots=6)
    uneven = np.concatenate([np.flatnonzero(labels == 0), np.flatnonzero(labels > 0)[::3]])
    seen, labels = (
        Seen(seen.features[uneven], seen.zero_shot[uneven] + [9, 0, 0, 0]),
        labels[uneven],
    )
    means = class_means(seen.zero_shot, labels, CLASSES).mean(axis=0)
    left = means + trust.debias(seen, labels)
    assert np.ptp(means) > 8.5
    assert np.ptp(left) < 0.1


def test_what_chance_would_bring_is_no_bias() -> None:
    seen, labels = draw(shots=1, skill=0.0)
    np.testing.assert_array_equal(trust.debias(seen, labels), np.zeros(CLASSES))


def test_the_prior_counts_less_beside_more_images() -> None:
    seen, labels = draw(shots=4, skill=2.0)
    scale = trust.likely_scale(seen.zero_shot + trust.debias(seen, labels), labels)
    assert trust.prior_weight(seen, labels) == pytest.approx(trust.DILUTION * scale / 2)


# Shared pieces ------------------------------------------------------------------------------------


def test_class_means_of_classes_with_and_without_images() -> None:
    values, labels = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), np.array([2, 0, 2])
    np.testing.assert_allclose(class_means(values, labels, 3), [[3, 4], [0, 0], [3, 4]])


def test_evening_out_leaves_absent_classes_at_zero() -> None:
    present = np.array([True, False, True])
    np.testing.assert_allclose(even_out(np.array([[1.0, 7.0, 5.0]]), present), [[-2, 0, 2]])


def test_a_bound_setting_is_a_head() -> None:
    head: Head = partial(gaussian.fit, shrinkage=3.0)
    assert isinstance(head(*draw()), Linear)
