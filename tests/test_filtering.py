"""Two models filter for each other: what is kept, how much of each class, and what comes back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from blackbox_vlm.backend import NO_LABEL
from blackbox_vlm.coft.dual import Dual, DualSettings, cleanliness, predict, train
from blackbox_vlm.coft.filtering import (
    Judged,
    best_of_each,
    collaborate,
    judge,
    select,
)
from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.heads import Floats, Labels, Seen

N, C = 200, 4
SETTINGS = DualSettings(prior=1.0, hidden=8, steps=60, batch_size=64)
EVEN = np.full(C, 1 / C)


def judged(
    labels: Labels, clean: Floats, others: Labels | None = None, n_classes: int = C
) -> Judged:
    """What models say that name `labels` and `others`, the second more surely."""
    second = labels if others is None else others
    posterior = np.full((len(labels), n_classes), 0.1, dtype=np.float32)
    posterior[np.arange(len(labels)), labels] += 0.2
    posterior[np.arange(len(labels)), second] += 0.3
    return Judged(np.stack([labels, second]), np.stack([clean, clean]), posterior)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def said(random: np.random.Generator) -> Judged:
    """Even classes, half agreed on."""
    labels = np.arange(N) % C
    others = np.where(np.arange(N) < N // 2, labels, (labels + 1) % C)
    return judged(labels, random.random(N).astype(np.float32), others)


def clusters(n: int = N, seed: int = 0) -> tuple[Seen, Seen, Labels, Labels]:
    """Two views of clusters, their truth, and pseudo-labels of which 3 in 10 are wrong."""
    random = np.random.default_rng(seed)
    truth = np.arange(n) % C
    views = []
    for _ in range(2):
        centres = random.standard_normal((C, 16)) / 4
        features = centres[truth] + 0.8 * random.standard_normal((n, 16)) / 4
        zero_shot = np.eye(C)[truth] + random.standard_normal((n, C))
        views.append(Seen(features.astype(np.float32), zero_shot.astype(np.float32)))
    lies = (truth + random.integers(1, C, n)) % C
    return views[0], views[1], truth, np.where(random.random(n) < 0.3, lies, truth)


def ones(n: int = N) -> Floats:
    return np.ones(n, dtype=np.float32)


@pytest.fixture(scope="module")
def pair() -> tuple[list[Dual], list[Seen]]:
    first, second, _, labels = clusters()
    views = [first, second]
    return [train(v, labels, ones(), SETTINGS, seed) for seed, v in enumerate(views)], views


def test_each_model_is_judged_by_the_other(pair: tuple[list[Dual], list[Seen]]) -> None:
    duals, views = pair
    found = judge(duals, views)
    a, b = (predict(dual, view) for dual, view in zip(duals, views, strict=True))
    assert np.array_equal(found.labels, [a.argmax(axis=1), b.argmax(axis=1)])
    assert np.array_equal(found.clean[0], cleanliness(duals[1], views[1], a.argmax(axis=1)))
    assert np.array_equal(found.clean[1], cleanliness(duals[0], views[0], b.argmax(axis=1)))
    softmaxes = [torch.tensor(logits).softmax(dim=1).numpy() for logits in (a, b)]
    np.testing.assert_allclose(found.posterior, np.mean(softmaxes, axis=0), atol=1e-6)
    assert np.array_equal(found.agree, a.argmax(axis=1) == b.argmax(axis=1))
    assert 0.5 < found.agree.mean() < 1


def test_a_single_model_judges_itself(pair: tuple[list[Dual], list[Seen]]) -> None:
    (dual, _), (view, _) = pair
    found = judge([dual], [view])
    assert found.agree.all()
    own = cleanliness(dual, view, found.named)
    assert np.array_equal(found.clean, [own, own])
    np.testing.assert_allclose(found.posterior.sum(axis=1), 1, atol=1e-5)


def test_what_the_two_keep_is_right_more_often() -> None:
    first, second, truth, labels = clusters(400)
    _, found = collaborate([first, second], labels, ones(400), SETTINGS, seed=0)
    kept = select(found, EVEN)
    mine = kept.labels != NO_LABEL
    right = kept.labels[mine] == truth[mine]
    everywhere = found.named == truth
    assert (labels == truth).mean() < 0.75
    assert everywhere.mean() > (labels == truth).mean() + 0.05
    assert right.mean() > everywhere.mean() + 0.05


def test_the_models_have_different_seeds_and_the_same_labels() -> None:
    first, second, _, labels = clusters()
    _, found = collaborate([first, second], labels, ones(), SETTINGS, seed=5)
    duals = [train(v, labels, ones(), SETTINGS, seed) for seed, v in ((5, first), (6, second))]
    for one, other in zip(found, judge(duals, [first, second]), strict=True):
        assert np.array_equal(one, other)
    _, twice = collaborate([first, first], labels, ones(), SETTINGS, seed=5)
    assert not np.array_equal(twice.clean[0], twice.clean[1])


def test_images_of_every_class_are_kept_by_its_mass(said: Judged) -> None:
    mass = np.array([0.5, 0.3, 0.15, 0.05])
    everywhere = said._replace(labels=np.stack([said.named, said.named]))
    kept = select(everywhere, mass, share=0.4)
    assert kept.statistics.counts.tolist() == [40, 24, 12, 4]
    clean = everywhere.clean[0]
    for label in range(C):
        own = everywhere.named == label
        mine = own & (kept.labels == label)
        assert clean[mine].min() > clean[own & ~mine].max()


def test_a_rare_class_keeps_one_image(said: Judged) -> None:
    kept = select(said, np.array([0.9, 0.1, 0.0, 0.0]), share=0.1)
    assert kept.statistics.counts.tolist() == [18, 2, 1, 1]


def test_images_rank_by_the_model_that_thinks_worse_of_them() -> None:
    labels = np.zeros(3, dtype=np.int64)
    found = judged(labels, np.array([0.9, 0.9, 0.9], dtype=np.float32), n_classes=2)
    found = found._replace(clean=np.array([[0.9, 0.2, 0.5], [0.3, 0.9, 0.5]], dtype=np.float32))
    kept = select(found, np.array([1.0, 0.0]), share=0.34)
    assert kept.labels.tolist() == [NO_LABEL, NO_LABEL, 0]


def test_what_they_disagree_on_is_left_out(said: Judged) -> None:
    kept = select(said, EVEN, share=1.0)
    assert np.array_equal(kept.labels != NO_LABEL, said.agree)
    assert np.array_equal(kept.labels[said.agree], said.labels[0][said.agree])
    assert kept.statistics.agreement == kept.statistics.coverage == 0.5
    assert np.array_equal(kept.weights, said.agree.astype(np.float32))


def test_the_floor_is_filled_with_the_cleanest_others(said: Judged) -> None:
    """A mass that forgets classes would leave 3 images in 200."""
    forgetful = np.array([0.0, 0.0, 0.0, 1.0])
    only = said._replace(labels=np.where(said.labels == 3, 0, said.labels))
    kept = select(only, forgetful)
    mine = kept.labels != NO_LABEL
    assert mine.sum() == 60
    assert only.agree[mine].all()
    first = np.flatnonzero(only.agree)
    rest = first[np.argsort(-only.clean[0][first], kind="stable")]
    assert set(rest[:57]) <= set(np.flatnonzero(mine))
    assert (select(only, forgetful, share=0.1).labels != NO_LABEL).sum() == 20


def test_the_floor_ends_where_they_disagree(said: Judged) -> None:
    other = np.where(np.arange(N) < 20, said.labels[0], (said.labels[0] + 1) % C)
    kept = select(said._replace(labels=np.stack([said.labels[0], other])), EVEN)
    assert kept.statistics.coverage == kept.statistics.agreement == 0.1


def test_equal_scores_go_to_the_first() -> None:
    labels, scores = np.array([1, 0, 1, 1, 0]), np.array([0.5, 0.5, 0.5, 0.9, 0.1])
    eligible = np.array([True, True, True, True, False])
    kept = best_of_each(labels, scores.astype(np.float32), eligible, np.array([2, 2]))
    assert kept.tolist() == [True, True, False, True, False]
    assert not best_of_each(labels, scores.astype(np.float32), ~eligible, np.array([0, 0])).any()


def test_selection_is_the_same_for_classes_in_another_order(said: Judged) -> None:
    order = np.array([2, 0, 3, 1])  # new class j is old class order[j]
    mass = np.array([0.4, 0.3, 0.2, 0.1])
    renamed = Judged(np.argsort(order)[said.labels], said.clean, said.posterior[:, order])
    plain, other = select(said, mass), select(renamed, mass[order])
    kept = plain.labels != NO_LABEL
    assert np.array_equal(order[other.labels[kept]], plain.labels[kept])
    assert (other.labels[~kept] == NO_LABEL).all()
    assert np.array_equal(other.statistics.counts, plain.statistics.counts[order])


@pytest.mark.parametrize(
    ("mass", "share", "message"),
    [
        (np.full(3, 1 / 3), 0.3, r"shape \(3,\)"),
        (np.full(C, 0.5), 0.3, "sum 2"),
        (np.array([1.5, -0.5, 0, 0]), 0.3, "none negative"),
        (np.array([np.nan, 1, 0, 0]), 0.3, "sum nan"),
        (EVEN, 0.0, "share of 0.0"),
        (EVEN, 1.5, "share of 1.5"),
    ],
)
def test_a_mass_or_share_that_is_none_is_refused(
    said: Judged, mass: np.ndarray, share: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        select(said, mass, share=share)


@pytest.mark.parametrize("count", [0, 3])
def test_other_than_one_or_two_views_are_refused(count: int) -> None:
    view, _, _, labels = clusters()
    with pytest.raises(InputError, match=f"got {count} views"):
        collaborate([view] * count, labels, ones(), replace(SETTINGS, steps=1), seed=0)


def test_views_of_other_images_are_refused() -> None:
    view, _, _, labels = clusters()
    other = Seen(view.features[1:], view.zero_shot[1:])
    with pytest.raises(InputError, match="two of the same images"):
        collaborate([view, other], labels, ones(), replace(SETTINGS, steps=1), seed=0)
