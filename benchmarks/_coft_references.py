"""What CoFT has to beat without `tune`, and its ablations: on the answers of one pass.

The same questions are asked as in a run, through a meter, and test images under a ledger of their
own. Nothing here has a guard.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _cells import UNLIMITED, Box
from _coft_pools import Cell, figures
from scipy.special import softmax

from blackbox_vlm import Options, Task
from blackbox_vlm.backend import NO_LABEL, Access
from blackbox_vlm.coft import student
from blackbox_vlm.coft.coft import Coft, Views, coft, look
from blackbox_vlm.coft.filtering import judge
from blackbox_vlm.coft.mass import evening
from blackbox_vlm.coft.neighbours import graph
from blackbox_vlm.coft.settings import CoftSettings
from blackbox_vlm.coft.transductive import stata, transclip
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import ask
from blackbox_vlm.observe import gaussian
from blackbox_vlm.observe.features import View, apply, features, fit_map
from blackbox_vlm.observe.heads import Fitted, Floats, Seen, logits
from blackbox_vlm.observing import observe
from blackbox_vlm.running import run_sync
from blackbox_vlm.scores import centred, predicted
from blackbox_vlm.tuning import dry_run

FEW_SHOT = "few-shot student"
ZERO_SHOT = "zero-shot"
START, EVENED = "start", ", evened"  # what CoFT starts from
TOP = 16  # pseudo-labels per class
FULL = CoftSettings()
CHANGED = {
    "full": FULL,
    "single model": replace(FULL, two_models=False),
    "no negative prompt": replace(FULL, dual=replace(FULL.dual, negative_weight=0)),
    "L_neg not in the adapter": replace(FULL, dual=replace(FULL.dual, regularize=False)),
    "no filtering": replace(FULL, filtering=False),
}
NO_PHASE, NO_PHASE_1, NO_PHASE_2 = "neither phase", "no phase 1", "no phase 2"
NOT_EVENED = "not evened"  # pseudo-labels start from zero-shot as it is


class Pass(NamedTuple):
    """Answers about labelled images and pool `(n, K)` and test images `(m, K)`.

    `seen` and `unseen` are the logits of them that CoFT starts from, under the mean of the text
    prompts where vectors are returned; `own` are those of the test images under the task's own.
    Answers are in the metric, if any.
    """

    answers: Floats
    seen: Floats
    test: Floats
    unseen: Floats
    own: Floats
    power: float
    ridge: float

    def view(self) -> tuple[Floats, Floats]:
        """Features of both, as the layer makes them of the first."""
        fitted = fit_map(self.answers, View(self.power))
        return features(fitted, self.answers), features(fitted, self.test)


def asked(
    cell: Cell, task: Task, pool: tuple[Image, ...], test: Task, box: Box, folder: Path
) -> Pass:
    """Ask what `tune` would ask; test images under a ledger of their own."""
    options, settings = Options(cell.budget, seed=cell.seed), FULL
    plan = dry_run(task, box.capabilities, options, pool=pool)
    with Ledger(folder / "train", UNLIMITED) as book:
        observed = run_sync(observe(Meter(box, book), task, plan, cell.seed))
    with Ledger(folder / "test", UNLIMITED) as book:
        asking = ask(Meter(box, book), observed.question, test.images, test.classes, "test")
        shown = run_sync(asking)
    answers, metric = np.concatenate([observed.answers, observed.pool]), observed.metric
    readout = observed.observation.readout
    seen, unseen = (centred(rows @ readout) for rows in (answers, shown))
    own = centred(shown @ observed.readout)
    even = metric is not None or box.capabilities.access is Access.EMBEDDINGS
    if metric is not None:
        answers, shown = apply(metric, answers), apply(metric, shown)
    power, ridge = settings.power, settings.ridge
    if not even:
        power, ridge = settings.score_power, settings.score_ridge
    return Pass(answers, seen, shown, unseen, own, power, ridge)


def few_shot(
    cell: Cell, task: Task, pool: tuple[Image, ...], test: Task, box: Box, folder: Path
) -> dict[str, Any]:
    """The student of CoFT's second phase, on the labelled images alone.

    Features are fitted to these images, and their labels leave nothing to expect: one round of
    (1), then its logits are added to those that the text prompts give.
    """
    assert task.labels is not None
    found, settings = asked(cell, task, (), test, box, folder), FULL
    shown, unseen = found.view()
    truth = np.eye(len(task.class_names), dtype=np.float32)[task.labels]
    taught = student.fit(
        Seen(shown, found.seen),
        task.labels,
        truth,
        np.ones(len(task), dtype=np.float32),
        sharpness=settings.sharpness,
        ridge=found.ridge,
        rounds=1,
        mass=settings.mass,
    )
    named = predicted(found.unseen + logits(taught.head, Seen(unseen, found.unseen)))
    return {"figures": {FEW_SHOT: figures(named, test, cell.seed)}}


def references(
    cell: Cell, task: Task, pool: tuple[Image, ...], test: Task, box: Box, folder: Path
) -> dict[str, Any]:
    """Without labels: zero-shot, one head on pseudo-labels, and the transductive heads.

    Each is fitted to the pool and then asked about the test images one by one, with the logits that
    CoFT starts from as they are, and evened out (`mass.evening`), which CoFT does.
    """
    found = asked(cell, task, pool, test, box, folder)
    (shown, unseen), offset = found.view(), evening(found.seen).astype(np.float32)
    near = graph(shown, random=np.random.default_rng(cell.seed))
    unknown = np.full(len(shown), NO_LABEL)
    zero_shot = Seen(shown, found.seen)

    def measure(head: Fitted, plus: Floats) -> dict[str, float]:
        return figures(predicted(logits(head, Seen(unseen, found.unseen + plus))), test, cell.seed)

    starts = {ZERO_SHOT: found.own, START: found.unseen, f"{START}{EVENED}": found.unseen + offset}
    measured = {name: figures(predicted(of), test, cell.seed) for name, of in starts.items()}
    for suffix, plus in (("", np.zeros_like(offset)), (EVENED, offset)):
        even = Seen(shown, found.seen + plus)
        measured[f"top {TOP}{suffix}"] = measure(top_head(even), plus)
        for name, method in (("TransCLIP", transclip), ("StatA", stata)):
            head = method(zero_shot, near, unknown, offset=plus.astype(np.float64)).head
            measured[f"{name}{suffix}"] = measure(head, np.zeros_like(offset))
    return {"figures": measured}


def top_head(seen: Seen) -> Fitted:
    """A Gaussian head on the `TOP` images likeliest of each class (UPL, arXiv 2204.03649)."""
    first = np.argsort(-softmax(seen.zero_shot, axis=1), axis=0, kind="stable")[:TOP]
    labels = np.tile(np.arange(first.shape[1]), len(first))
    rows = first.ravel()
    return gaussian.fit(Seen(seen.features[rows], seen.zero_shot[rows]), labels)


def ablations(
    cell: Cell, task: Task, pool: tuple[Image, ...], test: Task, box: Box, folder: Path
) -> dict[str, Any]:
    """CoFT without some of its parts, on the same answers; no guard, so that each part shows."""
    found = asked(cell, task, pool, test, box, folder)
    offset = evening(found.seen).astype(np.float32)
    refined, unseen = found.seen + offset, found.unseen + offset
    views, shown = look(found.answers, found.power, cell.seed), found.view()[1]
    unknown = np.full(len(refined), NO_LABEL)

    def measure(named: Floats) -> dict[str, float]:
        return figures(predicted(named), test, cell.seed)

    def learn(settings: CoftSettings, start: Floats) -> Coft:
        return coft(views, start, unknown, settings, found.ridge, cell.seed)

    def by(head: Fitted, start: Floats) -> Floats:
        return start + logits(head, Seen(shown, start))

    full = learn(FULL, refined)
    measured = {
        NO_PHASE: measure(unseen),
        NO_PHASE_1: measure(by(student_alone(views, refined, found.ridge), unseen)),
        NO_PHASE_2: measure(by_duals(full, found, views, unseen, cell.seed)),
        NOT_EVENED: measure(by(learn(FULL, found.seen).student.head, found.unseen)),
    }
    for name, settings in CHANGED.items():
        learned = full if settings is FULL else learn(settings, refined)
        measured[name] = measure(by(learned.student.head, unseen))
    return {"figures": measured}


def by_duals(learned: Coft, found: Pass, views: Views, unseen: Floats, seed: int) -> Floats:
    """The mean posterior of the two models, each in its half of the test answers."""
    order = np.random.default_rng(seed).permutation(found.answers.shape[1])
    halves = []
    for columns, known in zip(np.array_split(order, 2), views.halves, strict=True):
        fitted = fit_map(found.answers[:, columns], View(found.power))
        if not np.array_equal(features(fitted, found.answers[:, columns]), known):
            raise RuntimeError("`look` halves the answers in another way; follow it here")
        halves.append(Seen(features(fitted, found.test[:, columns]), unseen))
    return judge(learned.duals, halves).posterior


def student_alone(views: Views, refined: Floats, ridge: float) -> Fitted:
    """The second phase, started from the evened zero-shot posterior."""
    settings, n = FULL, len(refined)
    taught = student.fit(
        Seen(views.whole, refined),
        np.full(n, NO_LABEL),
        softmax(refined, axis=1),
        np.ones(n, dtype=np.float32),
        sharpness=settings.sharpness,
        ridge=ridge,
        rounds=settings.rounds,
        mass=settings.mass,
    )
    return taught.head
