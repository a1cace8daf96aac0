"""One cell of `access.py`: tune through the public path, then ask about the test images, once.

Every image is encoded once per process and a bank of texts once per process, whatever the number of
runs: the local black boxes of a process share one model, one cache of image vectors and one of text
vectors. That is done here, by patching, and nowhere in the package. What the endpoint answers is
the same, and so is what the meter counts.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from blackbox_vlm.backends import local
from blackbox_vlm.backends.dual_encoder import DualEncoder
from scipy.special import softmax

from blackbox_vlm import Adapter, Options, Task, tune
from blackbox_vlm.backend import Answer, ImageEmbeddings, Request
from blackbox_vlm.errors import InputError
from blackbox_vlm.evaluation import evaluate, predict
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import plain_logits
from blackbox_vlm.observe.calibration import calibration_error
from blackbox_vlm.running import run_sync
from blackbox_vlm.scores import predicted
from blackbox_vlm.task import Classes
from blackbox_vlm.tuning import dry_run

KINDS: dict[str, dict[str, Any]] = {  # options of the local black box
    "embeddings": {"access": "embeddings"},
    "logits": {"access": "scores", "texts_per_request": 1024},
    "logits once": {"access": "scores", "texts_per_request": 1024},
    "softmax": {"access": "scores", "texts_per_request": 1024, "score_kind": "softmax"},
    "4 decimals": {
        "access": "scores",
        "texts_per_request": 1024,
        "score_kind": "softmax",
        "decimals": 4,
    },
    "top 20": {
        "access": "scores",
        "texts_per_request": 1024,
        "score_kind": "softmax",
        "top_k": 20,
    },
    "64 texts": {"access": "scores", "texts_per_request": 64, "score_kind": "softmax"},
    "label": {"access": "label"},
}
ONCE = "logits once"  # its budget is a query per training image
PLANNER, LOGISTIC, TEMPLATE = "planner", "logistic regression", "best template"
REFINE = "refine"  # CraFT's refiner alone, on the class scores of one pass

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of C, for unit vectors; 1 is scikit-learn's own
ONE_SHOT_STRENGTH = 1.0
MOST_FOLDS = 5
MOST_ITERATIONS = 2000
TEMPLATES = (  # CLIP's short list for ImageNet, with its plain prompt first
    "a photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
TEXT_SETS_KEPT = 64  # their vectors: 2 MB for 1,024 texts
UNLIMITED = 10**9  # queries, for references that ask what they need


class Cell(NamedTuple):
    """One run of the benchmark."""

    data: str
    kind: str
    method: str  # PLANNER, a method of `Options`, LOGISTIC or TEMPLATE
    shots: int
    seed: int
    budget: int
    images_per_request: int  # 0: no limit
    model: str
    settings: str  # digest of the code, so that old cells are not mixed in

    @property
    def name(self) -> str:
        return Path(self.data).name


class Box:
    """The local black box behind its seam, and the processor seconds that its answers took."""

    def __init__(self, inner: local.LocalBlackBox) -> None:
        self._inner = inner
        self.capabilities, self.check_texts = inner.capabilities, inner.check_texts
        self.seconds = 0.0

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        began = time.process_time()
        try:
            return await self._inner.answer(requests)
        finally:
            self.seconds += time.process_time() - began

    async def aclose(self) -> None:
        await self._inner.aclose()


@functools.cache
def _model(name: str) -> tuple[DualEncoder, Any]:
    """A model, and the vectors of the images that it has seen in this process."""
    encoder = DualEncoder.load(name)
    encoder.encode_texts = functools.lru_cache(TEXT_SETS_KEPT)(encoder.encode_texts)
    return encoder, local._FeatureCache(encoder.encode_images)


def open_box(model: str, kind: str, images_per_request: int) -> Box:
    """An endpoint of that kind; all of one model share their vectors."""
    encoder, vectors = _model(model)
    limit = {"images_per_request": images_per_request} if images_per_request else {}
    with (
        patch.object(DualEncoder, "load", lambda *_, **__: encoder),
        patch.object(local, "_FeatureCache", lambda _: vectors),
    ):
        return Box(local.LocalBlackBox(model=model, **KINDS[kind], **limit))


@functools.cache
def _task(data: str, split: str) -> Task:
    return Task.from_folder(data, split=split)


def run(cell: Cell) -> dict[str, Any]:
    """The row of a cell: accuracies and calibration errors in percent, seconds, queries.

    A cell that its data, its access or its budget does not allow says why instead.
    """
    endpoint = (cell.kind, cell.images_per_request)
    box, measure = open_box(cell.model, *endpoint), REFERENCES.get(cell.method, tuned)
    try:
        task = _task(cell.data, "train").sample(cell.shots, cell.seed)
        if measure is tuned:
            dry_run(task, box.capabilities, options_of(cell))
    except InputError as error:
        return {"cell": list(cell), "left_out": str(error)}
    test = _task(cell.data, "test")
    _model(cell.model)[1].of(task.images + test.images)  # encoded before anything is timed
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(cell, task, test, box, Path(folder))
    measured |= zero_shot(cell.data, *endpoint, cell.model)
    size = {"n_classes": len(task.class_names), "n_train": len(task), "n_test": len(test)}
    return {"cell": list(cell), **size, **measured}


@functools.cache
def zero_shot(data: str, kind: str, images_per_request: int, model: str) -> dict[str, float]:
    """What the endpoint says by itself of the test images, asked about the classes alone."""
    test, box = _task(data, "test"), open_box(model, kind, images_per_request)
    assert test.labels is not None
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "test", UNLIMITED) as book:
        logits = run_sync(plain_logits(Meter(box, book), test.images, test.classes, "reference"))
    error = calibration_error(softmax(logits, axis=1), test.labels)
    right = float((predicted(logits) == test.labels).mean())
    return {"zero_shot": 100 * right, "zero_shot_ece": 100 * error}


def options_of(cell: Cell) -> Options:
    """What `tune` is told: the budget, and nothing else unless a method is forced."""
    method = None if cell.method == PLANNER else cell.method
    budget = cell.budget
    if cell.kind == ONCE:
        budget = len(_task(cell.data, "train").sample(cell.shots, cell.seed))
    return Options(budget, method=method, seed=cell.seed)


def tuned(cell: Cell, task: Task, test: Task, box: Box, folder: Path) -> dict[str, Any]:
    """What `tune` makes of it, and what its adapter says of the test images."""
    box.seconds, began, at_work = 0.0, time.perf_counter(), time.process_time()
    result = tune(task, box, folder / "run", options_of(cell))
    seconds, at_work = time.perf_counter() - began, time.process_time() - at_work
    adapter = Adapter.from_pretrained(result.adapter)
    predictions, asked = predict(adapter, test.images, box, folder / "test")
    shown = evaluate(adapter, test, box, folder / "test")  # pays for what `predict` did not ask
    assert test.labels is not None
    return {
        "accuracy": 100 * shown.accuracy,
        "zero_shot_read": 100 * shown.zero_shot_accuracy,  # off the answers that the adapter asks
        "ece": 100 * calibration_error(predictions.probabilities, test.labels),
        "method": result.method,
        "strategy": result.strategy,
        "reason": result.reason,
        "stopped": result.stopped,
        "out_of_fold": result.tuned_accuracy and 100 * result.tuned_accuracy,
        "out_of_fold_of": {name: 100 * a for name, a in result.out_of_fold_accuracy.items()},
        "out_of_fold_ece": result.calibration and 100 * result.calibration["ece"],
        "calibration": result.calibration,
        "queries": result.queries_spent,
        "images": result.images_shown,
        "queries_per_prediction": asked / len(test),
        "seconds": seconds,
        "local_seconds": at_work - box.seconds,  # of the processor
    }


def logistic(cell: Cell, task: Task, test: Task, box: Box, folder: Path) -> dict[str, Any]:
    """scikit-learn on the returned vectors: C by out-of-fold accuracy, or its own at one shot."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    assert task.labels is not None
    assert test.labels is not None
    with Ledger(folder / "ledger", UNLIMITED) as ledger:
        asked = [ImageEmbeddings(task.images), ImageEmbeddings(test.images)]
        seen, unseen = run_sync(Meter(box, ledger).observe(asked, "reference"))
    strength = ONE_SHOT_STRENGTH
    if cell.shots > 1:
        folds = StratifiedKFold(min(cell.shots, MOST_FOLDS), shuffle=True, random_state=cell.seed)
        model = LogisticRegression(max_iter=MOST_ITERATIONS)
        search = GridSearchCV(model, {"C": STRENGTHS}, cv=folds, refit=False)
        strength = search.fit(seen, task.labels).best_params_["C"]
    fits = {
        C: LogisticRegression(C=C, max_iter=MOST_ITERATIONS).fit(seen, task.labels)
        for C in STRENGTHS
    }
    probabilities = fits[strength].predict_proba(unseen)
    return {
        "accuracy": 100 * fits[strength].score(unseen, test.labels),
        "ece": 100 * calibration_error(probabilities, test.labels),
        "strength": strength,
        "accuracy_at": {str(C): 100 * fit.score(unseen, test.labels) for C, fit in fits.items()},
        "queries": len(task),
        "images": len(task),
    }


def best_template(cell: Cell, task: Task, test: Task, box: Box, folder: Path) -> dict[str, Any]:
    """Zero-shot under the template that is right most often on the training images."""

    def accuracy(meter: Meter, images: Task, template: str) -> float:
        classes = Classes(task.class_names, template)
        logits = run_sync(plain_logits(meter, images.images, classes, "reference"))
        assert images.labels is not None
        return 100 * float((predicted(logits) == images.labels).mean())

    templates = tuple(dict.fromkeys((task.template, *TEMPLATES)))  # at a tie, the first
    with Ledger(folder / "train", UNLIMITED) as ledger:
        meter = Meter(box, ledger)
        seen = {template: accuracy(meter, task, template) for template in templates}
        totals = ledger.totals()
    best = max(seen, key=lambda template: seen[template])
    with Ledger(folder / "test", UNLIMITED) as ledger:
        found = accuracy(Meter(box, ledger), test, best)
    return {
        "accuracy": found,
        "template": best,
        "training_accuracy": seen,
        "queries": totals.queries,
        "images": totals.images,
    }


Measure = Callable[[Cell, Task, Task, Box, Path], dict[str, Any]]
REFERENCES: dict[str, Measure] = {LOGISTIC: logistic, TEMPLATE: best_template}
