"""CMA-ES against cmaes and pycma, and what neither promises: exact resume, sane failures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import cmaes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save
from scipy.linalg import sqrtm

from blackbox_vlm.craft.cma import (
    CMASettings,
    CMAState,
    ask,
    from_arrays,
    init,
    tell,
    to_arrays,
)
from blackbox_vlm.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pycma warns where matplotlib is missing
    import cma

Floats = NDArray[np.float64]
Loss = Callable[[Floats], Floats]
both_variants = pytest.mark.parametrize("separable", [False, True], ids=["full", "separable"])
SIZES = [(2, 6), (5, 20), (10, 10), (40, 15), (512, 40), (3, 200)]


def sphere(x: Floats) -> Floats:
    return np.square(x).sum(axis=-1)


def ellipsoid(x: Floats) -> Floats:
    """Axis ratio 1,000."""
    return np.square(x) @ np.logspace(0, 6, x.shape[-1])


def rosenbrock(x: Floats) -> Floats:
    head, tail = x[..., :-1], x[..., 1:]
    return (100 * (tail - head**2) ** 2 + (1 - head) ** 2).sum(axis=-1)


def settings_of(dimension: int = 6, population_size: int = 12, **others: Any) -> CMASettings:
    chosen = {"sigma0": 0.5, "seed": 3} | others
    return CMASettings(dimension=dimension, population_size=population_size, **chosen)


def run(
    settings: CMASettings, state: CMAState, loss: Loss, generations: int
) -> tuple[CMAState, list[Floats]]:
    history = []
    for _ in range(generations):
        candidates, state = ask(settings, state)
        history.append(candidates)
        state = tell(settings, state, candidates, loss(candidates))
    return state, history


def assert_same(state: CMAState, other: CMAState, *, but: tuple[str, ...] = ()) -> None:
    """Equal bit for bit, the fields named in `but` aside."""
    left, right = to_arrays(state), to_arrays(other)
    assert left.keys() == right.keys()
    for name in left.keys() - set(but):
        assert left[name].tobytes() == right[name].tobytes(), name


def assert_sane(state: CMAState) -> None:
    assert all(np.isfinite(array).all() for array in to_arrays(state).values())
    assert state.sigma > 0
    assert (state.deviations > 0).all()


# Strategy parameters


@pytest.mark.parametrize(("dimension", "population_size"), SIZES)
def test_strategy_equals_cmaes(dimension: int, population_size: int) -> None:
    ours = settings_of(dimension, population_size).strategy
    theirs = cmaes.CMA(np.zeros(dimension), 1.0, population_size=population_size)
    assert ours.mu == theirs._mu
    assert ours.mu_eff == pytest.approx(theirs._mu_eff, rel=1e-12)
    assert ours.c_sigma == pytest.approx(theirs._c_sigma, rel=1e-12)
    assert ours.d_sigma == pytest.approx(theirs._d_sigma, rel=1e-12)
    assert ours.c_c == pytest.approx(theirs._cc, rel=1e-12)
    assert ours.c_1 == pytest.approx(theirs._c1, rel=1e-12)
    assert ours.chi_n == pytest.approx(theirs._chi_n, rel=1e-12)
    np.testing.assert_allclose(ours.weights[: ours.mu], theirs._weights[: ours.mu], rtol=1e-12)


@pytest.mark.parametrize(("dimension", "population_size"), SIZES)
def test_strategy_equals_pycma(dimension: int, population_size: int) -> None:
    """cmaes leaves out the 1/4 of eq. 58, so c_mu and the negative weights are checked here."""
    ours = settings_of(dimension, population_size).strategy
    options = {"popsize": population_size, "verbose": -9, "seed": 1}
    theirs = cma.CMAEvolutionStrategy(np.zeros(dimension), 1.0, options).sp
    assert ours.mu_eff == pytest.approx(theirs.weights.mueff, rel=1e-12)
    assert ours.c_c == pytest.approx(theirs.cc, rel=1e-12)
    assert ours.c_1 == pytest.approx(theirs.c1, rel=1e-12)
    assert ours.c_mu == pytest.approx(theirs.cmu, rel=1e-12)
    np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("dimension", "population_size"), [*SIZES, (1, 2), (1, 3), (2, 10**4)])
def test_separable_learns_faster_within_reason(dimension: int, population_size: int) -> None:
    full = settings_of(dimension, population_size).strategy
    fast = settings_of(dimension, population_size, separable=True).strategy
    assert fast.c_1 == pytest.approx(full.c_1 * (dimension + 2) / 3)
    assert fast.c_mu == pytest.approx(min(1 - fast.c_1, full.c_mu * (dimension + 2) / 3))
    for strategy in (full, fast):
        assert strategy.c_1 + strategy.c_mu <= 1
        negative = -strategy.weights[strategy.mu :].sum()
        room = 1 - strategy.c_1 - strategy.c_mu
        assert dimension * strategy.c_mu * negative <= room + 1e-12  # eq. 52


# One update


def reference_of(settings: CMASettings, mean: Floats) -> Any:
    """cmaes with the learning rates of `settings`; it decomposes C in every generation.

    Its h_σ counts one generation more than the tutorial and pycma do, so it starts at -1.
    """
    strategy = settings.strategy
    reference = cmaes.CMA(mean, settings.sigma0, population_size=settings.population_size)
    reference._c1, reference._cmu = strategy.c_1, strategy.c_mu
    reference._weights = strategy.weights.copy()
    reference._g = -1
    return reference


@both_variants
@pytest.mark.parametrize("sigma0", [0.5, 1e-3])
def test_tell_equals_cmaes(separable: bool, sigma0: float) -> None:
    """A separable CMA-ES is a full one whose C loses all but its diagonal after each update."""
    settings = settings_of(5, 100, sigma0=sigma0, separable=separable)
    assert settings.strategy.eigen_gap <= 1
    mean = np.linspace(-1, 1, 5)
    state, reference, stalled = init(settings, mean), reference_of(settings, mean), False
    for _ in range(12):
        previous = state
        candidates, state = ask(settings, state)
        losses = ellipsoid(candidates)
        state = tell(settings, state, candidates, losses)
        reference.tell(list(zip(candidates, losses.tolist(), strict=True)))
        stalled |= np.allclose(state.path_c, (1 - settings.strategy.c_c) * previous.path_c)
        if separable:
            reference._C = np.diag(np.diag(reference._C))
        covariance = np.diag(state.covariance) if separable else state.covariance
        np.testing.assert_allclose(state.mean, reference.mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.sigma, reference._sigma, rtol=1e-9)
        np.testing.assert_allclose(state.path_sigma, reference._p_sigma, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.path_c, reference._pc, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(covariance, reference._C, rtol=1e-9, atol=1e-12)
    assert stalled  # h_σ was 0 at least once


def test_ask_draws_through_the_symmetric_root() -> None:
    settings = settings_of(5, 100)
    state, _ = run(settings, init(settings), ellipsoid, 15)
    assert state.decomposed_at == state.generation
    fresh = state._replace(random_state=init(settings).random_state)
    z = np.random.Generator(np.random.PCG64(settings.seed)).standard_normal((100, 5))
    wanted = state.mean + state.sigma * z @ sqrtm(state.covariance)
    np.testing.assert_allclose(ask(settings, fresh)[0], wanted, rtol=1e-9, atol=1e-12)


def test_decomposition_is_lazy() -> None:
    settings = settings_of(40, 10)
    gap = settings.strategy.eigen_gap
    assert gap > 3
    state, lags = init(settings), []
    for _ in range(20):
        candidates, state = ask(settings, state)
        state = tell(settings, state, candidates, sphere(candidates))
        lags.append(state.generation - state.decomposed_at)
    assert max(lags) == np.ceil(gap) - 1
    assert lags.count(0) == 20 // np.ceil(gap)


@both_variants
def test_functions_write_to_nothing_they_are_given(separable: bool) -> None:
    settings = settings_of(separable=separable)
    state, _ = run(settings, init(settings), sphere, 3)
    before = from_arrays(settings, to_arrays(state))
    candidates, asked = ask(settings, state)
    kept, losses = candidates.copy(), sphere(candidates)
    tell(settings, asked, candidates, losses)
    assert_same(state, before)
    assert candidates.tobytes() == kept.tobytes()
    assert losses.tobytes() == sphere(kept).tobytes()


# It optimises


def evaluations(loss: Loss, start: float, seed: int, *, separable: bool) -> int:
    settings = settings_of(10, 10, seed=seed, separable=separable)
    state = init(settings, np.full(10, start))
    for generation in range(1, 2000):
        candidates, state = ask(settings, state)
        losses = loss(candidates)
        if losses.min() < 1e-9:
            return 10 * generation
        state = tell(settings, state, candidates, losses)
    return 10**9


def pycma_evaluations(loss: Loss, start: float, seed: int, *, separable: bool) -> int:
    options = {"popsize": 10, "CMA_diagonal": separable, "verbose": -9, "seed": seed + 1}
    optimizer = cma.CMAEvolutionStrategy(np.full(10, start), 0.5, options)
    for generation in range(1, 2000):
        candidates = optimizer.ask()
        losses = loss(np.asarray(candidates))
        if losses.min() < 1e-9:
            return 10 * generation
        optimizer.tell(candidates, list(losses))
    return 10**9


@pytest.mark.parametrize(
    ("loss", "start", "separable"),
    [
        (sphere, 0.5, False),
        (ellipsoid, 0.5, False),
        (rosenbrock, 0.0, False),
        (sphere, 0.5, True),
        (ellipsoid, 0.5, True),
    ],
)
def test_needs_no_more_evaluations_than_pycma(loss: Loss, start: float, separable: bool) -> None:
    ours = median(evaluations(loss, start, seed, separable=separable) for seed in range(5))
    theirs = median(pycma_evaluations(loss, start, seed, separable=separable) for seed in range(3))
    assert theirs < 10**9
    assert ours <= 1.5 * theirs


@both_variants
@pytest.mark.parametrize("bounds", [0.3, 1.0])
def test_candidates_stay_in_the_box_and_find_its_corner(bounds: float, separable: bool) -> None:
    settings = settings_of(bounds=bounds, separable=separable)
    state, history = run(settings, init(settings), lambda x: sphere(x - 2), 150)
    assert all((np.abs(candidates) <= bounds).all() for candidates in history)
    assert any((np.abs(candidates) == bounds).any() for candidates in history)
    np.testing.assert_allclose(state.mean, bounds, rtol=1e-4)
    assert_sane(state)


# Random numbers and resume


@both_variants
def test_same_seed_same_run_and_numpy_is_left_alone(separable: bool) -> None:
    settings = settings_of(separable=separable)
    outside = np.random.get_state()
    first, history = run(settings, init(settings), sphere, 10)
    second, _ = run(settings, init(settings), sphere, 10)
    assert_same(first, second)
    assert all(np.array_equal(a, b) for a, b in zip(outside, np.random.get_state(), strict=True))
    assert not np.allclose(history[0], history[1])
    other = settings_of(separable=separable, seed=4)
    assert not np.allclose(history[0], ask(other, init(other))[0])


def test_asking_twice_gives_the_same_candidates() -> None:
    settings = settings_of()
    state = init(settings)
    (first, after), (second, _) = ask(settings, state), ask(settings, state)
    assert first.tobytes() == second.tobytes()
    assert not np.allclose(first, ask(settings, after)[0])


@both_variants
@pytest.mark.parametrize("stop", [0, 1, 13, 29])
def test_resumes_bit_for_bit(separable: bool, stop: int) -> None:
    settings = settings_of(40, 10, separable=separable, bounds=2.0)
    whole, history = run(settings, init(settings), ellipsoid, 30)
    half, _ = run(settings, init(settings), ellipsoid, stop)
    loaded = from_arrays(settings, load(save(to_arrays(half))))
    assert_same(loaded, half)
    resumed, rest = run(settings, loaded, ellipsoid, 30 - stop)
    assert_same(resumed, whole)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(rest, history[stop:], strict=True))


def test_resumes_bit_for_bit_from_arrays_in_another_memory_order() -> None:
    settings = settings_of(40, 10)
    whole, _ = run(settings, init(settings), ellipsoid, 30)
    half, _ = run(settings, init(settings), ellipsoid, 17)
    arrays = {name: np.array(array, order="F") for name, array in to_arrays(half).items()}
    resumed, _ = run(settings, from_arrays(settings, arrays), ellipsoid, 13)
    assert_same(resumed, whole)


def test_from_arrays_refuses_the_state_of_other_settings() -> None:
    settings = settings_of()
    arrays = to_arrays(init(settings))
    with pytest.raises(InputError, match=r"got float64\[6\] as 'mean', wanted float64\[7\]"):
        from_arrays(settings_of(7), arrays)
    with pytest.raises(InputError, match="'covariance'"):
        from_arrays(settings_of(separable=True), arrays)
    with pytest.raises(InputError, match="float32"):
        from_arrays(settings, arrays | {"path_c": np.zeros(6, dtype=np.float32)})
    with pytest.raises(InputError, match="no 'path_c'"):
        from_arrays(settings, {k: v for k, v in arrays.items() if k != "path_c"})


# Losses that are no help


@both_variants
@pytest.mark.parametrize("failure", [np.nan, np.inf, -np.inf])
def test_a_failed_candidate_ranks_last(failure: float, separable: bool) -> None:
    settings = settings_of(separable=separable)
    candidates, state = ask(settings, init(settings))
    losses = sphere(candidates)
    failed, worst = losses.copy(), losses.copy()
    failed[[0, 4]], worst[[0, 4]] = failure, 1e9
    moved = tell(settings, state, candidates, failed)
    assert_same(moved, tell(settings, state, candidates, worst))
    assert_sane(moved)


@both_variants
@pytest.mark.parametrize("loss", [7.0, np.nan, np.inf, -np.inf])
def test_a_generation_without_order_teaches_nothing(loss: float, separable: bool) -> None:
    settings = settings_of(separable=separable)
    state, _ = run(settings, init(settings), sphere, 5)
    candidates, asked = ask(settings, state)
    told = tell(settings, asked, candidates, np.full(12, loss))
    assert_same(told, asked, but=("generation",))
    assert told.generation == 6
    assert not np.allclose(ask(settings, told)[0], candidates)


def test_a_single_finite_loss_is_an_order() -> None:
    settings = settings_of()
    candidates, state = ask(settings, init(settings))
    losses = np.full(12, np.nan)
    losses[8] = 1.0
    ranked = np.arange(12.0)
    ranked[8] = -1.0
    told = tell(settings, state, candidates, losses)
    assert_same(told, tell(settings, state, candidates, ranked))


def test_ties_keep_the_order_of_the_candidates() -> None:
    settings = settings_of(3, 40)
    candidates, state = ask(settings, init(settings))
    coarse = np.arange(40.0) // 10
    told = tell(settings, state, candidates, coarse)
    assert_same(told, tell(settings, state, candidates, np.arange(40.0)))


@given(
    losses=st.lists(st.integers(-50, 50), min_size=12, max_size=12),
    transform=st.sampled_from([np.exp, np.cbrt, np.arctan, lambda f: 3 * f - 1e6, lambda f: f**3]),
    separable=st.booleans(),
)
def test_only_the_order_of_the_losses_counts(
    losses: list[int], transform: Callable[[Floats], Floats], separable: bool
) -> None:
    settings = settings_of(separable=separable)
    candidates, state = ask(settings, init(settings))
    plain = np.array(losses, dtype=np.float64)
    other = transform(plain)
    assert_same(tell(settings, state, candidates, plain), tell(settings, state, candidates, other))


# Refusals and rounding


@pytest.mark.parametrize(
    ("candidates", "losses", "message"),
    [
        (np.zeros((12, 6)), np.zeros(11), r"got losses of shape \(11,\), wanted all 12 or none"),
        (np.zeros((12, 6)), np.zeros((12, 1)), "got losses of shape"),
        (np.zeros((11, 6)), np.zeros(11), r"got candidates of shape \(11, 6\), wanted \(12, 6\)"),
        (np.full((12, 6), np.nan), np.zeros(12), "not finite"),
    ],
)
def test_tell_wants_a_whole_generation(candidates: Floats, losses: Floats, message: str) -> None:
    settings = settings_of()
    with pytest.raises(ValueError, match=message):
        tell(settings, init(settings), candidates, losses)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dimension": 0},
        {"population_size": 1},
        {"sigma0": 0.0},
        {"sigma0": np.inf},
        {"sigma0": np.nan},
        {"bounds": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"got {next(iter(wrong))} "):
        settings_of(**wrong)


@pytest.mark.parametrize("mean", [np.zeros(5), np.full(6, np.nan), np.full(6, 1.5)])
def test_a_mean_that_does_not_fit_is_refused(mean: Floats) -> None:
    with pytest.raises(InputError, match="got a mean"):
        init(settings_of(bounds=1.0), mean)
    with pytest.raises(InputError, match="got a mean"):
        init(settings_of(), np.full(6, np.inf))


@both_variants
def test_a_covariance_that_rounding_spoilt_is_repaired(separable: bool) -> None:
    settings = settings_of(4, 200, separable=separable)
    spectrum = np.array([-1e-3, 0.0, 1.0, 1e8])
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    spoilt = spectrum if separable else turn * spectrum @ turn.T
    candidates, state = ask(settings, init(settings))
    state = state._replace(covariance=spoilt)
    repaired = tell(settings, state, 1e-6 * candidates, sphere(candidates))
    assert_sane(repaired)
    assert repaired.deviations.max() / repaired.deviations.min() <= 1.01 * 1e15**0.5
    again = repaired.covariance if separable else np.linalg.eigvalsh(repaired.covariance)
    assert again.min() > -1e-7
    assert np.isfinite(ask(settings, repaired)[0]).all()


@both_variants
def test_candidates_on_the_mean_do_not_divide_by_zero(separable: bool) -> None:
    settings = settings_of(separable=separable)
    told = tell(settings, init(settings), np.zeros((12, 6)), np.arange(12.0))
    assert_sane(told)
    assert (told.mean == 0).all()


@both_variants
@pytest.mark.parametrize("slope", [1.0, 0.0], ids=["endless slope", "collapse"])
def test_sigma_stays_within_its_range(slope: float, separable: bool) -> None:
    settings = settings_of(2, 6, separable=separable)
    state = init(settings)
    for _ in range(3000):
        candidates, state = ask(settings, state)
        losses = slope * candidates[:, 0] if slope else sphere(candidates)
        state = tell(settings, state, candidates, losses)
    assert_sane(state)
    assert 1e-150 <= state.sigma <= 1e150


@both_variants
@pytest.mark.parametrize(("dimension", "population_size"), [(1, 2), (1, 3), (2, 2), (3, 301)])
def test_smallest_and_odd_sizes_work(dimension: int, population_size: int, separable: bool) -> None:
    settings = settings_of(dimension, population_size, separable=separable)
    state, _ = run(settings, init(settings, np.ones(dimension)), sphere, 40)
    assert_sane(state)
    assert sphere(state.mean) < dimension


def test_a_clipped_candidate_has_no_negative_weight() -> None:
    """Moving a clipped loser along the box's face leaves C alone; moving a free one does not."""
    settings = settings_of(3, 12, bounds=1.0)
    candidates, state = ask(settings, init(settings))
    candidates *= 0.1
    losses = np.arange(12.0)

    def covariance_with_loser_at(place: list[float]) -> Floats:
        candidates[11] = place
        return tell(settings, state, candidates, losses).covariance

    on_face = covariance_with_loser_at([1.0, 0.0, 0.0])
    np.testing.assert_array_equal(on_face, covariance_with_loser_at([1.0, 0.5, -0.5]))
    inside = covariance_with_loser_at([0.9, 0.0, 0.0])
    assert not np.allclose(inside, covariance_with_loser_at([0.9, 0.5, -0.5]))
