"""Which of many prompts is best, on few images (ours, of two known parts).

Successive halving (Karnin, Koren, Somekh, "Almost Optimal Exploration in Multi-Armed Bandits", ICML
2013): in each round the candidates left see more images, and the worse half leaves. To this come
common random numbers and races (Maron, Moore, "Hoeffding Races", NIPS 1993): all candidates see the
same images, so that losses are compared in pairs, and whoever is worse than the leader by more than
`Z` standard errors of that difference leaves at once.

What differs from both: a round holds at most the share of candidates that the budget can pay for,
half of them or more, so that a large budget is spent on doubts and not on a fixed scheme; and
candidate 0, the task's own prompt, stays to the end, because everything is measured against it.

    race = start(schedule(...), n_candidates)
    while (question := ask(race)) is not None:
        race = tell(race, losses of question.candidates on all images seen so far)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from blackbox_vlm.scores import log_probabilities

FIRST = 12  # images of the first round, at least; 8 to 24 did equally well on the development sets
SHARES = range(20, 9, -1)  # twentieths of its candidates that a round may leave to the next
Z = 2.0  # standard errors behind the leader that a candidate may be
WORTH = 0.01  # a loss (nats, or errors per image) below which a gain is not worth a query
MOST_NUMBERS = 1_000_000  # that a temperature is fitted to; more would say the same, slower
OWN = 0  # the task's own prompt

Losses = NDArray[np.float64]
Cost = Callable[[int, int], int]  # of showing so many images to so many candidates, in queries


class Round(NamedTuple):
    """A step of the schedule."""

    candidates: int  # at most
    images: int  # that each of them has seen when it is over
    queries: int  # at most


class Question(NamedTuple):
    """What to look at next: these candidates, on `images[first:last]` of the shared order."""

    candidates: tuple[int, ...]
    first: int
    last: int


class Race(NamedTuple):
    """Where a race stands.

    Attributes:
        rounds: the schedule.
        keep: as many candidates stay to the end, at least.
        alive: candidates still in it, ascending.
        losses: `(n_candidates, n_images)`, NaN where a candidate has not seen an image.
        told: rounds that are over.
        reason: why it ended; empty while it goes on.
    """

    rounds: tuple[Round, ...]
    keep: int
    alive: tuple[int, ...]
    losses: Losses
    told: int = 0
    reason: str = ""


class Standing(NamedTuple):
    """How a candidate did: mean loss over the images it saw, and its standard error."""

    candidate: int
    images: int
    loss: float
    error: float


def schedule(
    n_candidates: int, cost_of: Cost, n_images: int, budget: int, *, keep: int = 2
) -> tuple[Round, ...]:
    """The rounds of a race that costs at most `budget` queries, whatever happens in it.

    As many candidates enter as can be halved down to `keep`; then it lasts as many rounds, and each
    leaves as many to the next, as the budget can pay for.

    Args:
        n_candidates: the own prompt and its rivals, best guesses first.
        cost_of: queries, growing with both of its arguments.
        n_images: that there are.
        budget: queries.
        keep: candidates that stay to the end, the own prompt among them.

    Returns:
        no round, if the budget cannot pay for two candidates.
    """
    for entering in range(n_candidates, 1, -1):
        totals = _totals(entering, cost_of, n_images)
        least = min(len(totals), 1 + max(0, math.ceil(math.log2(entering / keep))))
        for length in range(len(totals), least - 1, -1):
            for share in SHARES:
                rounds = _rounds(entering, totals[:length], cost_of, share, keep)
                if sum(r.queries for r in rounds) <= budget:
                    return rounds
    return ()


def start(rounds: Sequence[Round], n_candidates: int, *, keep: int = 2) -> Race:
    """A race before its first round; candidates beyond those of the first round stay out."""
    if not rounds:
        losses = np.full((n_candidates, 0), np.nan)
        return Race((), keep, (OWN,), losses, 0, "the budget cannot pay for a round of two")
    losses = np.full((n_candidates, rounds[-1].images), np.nan)
    return Race(tuple(rounds), keep, tuple(range(rounds[0].candidates)), losses)


def ask(race: Race) -> Question | None:
    """What the race wants to know next; None when it has ended."""
    if race.reason:
        return None
    first = race.rounds[race.told - 1].images if race.told else 0
    return Question(race.alive, first, race.rounds[race.told].images)


def tell(race: Race, losses: Losses) -> Race:
    """End a round.

    Args:
        race: as it was asked.
        losses: of the candidates asked, on all images of the shared order seen so far,
            `(n_asked, n_seen)`; those of earlier rounds may have changed with a calibration.
    """
    seen, every = losses.shape[1], race.losses.copy()
    every[list(race.alive), :seen] = losses
    behind, error = _behind(losses)
    near = behind <= Z * error
    told = race.told + 1
    race = race._replace(losses=every, told=told)
    if told == len(race.rounds):
        return race._replace(reason=f"all {told} rounds were run")
    if race.keep <= 2 and (settled := _settled(behind, error, near)):
        return race._replace(reason=settled)
    order = np.argsort(behind, kind="stable")
    most = race.rounds[told].candidates
    staying = [i for at, i in enumerate(order) if at < race.keep or near[i]]
    staying = [OWN, *(race.alive[i] for i in staying if race.alive[i] != OWN)][:most]
    return race._replace(alive=tuple(sorted(staying)))


def standings(race: Race) -> tuple[Standing, ...]:
    """Every candidate that saw an image, best first; those that saw fewer come behind."""
    rows = []
    for candidate, losses in enumerate(race.losses):
        seen = losses[~np.isnan(losses)]
        if len(seen):
            rows.append(Standing(candidate, len(seen), float(seen.mean()), _error(seen)))
    return tuple(sorted(rows, key=lambda row: (-row.images, row.loss, row.candidate)))


def balanced_order(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """An order of all images in which every beginning holds the classes as evenly as it can."""
    random = np.random.default_rng(seed)
    turn = np.empty(len(labels), dtype=np.int64)  # an image is the turn-th of its class
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = random.permutation(len(members))
    return np.lexsort((random.random(len(labels)), turn))


def cross_entropy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Losses:
    """Losses of logits `(k, n, C)` under the one temperature that suits all of them, `(k, n)`.

    One for all: an endpoint's scale is not a prompt's merit, but its confidence is.
    """

    def losses(log_temperature: float, step: int = 1) -> Losses:
        logs = log_probabilities(logits[:, ::step] * np.exp(-log_temperature))
        return -np.take_along_axis(logs, labels[None, ::step, None], axis=2)[..., 0]

    step = 1 + logits.size // MOST_NUMBERS
    best = minimize_scalar(
        lambda t: losses(t, step).mean(), bounds=(-5, 5), method="bounded", options={"xatol": 0.01}
    )
    return losses(best.x)


def errors(answers: NDArray[np.int64], labels: NDArray[np.int64]) -> Losses:
    """Losses of bare labels `(k, n)`: 1 where an answer is wrong or is none, `(k, n)`."""
    return np.asarray(answers != labels, dtype=np.float64)


def _totals(entering: int, cost_of: Cost, n_images: int) -> list[int]:
    """Images seen after each round: doubled, and more where a request carries them for nothing."""
    doublings = max(0, math.floor(math.log2(n_images / FIRST)))
    totals, seen = [], 0
    for total in (math.ceil(n_images / 2**left) for left in range(doublings, -1, -1)):
        if total > seen:
            cost, rest = cost_of(entering, total - seen), range(1, n_images - seen + 1)
            seen += bisect_right(rest, cost, key=lambda count: cost_of(entering, count))
            totals.append(seen)
    return totals


def _rounds(
    entering: int, totals: Sequence[int], cost_of: Cost, share: int, keep: int
) -> tuple[Round, ...]:
    rounds, seen, most = [], 0, entering
    for total in totals:
        rounds.append(Round(most, total, cost_of(most, total - seen)))
        seen, most = total, min(most, max(keep, math.ceil(most * share / 20)))
    return tuple(rounds)


def _behind(losses: Losses) -> tuple[Losses, Losses]:
    """How far each candidate is behind the leader, and the standard error of that, `(k,)` each.

    Prompts that answered alike so far may differ on the next image: n images without a difference
    leave room for one in n.
    """
    paired = losses - losses[losses.mean(axis=1).argmin()]
    error = np.array([_error(row) for row in paired])
    return paired.mean(axis=1), np.maximum(error, 1 / losses.shape[1])


def _error(values: Losses) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.inf


def _settled(behind: Losses, error: Losses, near: NDArray[np.bool_]) -> str:
    """Why more queries would not pay; empty while they may."""
    if near.sum() == 1:
        return f"all others are worse than the leader by more than {Z:g} standard errors"
    if (Z * error - behind)[near].max() < WORTH:
        return f"no other is likely to be better than the leader by {WORTH:g}"
    return ""
