"""The command line. It knows people: everything else lives in the library."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blackbox_vlm._version import __version__
from blackbox_vlm.errors import BlackboxError, InputError

if TYPE_CHECKING:
    from blackbox_vlm.backend import Backend
    from blackbox_vlm.plan import Plan
    from blackbox_vlm.task import Task
    from blackbox_vlm.tuning import TuneResult

PATH = click.Path(path_type=Path)


class Commands(click.Group):
    """A group that turns our errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BlackboxError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Stopped at once; what was settled is kept.", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="blackbox-vlm")
def main() -> None:
    """Tune a vision-language model that you can only query, inside a budget that holds.

    Exit codes: 0 done, 2 wrong input, 3 budget spent, 4 endpoint broken, 5 key refused, 6 disk or
    ledger, 130 interrupted (resumable).
    """


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


data_options = _options(
    click.option("--classes", type=PATH, help="File with one class per line: `folder,class name`."),
    click.option("--template", help='Text around the class name, e.g. "a photo of a {}.".'),
    click.option("--strict", is_flag=True, help="Refuse broken images instead of skipping them."),
)
backend_options = _options(
    click.option("--backend", default="local", show_default=True, help="An installed backend."),
    click.option("--model", default="nano", show_default=True, help="Model of the local backend."),
    click.option("--pretrained", help='Tag of its weights, e.g. "openai".'),
    click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
    click.option(
        "--access",
        type=click.Choice(["soft", "embeddings", "scores", "label"]),
        default="soft",
        show_default=True,
        help="What the black box lets its caller see.",
    ),
    click.option(
        "--restrict",
        multiple=True,
        metavar="NAME=VALUE",
        help="Rehearse a limit: images_per_request, texts_per_request, decimals, top_k, "
        "score_kind (logits, softmax, sigmoid, cosine), noise. May be repeated.",
    ),
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else."
)


@main.command()
@click.argument("data", type=PATH)
@click.option("--budget", type=int, required=True, help="Queries that may be spent.")
@click.option("--shots", type=int, help="Labelled images per class; all, if not given.")
@click.option("--out", type=PATH, help="The run's folder.  [default: runs/DATA-METHOD-SEED]")
@click.option(
    "--method", type=click.Choice(["craft", "refine"]), help="Chosen by access if not given."
)
@click.option(
    "--recipe",
    default="craft",
    show_default=True,
    help="Settings of CraFT: craft, craft-paper, craft-paper-flowers.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--max-cost", type=float, help="USD that may be spent.")
@click.option(
    "--on-lost",
    type=click.Choice(["stop", "resend"]),
    default="stop",
    show_default=True,
    help="What to do about a query whose answer was lost.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and its exact cost; spend nothing.")
@data_options
@backend_options
@json_option
def tune(data: Path, out: Path | None, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Tune a black box on the images in DATA.

    DATA is a folder with one sub-folder per class (or with train/ and test/ holding them), or a
    CSV file with the columns path and label.
    """
    settings = {**given, "data": str(data.absolute())}
    for name in ("classes",):
        if settings[name] is not None:
            settings[name] = str(settings[name].absolute())
    run = out or Path("runs") / f"{data.stem or 'data'}-{_method_name(given)}-{given['seed']}"
    _tune(settings, run, dry_run=dry_run, resume=False, as_json=as_json)


@main.command()
@click.argument("run", type=PATH)
@json_option
def resume(run: Path, as_json: bool) -> None:
    """Go on with the interrupted run in RUN; what was settled is not paid again."""
    from blackbox_vlm.run_directory import RunDirectory

    settings = RunDirectory(run).describe()
    if "data" not in settings:
        raise InputError(f"{run} was started from Python; resume it there with tune(resume=True)")
    _tune(settings, run, dry_run=False, resume=True, as_json=as_json)


@main.command()
@click.argument("run", type=PATH)
@click.argument("data", type=PATH)
@click.option(
    "--budget", type=int, help="Queries that may be spent; exactly what it takes, if not given."
)
@click.option(
    "--split", default="test", show_default=True, help="Which split, where DATA has several."
)
@data_options
@json_option
def evaluate(
    run: Path, data: Path, budget: int | None, split: str, as_json: bool, **given: Any
) -> None:
    """Compare the adapter of RUN with zero-shot on the labelled images in DATA.

    This costs queries, from a budget of its own; images evaluated before cost nothing.
    """
    from blackbox_vlm.adapter import Adapter
    from blackbox_vlm.evaluation import evaluate as run_evaluation
    from blackbox_vlm.evaluation import evaluation_cost, match_labels
    from blackbox_vlm.run_directory import RunDirectory

    directory = RunDirectory(run)
    settings = directory.describe()
    adapter = Adapter.from_pretrained(directory.adapter)
    task = _load(data, given, split=split)
    match_labels(adapter, task)
    backend = _open(settings)
    cost = evaluation_cost(adapter, task, backend)
    _say(f"Evaluating {len(task)} images takes {cost} queries, from a budget of its own.")
    ledger = directory.side_ledger("evaluate", task.fingerprint())
    with directory.locked():
        result = run_evaluation(adapter, task, backend, ledger, budget=budget)
    if as_json:
        _print_json(dataclasses.asdict(result))
        return
    _table(
        f"{result.n_images} images, strategy {result.strategy}",
        [
            ("zero-shot accuracy", _percent(result.zero_shot_accuracy)),
            ("tuned accuracy", _percent(result.accuracy)),
            ("queries spent", f"{result.queries_spent} of {result.budget}"),
        ],
    )


@main.command()
@click.argument("run", type=PATH)
@click.argument("images", type=PATH, nargs=-1, required=True)
@click.option(
    "--budget", type=int, help="Queries that may be spent; exactly what it takes, if not given."
)
@json_option
def predict(run: Path, images: tuple[Path, ...], budget: int | None, as_json: bool) -> None:
    """Predict IMAGES (files or folders) with the adapter of RUN; prints CSV.

    Every request costs one query, from a budget of its own.
    """
    from blackbox_vlm.adapter import Adapter
    from blackbox_vlm.evaluation import predict as run_prediction
    from blackbox_vlm.run_directory import RunDirectory

    directory = RunDirectory(run)
    settings = directory.describe()
    adapter = Adapter.from_pretrained(directory.adapter)
    found = _find(images)
    backend = _open(settings)
    cost = adapter.queries(found, backend.capabilities)
    _say(f"Predicting {len(found)} images takes {cost} queries, from a budget of its own.")
    ledger = directory.side_ledger("predict", _digest([image.sha256 for image in found]))
    with directory.locked():
        (labels, probabilities), spent = run_prediction(
            adapter, found, backend, ledger, budget=budget
        )
    names = adapter.classes.names
    rows = [
        {"path": str(image.path), "label": names[label], "probability": float(row[label])}
        for image, label, row in zip(found, labels, probabilities, strict=True)
    ]
    if as_json:
        _print_json({"predictions": rows, "n_images": len(rows), "queries_spent": spent})
    else:
        _print_csv(rows)


@main.command()
@click.argument("run", type=PATH)
@json_option
def inspect(run: Path, as_json: bool) -> None:
    """Show what RUN has spent, on what, and how far it came. Spends nothing."""
    from blackbox_vlm.ledger import Ledger
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.search import read_trajectory

    directory = RunDirectory(run)
    settings = directory.describe()
    with Ledger(directory.ledger) as ledger:
        totals, purposes = ledger.totals(), ledger.by_purpose()
        trajectory = read_trajectory(ledger)
    result = json.loads(directory.result.read_text()) if directory.result.exists() else None
    if as_json:
        _print_json(
            {
                "settings": settings,
                "totals": {**dataclasses.asdict(totals), "left": totals.left},
                "spent_by_purpose": purposes,
                "trajectory": trajectory,
                "result": result,
            }
        )
        return
    _table(
        str(run),
        [
            ("state", "finished" if result else f"unfinished; blackbox-vlm resume {run}"),
            ("queries spent", f"{totals.queries} of {totals.budget}"),
            ("answers lost", f"{totals.unknown + totals.open}"),
            ("images shown", f"{totals.images}"),
            ("texts shown", f"{totals.texts}"),
            ("cost", f"{totals.cost:g} USD"),
            *((f"  {purpose}", f"{count} queries") for purpose, count in purposes.items()),
        ],
    )
    if trajectory:
        _table("fitness (lower is better)", _milestones(trajectory))


@main.command()
@click.option("--budget", type=int, default=8000, show_default=True)
@click.option("--shots", type=int, default=16, show_default=True)
@click.option("--out", type=PATH, default=Path("runs/demo"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
def demo(budget: int, shots: int, out: Path, seed: int, as_json: bool) -> None:
    """Tune the embedded model on the embedded images, offline, and evaluate it.

    The images are colour emoji drawings; the model is a small stand-in for CLIP.
    """
    from blackbox_vlm.adapter import Adapter
    from blackbox_vlm.demo import demo_folder
    from blackbox_vlm.evaluation import evaluate as run_evaluation
    from blackbox_vlm.run_directory import RunDirectory

    given = {option.name: option.default for option in tune.params if option.name}
    settings = {
        name: value
        for name, value in given.items()
        if name not in ("out", "dry_run", "as_json") and value is not Ellipsis
    }
    settings = _plain_defaults(settings) | {
        "data": str(demo_folder()),
        "budget": budget,
        "shots": shots,
        "seed": seed,
    }
    result, backend = _run_tune(settings, out, resume=False)
    adapter = Adapter.from_pretrained(result.adapter)
    task = _load(demo_folder(), {}, split="test")
    directory = RunDirectory(out)
    held_out = run_evaluation(
        adapter, task, backend, directory.side_ledger("evaluate", task.fingerprint())
    )
    if as_json:
        _print_json({**dataclasses.asdict(result), "test": dataclasses.asdict(held_out)})
        return
    _table(
        f"{held_out.n_images} test images that were not seen, strategy {result.strategy}",
        [
            ("zero-shot accuracy", _percent(held_out.zero_shot_accuracy)),
            ("tuned accuracy", _percent(held_out.accuracy)),
            ("queries spent", f"{result.queries_spent} of {result.budget}"),
            ("evaluation", f"{held_out.queries_spent} queries, from a budget of its own"),
            ("adapter", result.adapter),
        ],
    )


# -- tune and resume -------------------------------------------------------------------------


def _tune(
    settings: dict[str, Any], out: Path, *, dry_run: bool, resume: bool, as_json: bool
) -> None:
    if dry_run:
        plan = _dry_run(settings)
        if as_json:
            steps = [dataclasses.asdict(step) for step in plan.steps]
            _print_json(
                {"budget": plan.budget, "queries": plan.queries, "usd": plan.usd, "steps": steps}
            )
        else:
            _print_plan(plan)
        return
    result, _ = _run_tune(settings, out, resume=resume)
    if as_json:
        _print_json(dataclasses.asdict(result))
    else:
        _print_result(result)


def _dry_run(settings: dict[str, Any]) -> Plan:
    from blackbox_vlm.tuning import dry_run

    task = _sampled(settings)
    return dry_run(task, _open(settings).capabilities, _run_options(settings))


def _run_tune(settings: dict[str, Any], out: Path, *, resume: bool) -> tuple[TuneResult, Backend]:
    from blackbox_vlm.progress import Reporter
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.tuning import tune

    directory = RunDirectory(out)
    if not resume and directory.exists:
        directory.create({})  # says why not, before the data is read
    task = _sampled(settings)
    for broken in task.skipped[:20]:
        _say(f"Skipped {broken}")
    if len(task.skipped) > 20:
        _say(f"... and {len(task.skipped) - 20} more; --strict refuses them")
    backend = _open(settings)
    with StopSignals(out) as stop, Reporter(sys.stderr) as reporter:
        result = tune(
            task,
            backend,
            out,
            _run_options(settings),
            resume=resume,
            description=settings,
            on_plan=reporter.plan,
            on_spent=reporter.spent,
            on_progress=reporter.progress,
            should_stop=stop.is_set,
        )
    return result, backend


def _run_options(settings: dict[str, Any]) -> Any:
    from blackbox_vlm.tuning import Options

    names = [field.name for field in dataclasses.fields(Options)]
    return Options(**{name: settings[name] for name in names})


def _sampled(settings: dict[str, Any]) -> Task:
    task = _load(Path(settings["data"]), settings, split="train")
    shots = settings["shots"]
    return task if shots is None else task.sample(shots, settings["seed"])


def _load(data: Path, settings: dict[str, Any], *, split: str) -> Task:
    from blackbox_vlm.task import Task

    chosen = {name: settings.get(name) for name in ("classes", "template")}
    strict = bool(settings.get("strict"))
    if data.is_file():
        return Task.from_csv(data, strict=strict, **chosen)
    return Task.from_folder(data, split=split, strict=strict, **chosen)


def _open(settings: dict[str, Any]) -> Backend:
    from blackbox_vlm.backend import open_backend

    options = dict(map(_restriction, settings["restrict"]))
    names = ("model", "pretrained", "device", "access")
    return open_backend(settings["backend"], **{n: settings[n] for n in names}, **options)


def _restriction(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"got --restrict {text!r}; wanted NAME=VALUE, e.g. decimals=4")
    for convert in (int, float):
        try:
            return name, convert(value)
        except ValueError:
            continue
    return name, value


def _method_name(settings: dict[str, Any]) -> str:
    default = "craft" if settings["access"] == "soft" else "refine"
    return str(settings["method"] or default)


def _plain_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str | int | float | bool) else None
        for name, value in settings.items()
    } | {"restrict": []}


def _find(paths: tuple[Path, ...]) -> list[Any]:
    from blackbox_vlm.images import Image, check_images, find_images

    found: list[Image] = []
    for path in paths:
        files = find_images(path) if path.is_dir() else [path]
        root = path if path.is_dir() else path.parent
        for checked in check_images(files, root):
            if isinstance(checked, Image):
                found.append(checked)
            else:
                _say(f"Skipped {checked}")
    if not found:
        raise InputError("none of the paths holds a readable image; nothing was asked")
    return found


def _digest(texts: list[str]) -> str:
    import hashlib

    return hashlib.sha256("".join(texts).encode()).hexdigest()


class StopSignals:
    """The first Ctrl-C or SIGTERM asks for a clean stop, the second stops at once."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._asked = threading.Event()
        self._old: dict[int, Any] = {}

    def is_set(self) -> bool:
        return self._asked.is_set()

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._asked.is_set():
            _say(f"Go on with: blackbox-vlm resume {self._run}")

    def _handle(self, number: int, frame: object) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()
        _say("Stopping after what is in flight; once more stops at once.")


# -- what people see -------------------------------------------------------------------------


def _say(line: str) -> None:
    click.echo(line, err=True)


def _percent(fraction: float | None) -> str:
    return "not measured" if fraction is None else f"{100 * fraction:.1f} %"


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=True, allow_nan=False))


def _print_csv(rows: list[dict[str, Any]]) -> None:
    import csv

    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _inert(value) for name, value in row.items()})


def _inert(value: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t")):
        return "'" + value
    return value


def _print_plan(plan: Plan) -> None:
    rows = [(f"{step.purpose}: {step.why}", f"{step.queries} queries") for step in plan.steps]
    _table(
        f"method {plan.method.value}, budget {plan.budget}",
        [*rows, ("in all", f"{plan.queries} queries, {plan.usd:g} USD")],
    )


def _print_result(result: TuneResult) -> None:
    _table(
        f"{result.n_images} training images, strategy {result.strategy}",
        [
            ("zero-shot accuracy", _percent(result.zero_shot_accuracy)),
            ("tuned accuracy (out-of-fold)", _percent(result.tuned_accuracy)),
            ("queries spent", f"{result.queries_spent} of {result.budget}"),
            ("adapter", result.adapter),
        ],
    )
    click.echo(result.reason)


def _milestones(trajectory: list[dict[str, Any]]) -> list[tuple[str, str]]:
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in trajectory:
        stages.setdefault(record["stage"], []).append(record)
    return [
        (
            f"{stage}, {len(records)} generations",
            f"{records[0]['mean']:.4f} -> {records[-1]['mean']:.4f}",
        )
        for stage, records in stages.items()
    ]


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console(markup=False, highlight=False).print(table)
