"""The transductive classifiers and their neighbours, on cases that can be checked by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import softmax

from blackbox_vlm.coft import neighbours, transductive
from blackbox_vlm.coft.neighbours import graph, nearest
from blackbox_vlm.coft.transductive import (
    Anchor,
    Gaussians,
    Settings,
    Transduced,
    fit_gaussians,
    stata,
    transclip,
)
from blackbox_vlm.errors import InputError
from blackbox_vlm.observe.heads import Seen, logits

Method = Callable[..., Transduced]
METHODS = pytest.mark.parametrize("method", [transclip, stata])
NONE = -1


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def no_graph(n: int) -> csr_matrix:
    return csr_matrix((n, n), dtype=np.float32)


def blobs(
    classes: int = 2, each: int = 40, *, of: int | None = None, skill: float = 1.0, dim: int = 5
) -> tuple[Seen, NDArray[np.int64]]:
    """Blobs far from each other, and zero-shot logits among `of` classes that know a little."""
    random = generator()
    labels = np.repeat(np.arange(classes), each)
    x = 3 * np.eye(classes, dim)[labels] + random.standard_normal((len(labels), dim))
    n_classes = of or classes
    zero_shot = skill * np.eye(n_classes)[labels]
    zero_shot = zero_shot + random.standard_normal((len(labels), n_classes))
    return Seen((x - x.mean(axis=0)).astype(np.float32), zero_shot.astype(np.float32)), labels


def unlabelled(seen: Seen) -> NDArray[np.int64]:
    return np.full(len(seen.features), NONE)


def right(found: Transduced, truth: NDArray[np.int64]) -> float:
    return float((found.posterior.argmax(axis=1) == truth).mean())


# What both promise --------------------------------------------------------------------------------


@METHODS
def test_blobs_are_told_apart_where_zero_shot_errs(method: Method) -> None:
    seen, truth = blobs()
    assert (seen.zero_shot.argmax(axis=1) == truth).mean() < 0.8
    near = graph(seen.features, random=generator())
    assert right(method(seen, near, unlabelled(seen)), truth) > 0.95


@METHODS
def test_gaussians_alone_tell_blobs_apart(method: Method) -> None:
    seen, truth = blobs()
    assert right(method(seen, no_graph(len(truth)), unlabelled(seen)), truth) > 0.9


@METHODS
def test_neighbours_alone_tell_blobs_apart(method: Method) -> None:
    seen, truth = blobs()
    near = graph(seen.features, random=generator())
    found = method(seen, near, unlabelled(seen), settings=Settings(temperature=1e9))
    assert right(found, truth) > 0.9
    np.testing.assert_allclose(found.head.weight, 0, atol=1e-6)


@METHODS
def test_posteriors_sum_to_one_and_nothing_else_changes(method: Method) -> None:
    seen, truth = blobs(3)
    near, labels = graph(seen.features, random=generator()), unlabelled(seen)
    before = [array.copy() for array in (seen.features, seen.zero_shot, labels, near.data)]
    found, again = method(seen, near, labels), method(seen, near, labels)
    assert found.posterior.shape == (len(truth), 3)
    assert found.posterior.dtype == np.float32
    np.testing.assert_allclose(found.posterior.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(found.posterior, again.posterior)
    for one, copy in zip((seen.features, seen.zero_shot, labels, near.data), before, strict=True):
        np.testing.assert_array_equal(one, copy)


@METHODS
def test_the_order_of_classes_and_images_plays_no_part(method: Method) -> None:
    seen, truth = blobs(4)
    near, labels = graph(seen.features, random=generator()), np.where(truth == 0, truth, NONE)
    images, classes = generator().permutation(len(truth)), np.array([2, 0, 3, 1])
    offset = np.array([0.3, 0, -0.3, 0.1])
    found = method(seen, near, labels, offset=offset)
    moved = Seen(seen.features[images], seen.zero_shot[images][:, classes])
    moved_labels = np.where(labels == 0, 1, NONE)[images]  # class 0 is now the second
    other = method(moved, near[images][:, images], moved_labels, offset=offset[classes])
    np.testing.assert_allclose(
        other.posterior, found.posterior[images][:, classes], rtol=1e-3, atol=1e-4
    )


@METHODS
def test_the_scale_of_an_endpoints_logits_plays_no_part(method: Method) -> None:
    seen, _ = blobs()
    near = graph(seen.features, random=generator())
    found = method(seen, near, unlabelled(seen), offset=np.array([0.1, -0.1]))
    louder = seen._replace(zero_shot=7 * seen.zero_shot)
    other = method(louder, near, unlabelled(seen), offset=np.array([0.7, -0.7]))
    np.testing.assert_allclose(other.posterior, found.posterior, atol=1e-4)
    np.testing.assert_allclose(logits(other.head, louder), logits(found.head, seen), atol=1e-3)


@METHODS
def test_labelled_images_keep_their_labels_and_teach(method: Method) -> None:
    seen, truth = blobs(skill=-1.0)  # zero-shot takes each class for the other
    near = graph(seen.features, random=generator())
    labels = unlabelled(seen)
    assert right(method(seen, near, labels), truth) < 0.1
    labels[::2] = truth[::2]
    found = method(seen, near, labels)
    np.testing.assert_array_equal(found.posterior[::2], np.eye(2)[truth[::2]])
    assert right(found, truth) > 0.9


@METHODS
def test_the_head_is_the_posterior_without_neighbours(method: Method) -> None:
    seen, truth = blobs(3)
    found = method(seen, no_graph(len(truth)), unlabelled(seen), offset=np.array([0.5, 0, -0.5]))
    said = softmax(logits(found.head, seen), axis=1)
    np.testing.assert_allclose(said, found.posterior, atol=1e-5)


@METHODS
def test_the_offset_is_as_if_the_endpoint_had_said_it(method: Method) -> None:
    seen, _ = blobs(3)
    near, offset = graph(seen.features, random=generator()), np.array([1.0, 0, -1])
    found = method(seen, near, unlabelled(seen), offset=offset)
    evened = seen._replace(zero_shot=(seen.zero_shot + offset).astype(np.float32))
    other = method(evened, near, unlabelled(seen))
    np.testing.assert_allclose(other.posterior, found.posterior, atol=1e-6)


@METHODS
def test_one_image_and_features_that_say_nothing_are_enough(method: Method) -> None:
    alone = Seen(np.zeros((1, 1), dtype=np.float32), np.array([[1, 0, -1]], dtype=np.float32))
    found = method(alone, graph(alone.features, random=generator()), np.array([NONE]))
    expected = softmax(np.array([1, 0, -1]) / np.sqrt(2 / 3))  # at a standard deviation of 1
    np.testing.assert_allclose(found.posterior[0], expected, rtol=1e-5)
    silent = alone._replace(zero_shot=np.zeros((1, 3), dtype=np.float32))
    found = method(silent, no_graph(1), np.array([NONE]))
    np.testing.assert_allclose(found.posterior[0], np.full(3, 1 / 3), rtol=1e-5)


@METHODS
def test_what_does_not_fit_is_refused(method: Method) -> None:
    seen, truth = blobs()
    n = len(truth)
    with pytest.raises(InputError, match=r"got 80, 80, 79 and \(80, 80\)"):
        method(seen, no_graph(n), truth[1:])
    with pytest.raises(InputError, match=r"got 80, 80, 80 and \(79, 79\)"):
        method(seen, no_graph(n - 1), truth)
    with pytest.raises(InputError, match="labels from 0 to 1, or -1 for none; got 0 to 2"):
        method(seen, no_graph(n), np.r_[truth[1:], 2])
    with pytest.raises(InputError, match="got -2 to 1"):
        method(seen, no_graph(n), np.r_[truth[1:], -2])
    with pytest.raises(InputError, match="one or more"):
        method(Seen(seen.features[:0], seen.zero_shot[:0]), no_graph(0), truth[:0])


# The Gaussians ------------------------------------------------------------------------------------


def test_gaussians_are_weighted_means_and_the_spread_about_them() -> None:
    seen, _ = blobs(3)
    x, posterior = seen.features, softmax(seen.zero_shot, axis=1)
    found = fit_gaussians(x, posterior)
    for c in range(3):
        expected = np.average(x, axis=0, weights=posterior[:, c])
        np.testing.assert_allclose(found.means[c], expected, atol=1e-5)
    squares = (x[:, None] - found.means) ** 2
    expected = (posterior[:, :, None] * squares).sum(axis=(0, 1)) / len(x)
    np.testing.assert_allclose(found.variances, expected, rtol=1e-4)


def test_it_starts_from_the_eight_images_likeliest_of_each_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transductive, "ROUNDS", 0)
    seen, truth = blobs(3)
    labels = unlabelled(seen)
    labels[0] = 0
    found = transclip(seen, no_graph(len(truth)), labels, settings=Settings(temperature=0.2))
    posterior = softmax(seen.zero_shot / seen.zero_shot.std(), axis=1)
    posterior[0] = [1, 0, 0]
    means = np.stack([seen.features[np.argsort(-p)[:8]].mean(axis=0) for p in posterior.T])
    squares = (seen.features[:, None] - means) ** 2
    variances = (posterior[:, :, None] * squares).sum(axis=(0, 1)) / len(truth)
    expected = -0.5 * (squares / variances).sum(axis=2) / (0.2 * 5)
    expected += seen.zero_shot / seen.zero_shot.std()
    np.testing.assert_allclose(
        softmax(logits(found.head, seen), axis=1), softmax(expected, axis=1), rtol=1e-3, atol=1e-5
    )


def test_an_absent_class_stays_at_its_anchor_and_others_leave_it_with_their_images() -> None:
    x = np.array([[1, 0], [3, 0], [2, 2], [2, -2]], dtype=np.float32)
    posterior = np.eye(2, dtype=np.float32)[[0, 0, 0, 0]]
    anchor = Gaussians(np.array([[0.0, 0], [7, 7]]), np.array([1.0, 1.0]))
    found = fit_gaussians(x, posterior, Anchor(anchor, alpha=12))
    np.testing.assert_allclose(found.means, [[0.5, 0], [7, 7]])  # 4 images of 4 + 12
    own = np.array([2.75, 2.0])  # mean squares about (0.5, 0)
    np.testing.assert_allclose(found.variances, (4 * own + 24) / 28)
    near = fit_gaussians(x, posterior, Anchor(anchor, alpha=1e-9))
    np.testing.assert_allclose(near.means, [[2, 0], [7, 7]])


def test_stata_leaves_absent_classes_fewer_images() -> None:
    seen, truth = blobs(2, of=12, skill=2.0)
    near = graph(seen.features, random=generator())
    anchored = stata(seen, near, unlabelled(seen))
    free = transclip(seen, near, unlabelled(seen))
    assert right(anchored, truth) > right(free, truth) + 0.1


# Neighbours ---------------------------------------------------------------------------------------


def clustered(n: int = 3_000, dim: int = 16) -> NDArray[np.float32]:
    """Triples of vectors that are close to each other and to no other."""
    random = generator()
    centres = np.repeat(random.standard_normal((n // 3, dim)), 3, axis=0)
    return np.asarray(centres + 0.01 * random.standard_normal((n, dim)), dtype=np.float32)


def test_few_images_have_their_nearest_by_cosine() -> None:
    x = generator().standard_normal((1_100, 7)).astype(np.float32)  # more than a block
    indices, cosines = nearest(x, 4, random=generator())
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    all_pairs = units @ units.T - 2 * np.eye(len(x))
    np.testing.assert_array_equal(indices, np.argsort(-all_pairs, axis=1)[:, :4])
    np.testing.assert_allclose(cosines, -np.sort(-all_pairs, axis=1)[:, :4], rtol=1e-5)


def recall(x: NDArray[np.float32], k: int = 3) -> float:
    """Share of the nearest that are found among many images."""
    found, _ = nearest(x, k, random=generator(), exact=100)
    exact, _ = nearest(x, k, random=generator())
    return float((found[:, :, None] == exact[:, None, :]).any(axis=2).mean())


def test_many_images_find_those_that_are_close() -> None:
    x = clustered()
    indices, cosines = nearest(x, 5, random=generator(), exact=100)
    same = indices // 3 == np.arange(len(x))[:, None] // 3
    assert same[:, :2].mean() > 0.95
    assert all(len(set(row)) == 5 for row in indices)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(
        cosines, np.einsum("nd,nkd->nk", units, units[indices]), rtol=1e-4, atol=1e-5
    )
    assert (np.diff(cosines, axis=1) <= 0).all()


def test_several_trees_miss_few_of_the_nearest_and_compare_few() -> None:
    x = generator().standard_normal((4_000, 6)).astype(np.float32)
    assert 0.8 < recall(x) < 1


def test_trees_halve_where_images_vary() -> None:
    spread = np.r_[np.ones(3), np.full(400, 0.15)]
    x = spread * generator().standard_normal((4_000, 403))
    assert recall(x.astype(np.float32)) > 0.9


def test_no_image_is_its_own_neighbour_or_one_twice() -> None:
    x = np.ones((2_000, 1), dtype=np.float32)  # all the same, and fewer directions than levels
    indices, cosines = nearest(x, 5, random=generator(), exact=100)
    assert (indices >= 0).all()
    assert (indices != np.arange(len(x))[:, None]).all()
    assert all(len(set(row)) == 5 for row in indices)
    np.testing.assert_allclose(cosines, 1, rtol=1e-6)


def test_many_neighbours_need_large_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "LEAF", 8)
    indices, cosines = nearest(clustered(300), 20, random=generator(), exact=100)
    assert (indices >= 0).all()
    assert np.isfinite(cosines).all()


def test_neighbours_are_the_same_for_the_same_draw() -> None:
    x = clustered()
    one, two = (nearest(x, 3, random=generator(), exact=100)[0] for _ in range(2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("k", [0, 3])
def test_only_other_images_are_neighbours(k: int) -> None:
    with pytest.raises(InputError, match=f"1 to 2 neighbours among 3 images, got k = {k}"):
        nearest(np.eye(3, dtype=np.float32), k, random=generator())


def test_the_graph_of_three_images() -> None:
    x = np.array([[1, 0], [0.6, 0.8], [-1, 0]], dtype=np.float32)
    near = graph(x, k=1, random=generator()).toarray()
    # The first two choose each other; the third chooses the second at a cosine of -0.6: 0.
    np.testing.assert_allclose(near, [[0, 1, 0], [1, 0, 0], [0, 0, 0]], atol=1e-6)


def test_the_graph_is_symmetric_and_amplifies_nothing() -> None:
    x = generator().standard_normal((200, 5)).astype(np.float32)
    near = graph(x, random=generator())
    assert near.dtype == np.float32
    assert (abs(near - near.T)).max() < 1e-6
    assert np.linalg.eigvalsh(near.toarray()).max() == pytest.approx(1, abs=1e-4)
    assert near.nnz <= 20 * 200
    assert graph(x[:4], random=generator()).shape == (4, 4)  # fewer images than neighbours
