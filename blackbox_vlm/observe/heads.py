"""What a head is: it learns from features, with the zero-shot logits as its prior.

A head is a pair of pure functions: `fit(seen, labels) -> fitted`, in the module of its method, and
`logits(fitted, seen)` here. What is fitted is a named tuple of arrays, so that an adapter can
store it, and of few kinds, so that a reader of adapters need not know which method made it.

A class without images: nothing is known but its zero-shot logit, so a head gives it the mean of
what it adds to the other classes, which is zero by `even_out`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Labels = NDArray[np.int64]


class Seen(NamedTuple):
    """What a head sees of images: `features` `(n, d)`, and `zero_shot` logits `(n, C)`, centred.

    Where `views` rows show each image, they count as one image.
    """

    features: Floats
    zero_shot: Floats
    views: float = 1.0


class Linear(NamedTuple):
    """`features @ weight + bias + prior * zero_shot`."""

    weight: Floats  # (d, C)
    bias: Floats  # (C,)
    prior: Floats  # (), how far the zero-shot logits are trusted


class Kernel(NamedTuple):
    """`k(features, support) @ coefficients + bias + prior * zero_shot`.

    The kernel is `k(x, s) = exp(-beta |x - s|^2 / 2)`.
    """

    support: Floats  # (m, d)
    coefficients: Floats  # (m, C)
    bias: Floats  # (C,)
    beta: Floats  # ()
    prior: Floats  # ()


class Residual(NamedTuple):
    """`zero_shot + g(zero_shot)`: CraFT's refiner (equation 2) on the zero-shot logits."""

    hidden_weight: Floats  # (H, C)
    hidden_bias: Floats  # (H,)
    output_weight: Floats  # (C, H)
    output_bias: Floats  # (C,)


Fitted = Linear | Kernel | Residual
Head = Callable[[Seen, Labels], Fitted]  # its hyperparameters are bound


def logits(fitted: Fitted, seen: Seen) -> Floats:
    """What a fitted head says of images, `(n, C)` float32."""
    if isinstance(fitted, Residual):
        inner = seen.zero_shot @ fitted.hidden_weight.T + fitted.hidden_bias
        outer = np.maximum(inner, 0) @ fitted.output_weight.T + fitted.output_bias
        return as_float32(seen.zero_shot + outer)
    if isinstance(fitted, Linear):
        added = seen.features @ fitted.weight
    else:
        added = gaussian_kernel(seen.features, fitted.support, fitted.beta) @ fitted.coefficients
    return as_float32(added + fitted.bias + fitted.prior * seen.zero_shot)


def gaussian_kernel(features: NDArray[Any], support: NDArray[Any], beta: Any) -> NDArray[Any]:
    """`exp(-beta |x - s|^2 / 2)` of every pair, `(n, m)`."""
    squares = (features**2).sum(axis=1)[:, None] + (support**2).sum(axis=1)
    distances = np.maximum(squares - 2 * features @ support.T, 0)
    kernel: NDArray[Any] = np.exp(-0.5 * beta * distances)
    return kernel


def class_counts(labels: Labels, n_classes: int) -> NDArray[np.int64]:
    """Images of every class, `(C,)`."""
    return np.bincount(labels, minlength=n_classes)


def class_means(values: NDArray[Any], labels: Labels, n_classes: int) -> Doubles:
    """The mean of every class's rows of `values` `(n, d)`, `(C, d)`; zero for a class without."""
    members = np.zeros((n_classes, len(labels)))
    members[labels, np.arange(len(labels))] = 1 / class_counts(labels, n_classes)[labels]
    means: Doubles = members @ values.astype(np.float64)
    return means


def even_out(columns: NDArray[Any], present: NDArray[np.bool_]) -> NDArray[Any]:
    """Take the mean over the classes `present` off each row `(..., C)`; the others become zero."""
    evened: NDArray[Any] = columns - columns[..., present].mean(axis=-1, keepdims=True)
    return np.where(present, evened, 0.0)


def as_float32(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float32)
