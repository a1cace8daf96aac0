"""Wall time of a CraFT search through our full path, against the published procedure.

    python benchmarks/speed.py                         # 8,000 evaluations, 10 classes, 160 images
    python benchmarks/speed.py --evaluations 400       # a look
    python benchmarks/speed.py --device cuda --model ViT-B-32 --pretrained openai

Ours is the recipe "craft" without its guard, as `tune` runs it: `CraftRun` under the meter, every
query reserved and settled in a ledger on disk, a checkpoint after every generation, the local black
box behind the seam. The reference (`published_craft.py`) holds its model and its image features in
its hands and keeps no books. Same model, images, number of evaluations, device and threads. The
images are encoded beforehand on both sides.

The two advance in turns, a few generations each, so that they meet the same load: the ratio means
something on a busy machine, the seconds less. A second search of ours, with full covariance, shows
what the optimiser costs at its dearest. Times are inclusive of everything between the first query
and the last; `Stopwatch` shares them out by the innermost function that it watches. Needs the
`dev` extra.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import platform
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from blackbox_vlm.backends._open import open_model
from blackbox_vlm.backends.dual_encoder import DualEncoder
from blackbox_vlm.backends.local import LocalBlackBox
from published_craft import POPULATION, TEMPLATE, PublishedCraft

from blackbox_vlm import Task, demo_folder, open_backend
from blackbox_vlm import search as search_module
from blackbox_vlm.backend import Backend, PromptScores, TextScores
from blackbox_vlm.craft import cma, craft
from blackbox_vlm.craft.recipes import CRAFT, Recipe
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import plain_logits
from blackbox_vlm.plan import Method, make_plan
from blackbox_vlm.running import run_sync
from blackbox_vlm.search import CraftRun, Progress
from blackbox_vlm.task import Classes

TURN = 5  # generations of one side, then as many of the other
ENCODED_AT_ONCE = 4  # images; more is slower on a CPU
WARM_UP = 2  # generations of each before anything is timed
OPTIMISER = "optimiser (ask, tell)"
WATCHED: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    (OPTIMISER, cma, ("ask", "tell")),
    ("text tower", DualEncoder, ("encode_prompts", "encode_texts")),
    ("rest of the black box", LocalBlackBox, ("answer",)),
    (
        "fitness and refiner",
        craft,
        ("tell_prompts", "elite_view", "train_refiner", "fit_refiner"),
    ),
    ("meter and ledger", Meter, ("observe",)),
    ("checkpoint", search_module, ("to_bytes",)),
    ("checkpoint", Ledger, ("checkpoint",)),
)


class Stopwatch:
    """Shares time out to the innermost part that is under way."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        self._lap()
        self._open.append(part)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def watched(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time booked on `part`."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.during(part):
                return function(*args, **kwargs)

        @functools.wraps(function)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            with self.during(part):
                return await function(*args, **kwargs)

        return run_async if inspect.iscoroutinefunction(function) else run

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Watch all of `WATCHED`."""
        with ExitStack() as stack:
            for part, owner, names in WATCHED:
                for name in names:
                    function = self.watched(part, getattr(owner, name))
                    stack.enter_context(patch.object(owner, name, function))
            yield


PAUSED, REST = "paused", "rest"


@dataclass(frozen=True)
class Measured:
    """Seconds of one search, and where they went."""

    evaluations: int
    parts: defaultdict[str, float]
    best: list[float]  # lowest fitness of each generation

    @property
    def seconds(self) -> float:
        return sum(seconds for part, seconds in self.parts.items() if part != PAUSED)

    def share(self, part: str) -> float:
        return self.parts[part] / self.seconds


class Reference:
    """The published procedure, with a clock of its own."""

    def __init__(self, task: Task, backend: Backend, args: argparse.Namespace) -> None:
        opened = open_model(args.model, args.pretrained)
        device = torch.device(args.device)
        model: Any = opened.model.requires_grad_(False).to(device)
        with torch.no_grad():
            features = encoded(model, opened.preprocess, task, device)
            labels = torch.tensor(task.labels, device=device)
            self.search = PublishedCraft(
                model, opened.tokenize, features, labels, task.class_names, args.seed
            )
            self.agreement = disagreement(self.search, model, features, task, backend)
        self.seconds = 0.0

    def advance(self, generations: int) -> None:
        start = time.perf_counter()
        for _ in range(generations):
            self.search.generation()
        self.seconds += time.perf_counter() - start


def encoded(model: Any, preprocess: Any, task: Task, device: torch.device) -> torch.Tensor:
    """The images' normalised vectors, `(N, dim)`, by open_clip alone."""
    rows = []
    for at in range(0, len(task), ENCODED_AT_ONCE):
        pictures = [preprocess(i.load()) for i in task.images[at : at + ENCODED_AT_ONCE]]
        rows.append(model.encode_image(torch.stack(pictures).to(device), normalize=True))
    return torch.cat(rows)


def disagreement(
    reference: PublishedCraft, model: Any, features: torch.Tensor, task: Task, backend: Backend
) -> float:
    """Largest difference of a logit between the two sides, under one prompt: both do the work."""
    soft = backend.capabilities.soft_prompts
    assert soft is not None
    shape = (soft.context_tokens, soft.width)
    offset = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    offset *= np.float32(soft.token_std)
    request = PromptScores(task.images, task.class_names, TEMPLATE, offset)
    ours = run_sync(backend.answer([request]))[0].values
    vectors = reference.prompts.vectors(torch.from_numpy(offset).to(features.device))
    theirs = float(model.logit_scale.exp()) * features @ vectors.T
    return float(np.abs(theirs.cpu().numpy() - ours).max())


def search(
    task: Task,
    backend: Backend,
    recipe: Recipe,
    evaluations: int,
    folder: Path,
    on_turn: Callable[[int], None] = lambda generations: None,
) -> Measured:
    """One search of ours; `on_turn` is called, off the clock, after every few generations."""
    run_sync(backend.answer([TextScores(task.images, task.texts())]))
    watch, best = Stopwatch(), list[float]()

    def on_progress(progress: Progress) -> None:
        best.append(progress.best)
        left = progress.generations - progress.generation
        if progress.generation % TURN == 0 or not left:
            with watch.during(PAUSED):
                on_turn(len(best) % TURN or TURN)

    with watch.everywhere(), watch.during(REST):
        made = make_plan(
            task,
            backend.capabilities,
            recipe,
            budget=evaluations + 2,  # a pass before the search, and maybe one after it
            method=Method.CRAFT,
            seed=0,
        )
        with Ledger(folder / f"{recipe.separable}-{evaluations}.sqlite", made.budget) as ledger:
            meter = Meter(backend, ledger)
            run = CraftRun(task, made, recipe, 0, meter, ledger, on_progress)
            run_sync(tuned(run, meter, task))
    return Measured(evaluations, watch.seconds, best)


async def tuned(run: CraftRun, meter: Meter, task: Task) -> None:
    classes = Classes(task.class_names, task.template)
    await run.run(await plain_logits(meter, task.images, classes, "zero-shot"))


def task_of(args: argparse.Namespace) -> Task:
    """The first classes of the folder, `--shots` images each, under the published template."""
    whole = Task.from_folder(args.data, template=TEMPLATE)
    assert whole.labels is not None
    few = whole.subset(np.flatnonzero(whole.labels < args.classes))
    return replace(few, class_names=whole.class_names[: args.classes]).sample(args.shots, seed=0)


def report(reference: Reference, ours: Measured, full: Measured) -> Iterator[str]:
    n = ours.evaluations
    yield f"| {n} evaluations | seconds | evaluations/s | lowest fitness, each with its own w |"
    yield "|---|---|---|---|"
    published = Measured(n, defaultdict(float, {REST: reference.seconds}), reference.search.best)
    rows = (("published procedure", published), ("ours", ours), ("ours, full covariance", full))
    for name, row in rows:
        fitness = f"{row.best[0]:.3f} to {row.best[-1]:.3f}"
        yield f"| {name} | {row.seconds:.1f} | {n / row.seconds:.0f} | {fitness} |"
    yield f"\npublished / ours: {reference.seconds / ours.seconds:.2f}"
    for name, row in rows[1:]:
        each = 1e3 * row.parts[OPTIMISER] * POPULATION / row.evaluations
        yield f"optimiser of {name}: {each:.2f} ms per generation"
    yield f"largest difference of a logit under one prompt: {reference.agreement:.1e}\n"
    yield "| where our time goes | ours | ours, full covariance |"
    yield "|---|---|---|"
    for part in dict.fromkeys([*(part for part, *_ in WATCHED), REST]):
        yield f"| {part} | {ours.share(part):.1%} | {full.share(part):.1%} |"


def machine(args: argparse.Namespace) -> str:
    device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "cma"))
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "not set")
    return (
        f"{device}, {torch.get_num_threads()} torch threads on {os.cpu_count()} CPUs "
        f"({platform.machine()}, {platform.system()}{load}), Python {platform.python_version()}, "
        f"{packages}, OPENBLAS_NUM_THREADS {threads}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=8000, help=f"in steps of {POPULATION}")
    parser.add_argument("--data", type=Path, default=demo_folder(), help="a folder per class")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--shots", type=int, default=16, help="images per class")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pretrained")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="of torch; of numpy: OPENBLAS_NUM_THREADS")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> tuple[Reference, Measured, Measured]:
    task = task_of(args)
    backend = open_backend(
        "local", model=args.model, pretrained=args.pretrained, device=args.device
    )
    reference = Reference(task, backend, args)
    recipe = replace(CRAFT, folds=0)
    print(f"{len(task)} images, {len(task.class_names)} classes, model {args.model}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reference.advance(WARM_UP)
        search(task, backend, recipe, WARM_UP * POPULATION, folder)
        reference.seconds = 0.0
        ours = search(task, backend, recipe, args.evaluations, folder, reference.advance)
        dear = replace(recipe, separable=False)
        full = search(task, backend, dear, args.evaluations, folder)
    return reference, ours, full


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine(args))
    print("\n".join(report(*measure(args))))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
