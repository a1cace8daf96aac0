"""Momentum contrast: its equations against sums written out, its queue and its slow encoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blackbox_vlm.coft import contrast


def drawn(count: int, seed: int = 0) -> Tensor:
    vectors = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def test_the_key_encoder_follows_slowly() -> None:
    weight = torch.tensor([1.0, 2.0])
    state = contrast.init((weight,), dim=3)
    moved = torch.tensor([2.0, -2.0])
    state = contrast.follow(state, (moved,), 0.9)
    assert state.keys[0].tolist() == pytest.approx([0.9 * 1 + 0.1 * 2, 0.9 * 2 - 0.1 * 2])
    state = contrast.follow(state, (moved,), 0.9)
    assert state.keys[0][0] == pytest.approx(0.9 * 1.1 + 0.1 * 2)
    assert weight.tolist() == [1, 2]  # the encoder itself is left alone


def test_a_key_encoder_holds_no_gradients_and_shares_no_memory() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    state = contrast.init((weight,), dim=3)
    with torch.no_grad():
        weight += 1
    assert state.keys[0].tolist() == [1, 1]
    assert not contrast.follow(state, (weight,), 0.5).keys[0].requires_grad


def test_the_queue_forgets_its_oldest() -> None:
    state = contrast.init((), dim=1)
    for step in range(3):
        keys = torch.full((2, 1), float(step), requires_grad=True)
        state = contrast.enqueue(state, keys, torch.tensor([step, -1]), limit=5)
    assert state.queue[:, 0].tolist() == [0, 1, 1, 2, 2]
    assert state.labels.tolist() == [-1, 1, -1, 2, -1]
    assert not state.queue.requires_grad


def test_states_are_not_changed_in_place() -> None:
    before = contrast.enqueue(contrast.init((), 5), drawn(2), torch.tensor([0, 1]), 8)
    contrast.enqueue(before, drawn(2, seed=1), torch.tensor([1, 1]), 8)
    assert torch.equal(before.queue, drawn(2))
    assert before.labels.tolist() == [0, 1]


def test_info_nce_is_the_sum_of_the_paper() -> None:
    queries, keys, queue, t = drawn(3), drawn(3, 1), drawn(4, 2), 0.3
    expected = 0.0
    for q, k in zip(queries, keys, strict=True):
        own = math.exp(float(q @ k) / t)
        expected -= math.log(own / (own + sum(math.exp(float(q @ o) / t) for o in queue))) / 3
    assert float(contrast.info_nce(queries, keys, queue, t)) == pytest.approx(expected, rel=1e-5)
    assert float(contrast.info_nce(queries, keys, queue[:0], t)) == 0


def test_supervised_contrast_is_the_sum_of_the_paper() -> None:
    queries, keys, t = drawn(2), drawn(5, 1), 0.3
    labels, key_labels = torch.tensor([0, 1]), torch.tensor([0, 1, 0, 2, -1])
    positives = [[0, 2], [1]]
    expected = 0.0
    for i, positive in enumerate(positives):
        exps = [math.exp(float(queries[i] @ k) / t) for k in keys]
        expected -= sum(math.log(exps[p] / sum(exps)) for p in positive) / len(positive) / 2
    got = contrast.supervised(queries, labels, keys, key_labels, t)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_without_labels_the_supervised_contrast_is_info_nce() -> None:
    queries, keys, queue = drawn(1), drawn(1, 1), drawn(4, 2)
    nothing = torch.full((5,), -1)
    both = torch.cat([keys, queue])
    got = contrast.supervised(queries, nothing[:1], both, nothing, 0.2)
    assert float(got) == pytest.approx(float(contrast.info_nce(queries, keys, queue, 0.2)))


def test_what_is_ignored_is_neither_positive_nor_negative() -> None:
    queries, keys = drawn(2), drawn(5, 1)
    labels, key_labels = torch.tensor([0, 1]), torch.tensor([0, 1, 0, 1, 0])
    ignored = torch.zeros(2, 5, dtype=torch.bool)
    ignored[:, 3:] = True
    got = contrast.supervised(queries, labels, keys, key_labels, 0.2, ignored)
    without = contrast.supervised(queries, labels, keys[:3], key_labels[:3], 0.2)
    assert float(got) == pytest.approx(float(without), rel=1e-6)
    ignored[:] = True  # an image's own other view stays all the same
    assert float(contrast.supervised(queries, labels, keys, key_labels, 0.2, ignored)) == 0


@pytest.mark.parametrize("supervised", [False, True])
def test_gradients_reach_the_queries_and_no_keys(supervised: bool) -> None:
    queries, keys = drawn(3).requires_grad_(), drawn(3, 1).requires_grad_()
    if supervised:
        labels = torch.tensor([0, 0, -1])
        ignored = torch.zeros(3, 3, dtype=torch.bool)
        ignored[0, 2] = True
        loss = contrast.supervised(queries, labels, keys, labels, 0.1, ignored)
    else:
        loss = contrast.info_nce(queries, keys, drawn(4, 2), 0.1)
    loss.backward()
    assert queries.grad is not None
    assert torch.isfinite(queries.grad).all()
    assert queries.grad.abs().min(dim=1).values.max() > 0
    assert keys.grad is None


def test_descending_brings_views_of_one_class_together() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    weight = drawn(4, 3).requires_grad_()
    state = contrast.init((weight,), 5)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for _ in range(50):
        queries = torch.nn.functional.normalize(weight, dim=1)
        state = contrast.follow(state, (weight,), 0.5)
        keys = torch.nn.functional.normalize(state.keys[0], dim=1)
        every = torch.cat([keys, state.queue])
        key_labels = torch.cat([labels, state.labels])
        loss = contrast.supervised(queries, labels, every, key_labels, 0.2)
        state = contrast.enqueue(state, keys, labels, 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cosines = torch.nn.functional.normalize(weight.detach(), dim=1)
    cosines = cosines @ cosines.T
    assert min(cosines[0, 1], cosines[2, 3]) > 0.95
    assert cosines[:2, 2:].max() < 0
