"""CMA-ES, the optimiser of CraFT's prompt generation, as pure functions over an immutable state.

N. Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772v2; comments give its equation
numbers, and C = B D² Bᵀ. The separable variant keeps the diagonal of C alone and learns it
(d + 2) / 3 times as fast (Ros & Hansen, "A Simple Modification in CMA-ES ...", PPSN 2008).

    state = init(settings)
    for _ in range(generations):
        candidates, state = ask(settings, state)
        state = tell(settings, state, candidates, losses_of(candidates))

Where the tutorial leaves a choice:

- **Active.** Negative weights are on, as in Table 1 and in pycma, in both variants; eq. 52 with the
  rates of the variant in use keeps C positive definite.
- **Sampling** goes through the symmetric root `B D Bᵀ z`, which no choice of basis changes. C is
  decomposed once in 2 / (d (c_1 + c_mu)) generations; the tutorial's 0.1 saves no evaluations.
- **Bounds.** A candidate outside the box is clipped onto it, and the clipped one is told, so that
  the mean, a convex combination, never leaves the box. A clipped candidate gets no negative weight:
  with one, C collapses and the search stops short of an optimum on the boundary.
- **Losses.** Only their order counts; ties keep the order of the candidates. A loss that is not
  finite (a failed candidate) ranks last. A generation without order, all losses equal or none
  finite, teaches nothing: the distribution stays as it is.
- **Rounding.** Eigenvalues of C stay above 1e-15 of the largest, sigma within [1e-150, 1e150].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blackbox_vlm.errors import InputError

Floats: TypeAlias = NDArray[np.float64]

_EPSILON = 1e-8  # keeps eq. 46 finite for a candidate that sits on the mean
_CONDITION = 1e15  # what float64 resolves: eigh errs by about 1e-16 of the largest eigenvalue
_SIGMA_MIN, _SIGMA_MAX = 1e-150, 1e150


class Strategy(NamedTuple):
    """The parameters that follow from the sizes: the tutorial's Table 1."""

    weights: Floats  # (population_size,), best rank first; the best mu sum to 1
    mu: int
    mu_eff: float  # variance effective selection mass
    c_sigma: float  # cumulation and damping of the step size
    d_sigma: float
    c_c: float  # cumulation of the rank-one path
    c_1: float  # learning rates of C, rank one and rank mu
    c_mu: float
    chi_n: float  # E‖N(0, I)‖
    eigen_gap: float  # generations from one decomposition of C to the next


@dataclass(frozen=True, kw_only=True)
class CMASettings:
    """What is chosen; `strategy` holds what follows from it.

    dimension: d, at least 1. population_size: λ, the candidates of a generation, at least 2.
    sigma0: first step size. separable: learn only the diagonal of C, in time linear in d.
    bounds: half the side of the box [-bounds, bounds]^d, or None. seed: of `init`'s generator.
    Raises `InputError` (a `ValueError`) if a value is out of range.
    """

    dimension: int
    population_size: int
    sigma0: float
    separable: bool = False
    bounds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.dimension >= 1, f"got dimension {self.dimension}, wanted 1 or more")
        _require(self.population_size >= 2, f"got population_size {self.population_size}, wanted 2")
        _require(0 < self.sigma0 < math.inf, f"got sigma0 {self.sigma0}, wanted a positive number")
        _require(self.bounds is None or self.bounds > 0, f"got bounds {self.bounds}, wanted > 0")

    @cached_property
    def strategy(self) -> Strategy:
        speedup = (self.dimension + 2) / 3 if self.separable else 1.0  # Ros & Hansen 2008
        return _strategy(self.dimension, self.population_size, speedup)


def _strategy(d: int, population_size: int, speedup: float) -> Strategy:
    mu = population_size // 2
    ranks = np.arange(1.0, population_size + 1)
    best, rest = np.split(math.log((population_size + 1) / 2) - np.log(ranks), [mu])  # eq. 49
    mu_eff, mu_eff_rest = (float(w.sum() ** 2 / (w**2).sum()) for w in (best, rest))  # eq. 8
    c_sigma = (mu_eff + 2) / (d + mu_eff + 5)  # eq. 55
    d_sigma = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (d + 1)) - 1) + c_sigma  # eq. 55
    c_c = (4 + mu_eff / d) / (d + 4 + 2 * mu_eff / d)  # eq. 56
    c_1 = speedup * 2 / ((d + 1.3) ** 2 + mu_eff)  # eq. 57
    rate = speedup * 2 * (1 / 4 + mu_eff + 1 / mu_eff - 2) / ((d + 2) ** 2 + mu_eff)
    c_mu = min(1 - c_1, rate)  # eq. 58
    negative_sum = min(
        1 + c_1 / c_mu,  # eq. 50
        1 + 2 * mu_eff_rest / (mu_eff + 2),  # eq. 51
        (1 - c_1 - c_mu) / (d * c_mu),  # eq. 52
    )
    weights = np.concatenate([best / best.sum(), -negative_sum * rest / rest.sum()])  # eq. 53
    chi_n = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2))  # below eq. 44
    eigen_gap = 2 / (d * (c_1 + c_mu))  # appendix B.2, with 2 for 0.1
    return Strategy(weights, mu, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu, chi_n, eigen_gap)


class CMAState(NamedTuple):
    """The search distribution N(mean, sigma² C) and its memory; nothing in it is ever written to.

    `eigenvectors` and `deviations`, which sampling uses, are those of C at `decomposed_at`.
    """

    mean: Floats  # (d,)
    sigma: float
    covariance: Floats  # C: (d, d), or its diagonal (d,) when separable
    eigenvectors: Floats | None  # B: (d, d), None when separable
    deviations: Floats  # diagonal of D: (d,), square roots of C's eigenvalues
    path_sigma: Floats  # p_σ: (d,)
    path_c: Floats  # p_c: (d,)
    generation: int  # generations told
    decomposed_at: int
    random_state: NDArray[np.uint64]  # (4,): PCG64's state and increment, low word first


def init(settings: CMASettings, mean: ArrayLike | None = None) -> CMAState:
    """Start at `mean`, (d,), or at the origin, with C = I and both paths zero."""
    d = settings.dimension
    start = np.zeros(d) if mean is None else np.array(mean, dtype=np.float64)
    limit = np.finfo(np.float64).max if settings.bounds is None else settings.bounds
    _require(start.shape == (d,), f"got a mean of shape {start.shape}, wanted ({d},)")
    _require((np.abs(start) <= limit).all(), f"got a mean outside ±{limit}, wanted it within")
    return CMAState(
        mean=start,
        sigma=float(settings.sigma0),
        covariance=np.ones(d) if settings.separable else np.eye(d),
        eigenvectors=None if settings.separable else np.eye(d),
        deviations=np.ones(d),
        path_sigma=np.zeros(d),
        path_c=np.zeros(d),
        generation=0,
        decomposed_at=0,
        random_state=_words(np.random.PCG64(settings.seed)),
    )


def ask(settings: CMASettings, state: CMAState) -> tuple[Floats, CMAState]:
    """Draw candidates (population_size, d) within the bounds; the same state, the same ones."""
    bits = _bit_generator(state.random_state)
    normal = np.random.Generator(bits).standard_normal
    z = normal((settings.population_size, settings.dimension))  # eq. 38
    y = _times_root(state, z, 1)  # eq. 39
    x = state.mean + state.sigma * y  # eq. 40
    if settings.bounds is not None:
        np.clip(x, -settings.bounds, settings.bounds, out=x)
    return x, state._replace(random_state=_words(bits))


def tell(
    settings: CMASettings, state: CMAState, candidates: ArrayLike, losses: ArrayLike
) -> CMAState:
    """Move the distribution towards the candidates of lower loss.

    candidates: (population_size, d), as asked. losses: (population_size,), in the same order, lower
    is better. Raises `InputError` (a `ValueError`) unless the generation is whole.
    """
    x, f = np.asarray(candidates, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    _require_whole(settings, x, f)
    told = state._replace(generation=state.generation + 1)
    finite = np.isfinite(f)
    if not finite.any() or (f == f[0]).all():
        return told
    ranked = x[np.argsort(np.where(finite, f, np.inf), kind="stable")]
    return _update(_strategy_for(settings, ranked), told, (ranked - state.mean) / state.sigma)


def to_arrays(state: CMAState) -> dict[str, NDArray[Any]]:
    """Everything that a resumed run needs, by field name: float64, int64 and uint64 arrays."""
    return {name: np.asarray(value) for name, value in state._asdict().items() if value is not None}


def from_arrays(settings: CMASettings, arrays: Mapping[str, NDArray[Any]]) -> CMAState:
    """Undo `to_arrays`: the run goes on, bit for bit, as if it had never stopped.

    Raises `InputError` if an array is missing or `settings` call for another shape or type.
    """
    fields: dict[str, Any] = dict.fromkeys(CMAState._fields)
    for name, wanted in to_arrays(init(settings)).items():
        _require(name in arrays, f"got no '{name}' in the arrays, wanted all that to_arrays gives")
        got = arrays[name]
        shown, asked = (f"{array.dtype}{list(array.shape)}" for array in (got, wanted))
        _require(shown == asked, f"got {shown} as '{name}', wanted {asked}: other settings?")
        # in C order, for BLAS rounds differently in another
        fields[name] = np.array(got, order="C") if wanted.ndim else got.item()
    return CMAState(**fields)


def _strategy_for(settings: CMASettings, ranked: Floats) -> Strategy:
    """No negative weight for a clipped candidate: its step says nothing about C."""
    strategy, limit = settings.strategy, settings.bounds or math.inf
    clipped = (np.abs(ranked) >= limit).any(axis=1) & (strategy.weights < 0)
    return strategy._replace(weights=np.where(clipped, 0.0, strategy.weights))


def _update(s: Strategy, state: CMAState, y: Floats) -> CMAState:
    """Eqs. 41 to 47; `y` holds the steps y_{i:λ}, (population_size, d), best first."""
    y_w = s.weights[: s.mu] @ y[: s.mu]  # eq. 41
    path_sigma = _path(state.path_sigma, _times_root(state, y_w, -1), s.c_sigma, s.mu_eff)  # eq. 43
    length = float(np.linalg.norm(path_sigma)) / s.chi_n
    sigma = state.sigma * math.exp(s.c_sigma / s.d_sigma * (length - 1))  # eq. 44
    warm_up = math.sqrt(1 - (1 - s.c_sigma) ** (2 * state.generation))
    h_sigma = length / warm_up < 1.4 + 2 / (y.shape[1] + 1)  # below eq. 45
    path_c = _path(state.path_c, h_sigma * y_w, s.c_c, s.mu_eff)  # eq. 45
    moved = state._replace(
        mean=state.mean + state.sigma * y_w,  # eq. 42, c_m = 1 (eq. 54)
        sigma=min(max(sigma, _SIGMA_MIN), _SIGMA_MAX),
        covariance=_covariance(s, state, y, path_c, h_sigma),
        path_sigma=path_sigma,
        path_c=path_c,
    )
    return _refresh_root(moved, s.eigen_gap)


def _path(path: Floats, step: Floats, rate: float, mu_eff: float) -> Floats:
    return (1 - rate) * path + math.sqrt(rate * (2 - rate) * mu_eff) * step


def _covariance(s: Strategy, state: CMAState, y: Floats, path_c: Floats, h_sigma: bool) -> Floats:
    weights = s.weights.copy()
    weights[s.mu :] *= y.shape[1] / (_squared_lengths(state, y[s.mu :]) + _EPSILON)  # eq. 46
    stalled = (1 - h_sigma) * s.c_c * (2 - s.c_c)  # the variance that a stalled path lacks
    keep = 1 + s.c_1 * stalled - s.c_1 - s.c_mu * s.weights.sum()
    rates, rows = np.append(s.c_mu * weights, s.c_1), np.vstack([y, path_c])
    covariance: Floats = keep * state.covariance  # eq. 47, rank one and rank mu in one product
    covariance += rates @ rows**2 if covariance.ndim == 1 else (rows.T * rates) @ rows
    return covariance


def _times_root(state: CMAState, rows: Floats, power: int) -> Floats:
    """`B D^power Bᵀ` times each row: C^(1/2) for power 1, C^(-1/2) for power -1."""
    scale: Floats = state.deviations**power
    basis = state.eigenvectors
    return rows * scale if basis is None else np.asarray((rows @ basis * scale) @ basis.T)


def _squared_lengths(state: CMAState, rows: Floats) -> Floats:
    """‖C^(-1/2) y‖² of each row; the rotation B does not change it."""
    axes = rows if state.eigenvectors is None else rows @ state.eigenvectors
    return np.asarray(((axes / state.deviations) ** 2).sum(axis=1))


def _refresh_root(state: CMAState, eigen_gap: float) -> CMAState:
    if state.eigenvectors is None:
        variances = _floored(state.covariance)
        return state._replace(covariance=variances, deviations=np.sqrt(variances))
    if state.generation - state.decomposed_at < eigen_gap:
        return state
    values, basis = np.linalg.eigh(state.covariance)
    basis, floored = np.ascontiguousarray(basis), _floored(values)
    return state._replace(
        covariance=state.covariance if values[0] == floored[0] else basis * floored @ basis.T,
        eigenvectors=basis,
        deviations=np.sqrt(floored),
        decomposed_at=state.generation,
    )


def _floored(variances: Floats) -> Floats:
    floor = max(float(variances.max()) / _CONDITION, float(np.finfo(np.float64).tiny))
    return np.maximum(variances, floor)


def _bit_generator(words: NDArray[np.uint64]) -> np.random.PCG64:
    state, increment = (int(low) | int(high) << 64 for low, high in words.reshape(2, 2))
    bits = np.random.PCG64(0)  # its buffer of half a word stays empty: normals take whole words
    bits.state = bits.state | {"state": {"state": state, "inc": increment}}
    return bits


def _words(bits: np.random.PCG64) -> NDArray[np.uint64]:
    inner: Any = bits.state["state"]
    pair = (inner["state"].to_bytes(16, "little"), inner["inc"].to_bytes(16, "little"))
    return np.frombuffer(b"".join(pair), dtype="<u8").astype(np.uint64)


def _require_whole(settings: CMASettings, x: Floats, f: Floats) -> None:
    shape = (settings.population_size, settings.dimension)
    _require(x.shape == shape, f"got candidates of shape {x.shape}, wanted {shape}")
    _require(np.isfinite(x).all(), "got candidates that are not finite, wanted those asked")
    _require(f.shape == shape[:1], f"got losses of shape {f.shape}, wanted all {shape[0]} or none")


def _require(holds: bool | np.bool_, message: str) -> None:
    if not holds:
        raise InputError(message)
