"""CoFT's dual prompt: its losses against finite differences, and what training makes of noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.coft.dual import (
    Batch,
    Dual,
    DualSettings,
    adapted,
    cleanliness,
    complements,
    corrected,
    dual_loss,
    init,
    negative_loss,
    others,
    p_clean,
    positive_loss,
    predict,
    prompted,
    train,
)
from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.heads import Floats, Labels, Seen

B, D, C, HIDDEN = 6, 4, 5, 3
SETTINGS = DualSettings(hidden=HIDDEN)
ADAPTER = ("inner_weight", "inner_bias", "outer_weight")
POSITIVE = ("positive_weight", "positive_bias")
NEGATIVE = ("negative_weight", "negative_bias")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture
def dual() -> Dual:
    """Parameters of which none is zero."""
    shapes = [parameter.shape for parameter in init(D, C, SETTINGS, generator())[:-1]]
    drawn_parameters = [drawn(*shape, seed=at) for at, shape in enumerate(shapes)]
    return Dual._make([*drawn_parameters, torch.tensor(1.5, dtype=torch.float64)])


@pytest.fixture
def batch() -> Batch:
    weights = torch.tensor([1, 0.5, 2, 1, 0, 1], dtype=torch.float64)
    return Batch(drawn(B, D, seed=11), drawn(B, C, seed=12), torch.arange(B) % C, weights)


def with_gradients(dual: Dual) -> Dual:
    return Dual._make([*(p.clone().requires_grad_() for p in dual[:-1]), dual.prior])


def gradients(loss: Tensor, dual: Dual) -> dict[str, Tensor]:
    values = torch.autograd.grad(loss, dual[:-1], allow_unused=True, materialize_grads=True)
    return dict(zip(Dual._fields[:-1], values, strict=True))


def wave(n: int, n_classes: int, noise: float, seed: int = 0) -> tuple[Seen, Labels, Labels]:
    """Clusters that the zero-shot logits half know, their labels, and labels of which some lie."""
    random = np.random.default_rng(seed)
    truth = np.arange(n) % n_classes
    centres = random.standard_normal((n_classes, 24)) / 24**0.5
    features = centres[truth] + 0.4 * random.standard_normal((n, 24)) / 24**0.5
    zero_shot = 1.0 * np.eye(n_classes)[truth] + random.standard_normal((n, n_classes))
    zero_shot -= zero_shot.mean(axis=1, keepdims=True)
    lies = (truth + random.integers(1, n_classes, n)) % n_classes
    labels = np.where(random.random(n) < noise, lies, truth)
    return Seen(features.astype(np.float32), zero_shot.astype(np.float32)), truth, labels


def ones(seen: Seen) -> Floats:
    return np.ones(len(seen.features), dtype=np.float32)


def test_tuning_starts_from_the_zero_shot_logits() -> None:
    start = init(D, C, SETTINGS, generator())
    features, zero_shot = drawn(B, D, seed=1).float(), drawn(B, C, seed=2).float()
    positive, negative = prompted(start, features, zero_shot)
    assert torch.equal(adapted(start, features), features)
    assert torch.equal(positive, SETTINGS.prior * zero_shot)
    labels = torch.arange(B) % C
    confidence = positive.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(p_clean(positive, negative, labels), confidence)


def test_p_clean_is_the_ratio_of_both_prompts(dual: Dual, batch: Batch) -> None:
    positive, negative = prompted(dual, batch.features, batch.zero_shot)
    rows = torch.arange(B)
    yes, no = positive[rows, batch.labels].exp(), negative[rows, batch.labels].exp()
    torch.testing.assert_close(p_clean(positive, negative, batch.labels), yes / (yes + no))


def test_prompts_read_the_adapted_features(dual: Dual, batch: Batch) -> None:
    hidden = torch.relu(batch.features @ dual.inner_weight + dual.inner_bias)
    h = batch.features + hidden @ dual.outer_weight
    z = 1.5 * batch.zero_shot
    positive, negative = prompted(dual, batch.features, batch.zero_shot)
    torch.testing.assert_close(positive, z + h @ dual.positive_weight + dual.positive_bias)
    expected = others(z) + h @ dual.negative_weight + dual.negative_bias
    torch.testing.assert_close(negative, expected)


def test_others_leave_the_class_out() -> None:
    logits = drawn(B, C, seed=3)
    for label in range(C):
        rest = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
        torch.testing.assert_close(others(logits)[:, label], rest.logsumexp(dim=1))
    assert torch.isfinite(others(torch.tensor([[200.0, 0.0, 0.0]]))).all()


def test_complements_leave_the_label_out_and_favour_the_hard() -> None:
    positive, labels = torch.tensor([[9.0, 5.0, 0.0]]), torch.tensor([0])
    expected = torch.tensor([[0.0, 1.0, 0.0]]) + torch.tensor([[0.0, -1.0, 1.0]]) / (1 + np.e)
    torch.testing.assert_close(complements(positive, labels, 5.0), expected)
    uniform = complements(positive, labels, float("inf"))
    torch.testing.assert_close(uniform, torch.tensor([[0.0, 0.5, 0.5]]))


def test_the_positive_loss_is_the_weighted_cross_entropy(dual: Dual, batch: Batch) -> None:
    positive, _ = prompted(dual, batch.features, batch.zero_shot)
    each = -positive.log_softmax(dim=1)[torch.arange(B), batch.labels]
    expected = (each * batch.weights).sum() / batch.weights.sum()
    torch.testing.assert_close(positive_loss(positive, batch), expected)


def test_the_negative_loss_by_hand(dual: Dual, batch: Batch) -> None:
    positive, negative = prompted(dual, batch.features, batch.zero_shot)
    p_yes = positive.exp() / (positive.exp() + negative.exp())
    each = []
    for row, label in enumerate(batch.labels.tolist()):
        hardness = (positive[row] / 2).exp()
        hardness[label] = 0
        expectation = (hardness / hardness.sum() * (1 - p_yes[row]).log()).sum()
        each.append(-expectation - p_yes[row, label].log())
    expected = (torch.stack(each) * batch.weights).sum() / batch.weights.sum()
    found = negative_loss(positive, negative, batch, temperature=2.0, correct=False)
    torch.testing.assert_close(found, expected)


def test_labels_that_are_not_clean_are_corrected() -> None:
    positive = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    negative = torch.tensor([[0.0, 0.9, 0.0], [0.0, 1.1, 0.0]])
    labels = torch.tensor([1, 1])
    assert corrected(positive, negative, labels).tolist() == [1, 0]


def test_the_negative_loss_takes_corrected_labels_as_clean(dual: Dual, batch: Batch) -> None:
    positive, negative = prompted(dual, batch.features, batch.zero_shot)
    fixed = corrected(positive, negative, batch.labels)
    assert 0 < int((fixed != batch.labels).sum()) < B
    losses = {
        correct: negative_loss(positive, negative, batch, temperature=2.0, correct=correct)
        for correct in (False, True)
    }
    rows, margin = torch.arange(B), positive - negative
    told = -(margin[rows, fixed].sigmoid().log() - margin[rows, batch.labels].sigmoid().log())
    difference = (told * batch.weights).sum() / batch.weights.sum()
    torch.testing.assert_close(losses[True] - losses[False], difference)


def test_gradients_of_the_positive_loss_are_finite_differences(dual: Dual, batch: Batch) -> None:
    settings = replace(SETTINGS, negative_weight=0.0)

    def loss(*parameters: Tensor) -> Tensor:
        return dual_loss(Dual._make([*parameters, dual.prior]), batch, settings, correct=False)

    assert torch.autograd.gradcheck(loss, with_gradients(dual)[:-1])


def test_gradients_of_the_negative_loss_are_finite_differences(dual: Dual, batch: Batch) -> None:
    """In the negative prompt and in the adapter, through s- alone."""
    frozen, _ = prompted(dual, batch.features, batch.zero_shot)
    moved = (*ADAPTER, *NEGATIVE)

    def loss(*parameters: Tensor) -> Tensor:
        changed = dual._replace(**dict(zip(moved, parameters, strict=True)))
        _, negative = prompted(changed, batch.features, batch.zero_shot)
        return negative_loss(frozen, negative, batch, temperature=2.0, correct=True)

    start = with_gradients(dual)
    assert torch.autograd.gradcheck(loss, tuple(getattr(start, name) for name in moved))
    positive, negative = prompted(start, batch.features, batch.zero_shot)
    whole = negative_loss(positive, negative, batch, temperature=2.0, correct=True)
    frozen_loss = loss(*(getattr(start, name) for name in moved))
    found, expected = gradients(whole, start), gradients(frozen_loss, start)
    for name in Dual._fields[:-1]:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("regularize", [True, False])
def test_the_negative_prompt_regularises_the_adapter_or_not(
    dual: Dual, batch: Batch, regularize: bool
) -> None:
    start = with_gradients(dual)
    found = []
    for weight in (0.0, 1.0):
        settings = replace(SETTINGS, negative_weight=weight, regularize=regularize)
        found.append(gradients(dual_loss(start, batch, settings, correct=False), start))
    without, both = found
    for name in POSITIVE:
        torch.testing.assert_close(without[name], both[name])
    for name in NEGATIVE:
        assert not without[name].any()
        assert both[name].any()
    for name in ADAPTER:
        assert torch.allclose(without[name], both[name]) is not regularize


def test_training_learns_the_features_and_finds_the_lies() -> None:
    seen, truth, labels = wave(n=300, n_classes=6, noise=0.3)
    dual = train(seen, labels, ones(seen), DualSettings(prior=1.0), seed=0)
    before, after = seen.zero_shot.argmax(axis=1) == truth, predict(dual, seen).argmax(1) == truth
    assert after.mean() > 0.85 > 0.6 > before.mean()
    clean = cleanliness(dual, seen, labels)
    assert np.median(clean[labels == truth]) > 0.9 > 0.15 > np.median(clean[labels != truth])


def test_no_label_is_corrected_during_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _, labels = wave(n=60, n_classes=4, noise=0.1)
    flags = []

    def spied(dual: Dual, batch: Batch, settings: DualSettings, *, correct: bool) -> Tensor:
        flags.append(correct)
        return dual_loss(dual, batch, settings, correct=correct)

    monkeypatch.setattr("blackbox_vlm.coft.dual.dual_loss", spied)
    train(seen, labels, ones(seen), DualSettings(steps=10, warm_up=0.3), seed=0)
    assert flags == [False] * 3 + [True] * 7


def test_every_image_has_its_turn_before_one_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _, labels = wave(n=60, n_classes=4, noise=0.1)
    shown = []

    def spied(dual: Dual, batch: Batch, settings: DualSettings, *, correct: bool) -> Tensor:
        shown.append(batch.features)
        return dual_loss(dual, batch, settings, correct=correct)

    monkeypatch.setattr("blackbox_vlm.coft.dual.dual_loss", spied)
    train(seen, labels, ones(seen), DualSettings(steps=6, batch_size=20), seed=0)
    for epoch in (torch.cat(shown[:3]), torch.cat(shown[3:])):
        assert len(epoch.unique(dim=0)) == 60
    assert not torch.equal(shown[0], shown[3])


def test_without_a_negative_prompt_it_stays_where_it_starts() -> None:
    seen, _, labels = wave(n=60, n_classes=4, noise=0.1)
    settings = DualSettings(negative_weight=0.0, steps=20)
    dual = train(seen, labels, ones(seen), settings, seed=0)
    assert not dual.negative_weight.any()
    assert not dual.negative_bias.any()
    assert dual.positive_weight.any()


def test_images_without_label_or_weight_teach_nothing() -> None:
    seen, _, labels = wave(n=80, n_classes=4, noise=0.0)
    settings, weights = DualSettings(steps=30), ones(seen)
    half = np.arange(80) < 40
    alone = Seen(seen.features[half], seen.zero_shot[half])
    expected = train(alone, labels[half], weights[half], settings, seed=3)
    unlabelled = train(seen, np.where(half, labels, NO_LABEL), weights, settings, seed=3)
    weightless = train(seen, labels, weights * half, settings, seed=3)
    for wanted, one, other in zip(expected, unlabelled, weightless, strict=True):
        assert torch.equal(wanted, one)
        assert torch.equal(wanted, other)


def test_a_batch_counts_images_by_their_weights(dual: Dual, batch: Batch) -> None:
    counts = torch.tensor([1, 3, 0, 2, 1, 0])
    repeated = Batch(*(values.repeat_interleave(counts, dim=0) for values in batch[:3]), counts)
    repeated = repeated._replace(weights=torch.ones(7, dtype=torch.float64))
    weighted = batch._replace(weights=counts.double())
    losses = [dual_loss(dual, shown, SETTINGS, correct=True) for shown in (weighted, repeated)]
    torch.testing.assert_close(*losses)


def test_training_is_the_same_for_classes_in_another_order() -> None:
    seen, _, labels = wave(n=90, n_classes=5, noise=0.2)
    order = np.array([3, 0, 4, 1, 2])  # new class j is old class order[j]
    renamed = Seen(seen.features, np.ascontiguousarray(seen.zero_shot[:, order]))
    settings = DualSettings(steps=40)
    plain = train(seen, labels, ones(seen), settings, seed=1)
    other = train(renamed, np.argsort(order)[labels], ones(seen), settings, seed=1)
    np.testing.assert_allclose(
        predict(plain, seen)[:, order], predict(other, renamed), rtol=0, atol=2e-3
    )


def test_the_seed_decides_and_nothing_else_is_touched() -> None:
    seen, _, labels = wave(n=200, n_classes=4, noise=0.2)
    for array in (*seen[:2], labels):
        array.setflags(write=False)
    before = torch.random.get_rng_state()
    runs = [train(seen, labels, ones(seen), DualSettings(steps=5), seed) for seed in (7, 7, 8)]
    assert torch.equal(before, torch.random.get_rng_state())
    first, same, other = (predict(dual, seen) for dual in runs)
    assert np.array_equal(first, same)
    assert not np.allclose(first, other)
    assert not any(parameter.requires_grad for parameter in runs[0])


def test_more_images_than_a_block_are_predicted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _, labels = wave(n=50, n_classes=4, noise=0.2)
    dual = train(seen, labels, ones(seen), DualSettings(steps=5), seed=0)
    whole = predict(dual, seen), cleanliness(dual, seen, labels)
    monkeypatch.setattr("blackbox_vlm.coft.dual.BLOCK", 16)
    np.testing.assert_allclose(predict(dual, seen), whole[0], atol=1e-5)
    np.testing.assert_allclose(cleanliness(dual, seen, labels), whole[1], atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        ([0, 1], [1, 1, 1], r"labels \(2,\) and weights \(3,\) for 3 images"),
        ([0, 1, 2], [1, 1], r"labels \(3,\) and weights \(2,\) for 3 images"),
        ([0, 1, 5], [1, 1, 1], "from 0 to 5, wanted 0 to 2"),
        ([0, 1, -2], [1, 1, 1], "from -2 to 1, wanted 0 to 2"),
        ([0, 1, 2], [1, -1, 1], "negative"),
        ([0, 1, 2], [1, np.nan, 1], "not finite"),
        ([0, 1, 2], [1, np.inf, 1], "not finite"),
        ([0, -1, -1], [0, 1, 1], "no image has a pseudo-label with a weight"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    labels: list[int], weights: list[float], message: str
) -> None:
    seen = Seen(np.ones((3, 2), dtype=np.float32), np.zeros((3, 3), dtype=np.float32))
    with pytest.raises(InputError, match=message):
        train(
            seen,
            np.array(labels, dtype=np.int64),
            np.array(weights, dtype=np.float32),
            DualSettings(),
            seed=0,
        )
