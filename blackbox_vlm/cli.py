"""The command line. It knows people; everything else lives in the library, imported when used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blackbox_vlm._version import __version__
from blackbox_vlm.console import StopSignals, percent, print_csv, print_json, print_table, say
from blackbox_vlm.errors import BlackboxError, InputError, StorageError

if TYPE_CHECKING:
    from blackbox_vlm.adapter import Adapter
    from blackbox_vlm.backend import Backend
    from blackbox_vlm.images import Image
    from blackbox_vlm.ledger import Lost
    from blackbox_vlm.plan import Plan
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.settings import Settings
    from blackbox_vlm.tuning import TuneResult

PATH = click.Path(path_type=Path)


class Commands(click.Group):
    """A group that turns our errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BlackboxError as error:
            say(f"Error: {error}")
            ctx.exit(error.exit_code)
        except OSError as error:
            say(f"Error: {error.filename}: {error.strerror}; choose another path")
            ctx.exit(StorageError.exit_code)
        except KeyboardInterrupt:
            say("Stopped at once; what was settled is kept.")
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="blackbox-vlm")
def main() -> None:
    """Tune a vision-language model that you can only query, inside a budget that holds.

    Exit codes: 0 done, 2 wrong input, 3 budget spent, 4 endpoint broken, 5 key refused, 6 disk or
    ledger, 130 interrupted (resumable).
    """


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


data_options = _together(
    click.option("--classes", type=PATH, help="File with a class per line: `folder,class name`."),
    click.option("--template", help='Text around the class name, e.g. "a photo of a {}.".'),
    click.option("--strict", is_flag=True, help="Refuse broken images instead of skipping them."),
)
lost_option = click.option(
    "--on-lost",
    type=click.Choice(["stop", "resend"]),
    help="About a query whose answer was lost: stop (the default), or resend and pay again.",
)
method_options = _together(
    click.option(
        "--method", type=click.Choice(["craft", "refine"]), help="By access, if left out."
    ),
    click.option(
        "--recipe",
        default="craft",
        show_default=True,
        help="Settings of CraFT: craft, craft-paper or craft-paper-flowers.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
    click.option("--max-cost", type=click.FloatRange(min=0), help="USD that may be spent."),
)
backend_options = _together(
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
budget_option = click.option(
    "--budget", type=int, help="Queries that may be spent; what it takes, if left out."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else."
)


@main.command()
@click.argument("data", type=PATH)
@click.option("--budget", type=int, required=True, help="Queries that may be spent.")
@click.option("--shots", type=int, help="Labelled images per class; all, if left out.")
@click.option("--out", type=PATH, help="The run's folder.  [default: runs/DATA-METHOD-SEED]")
@click.option("--dry-run", is_flag=True, help="Print the plan and its exact cost; spend nothing.")
@method_options
@lost_option
@data_options
@backend_options
@json_option
def tune(
    data: Path,
    classes: Path | None,
    out: Path | None,
    dry_run: bool,
    on_lost: Lost | None,
    model: str,
    pretrained: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Tune a black box on the images in DATA.

    DATA is a folder with one sub-folder per class (or with train/ and test/ holding them), or a
    CSV file with the columns path and label.
    """
    from blackbox_vlm.settings import Settings

    settings = Settings(
        data=str(data.absolute()),
        classes=_absolute(classes),
        on_lost=on_lost or "stop",
        model=_absolute_if_there(model),
        pretrained=pretrained and _absolute_if_there(pretrained),
        **options,
    )
    if dry_run:
        _show_plan(settings, as_json=as_json)
        return
    result, _ = _run(settings, out or _default_run(data, settings), resume=False)
    _show_result(result, as_json=as_json)


@main.command()
@click.argument("run", type=PATH)
@lost_option
@json_option
def resume(run: Path, on_lost: Lost | None, as_json: bool) -> None:
    """Go on with the interrupted run in RUN; what was settled is not paid again."""
    settings = _settings(run)
    if on_lost is not None:
        settings = dataclasses.replace(settings, on_lost=on_lost)
    result, _ = _run(settings, run, resume=True)
    _show_result(result, as_json=as_json)


@main.command()
@click.argument("run", type=PATH)
@click.argument("data", type=PATH)
@budget_option
@click.option("--split", default="test", show_default=True, help="Where DATA has several.")
@click.option("--classes", type=PATH, help="File with a class per line: `folder,class name`.")
@click.option("--strict", is_flag=True, help="Refuse broken images instead of skipping them.")
@lost_option
@json_option
def evaluate(
    run: Path,
    data: Path,
    budget: int | None,
    split: str,
    classes: Path | None,
    strict: bool,
    on_lost: Lost | None,
    as_json: bool,
) -> None:
    """Compare the adapter of RUN with zero-shot on the labelled images in DATA.

    This costs queries, from a budget of its own; images evaluated before cost nothing.
    """
    from blackbox_vlm import evaluation
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.settings import load_task

    settings, directory = _settings(run), RunDirectory(run)
    adapter = _adapter(directory)
    task = load_task(
        data,
        classes=_absolute(classes),
        template=adapter.classes.template,
        strict=strict,
        split=split,
    )
    evaluation.match_labels(adapter, task)
    backend = settings.open_backend()
    cost = evaluation.evaluation_cost(adapter, task, backend)
    say(f"Evaluating {len(task)} images takes {cost} queries, from a budget of its own.")
    ledger = directory.side_ledger("evaluate", task.fingerprint())
    with directory.locked():
        result = evaluation.evaluate(
            adapter, task, backend, ledger, budget=budget, on_lost=on_lost or "stop"
        )
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    print_table(
        f"{result.n_images} images, strategy {result.strategy}",
        [
            ("zero-shot accuracy", percent(result.zero_shot_accuracy)),
            ("tuned accuracy", percent(result.accuracy)),
            ("queries spent", f"{result.queries_spent} of {result.budget}"),
        ],
    )


@main.command()
@click.argument("run", type=PATH)
@click.argument("images", type=PATH, nargs=-1, required=True)
@budget_option
@lost_option
@json_option
def predict(
    run: Path,
    images: tuple[Path, ...],
    budget: int | None,
    on_lost: Lost | None,
    as_json: bool,
) -> None:
    """Predict IMAGES (files or folders) with the adapter of RUN; prints CSV.

    Every request costs one query, from a budget of its own.
    """
    from blackbox_vlm import evaluation
    from blackbox_vlm.run_directory import RunDirectory

    settings, directory = _settings(run), RunDirectory(run)
    adapter = _adapter(directory)
    found = _find(images)
    backend = settings.open_backend()
    cost = adapter.queries(found, backend.capabilities)
    say(f"Predicting {len(found)} images takes {cost} queries, from a budget of its own.")
    digest = hashlib.sha256("".join(image.sha256 for image in found).encode()).hexdigest()
    ledger = directory.side_ledger("predict", digest)
    with directory.locked():
        answer, spent = evaluation.predict(
            adapter, found, backend, ledger, budget=budget, on_lost=on_lost or "stop"
        )
    names = adapter.classes.names
    rows = [
        {"path": str(image.path), "label": names[label], "probability": float(row[label])}
        for image, label, row in zip(found, *answer, strict=True)
    ]
    if as_json:
        print_json({"predictions": rows, "n_images": len(rows), "queries_spent": spent})
    else:
        print_csv(rows)


@main.command()
@click.argument("run", type=PATH)
@json_option
def inspect(run: Path, as_json: bool) -> None:
    """Show what RUN has spent, on what, and how far it came. Spends nothing."""
    from blackbox_vlm.ledger import Ledger
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.search import read_trajectory

    directory = RunDirectory(run)
    description = directory.describe()
    with Ledger(directory.ledger) as ledger:
        totals, purposes = ledger.totals(), ledger.by_purpose()
        trajectory = read_trajectory(ledger)
    result = json.loads(directory.result.read_text()) if directory.result.exists() else None
    if as_json:
        print_json(
            {
                "settings": description,
                "totals": {**dataclasses.asdict(totals), "left": totals.left},
                "spent_by_purpose": purposes,
                "trajectory": trajectory,
                "result": result,
            }
        )
        return
    print_table(
        str(run),
        [
            ("state", "finished" if result else f"unfinished; blackbox-vlm resume {run}"),
            ("queries spent", f"{totals.queries} of {totals.budget}"),
            ("answers lost or open", f"{totals.unknown + totals.open}"),
            ("images shown", f"{totals.images}"),
            ("texts shown", f"{totals.texts}"),
            ("cost", f"{totals.cost:g} USD"),
            *((f"  {purpose}", f"{count} queries") for purpose, count in purposes.items()),
        ],
    )
    if trajectory:
        print_table("mean fitness of a generation (lower is better)", _stages(trajectory))


@main.command()
@click.option("--budget", type=int, default=8000, show_default=True)
@click.option("--shots", type=int, default=16, show_default=True)
@click.option("--out", type=PATH, default=Path("runs/demo"), show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@json_option
def demo(budget: int, shots: int, out: Path, seed: int, as_json: bool) -> None:
    """Tune the embedded model on the embedded images, offline, and evaluate it.

    The images are colour emoji drawings; the model is a small stand-in for CLIP.
    """
    from blackbox_vlm import evaluation
    from blackbox_vlm.adapter import Adapter
    from blackbox_vlm.demo import demo_folder
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.settings import Settings
    from blackbox_vlm.task import Task

    settings = Settings(data=str(demo_folder()), budget=budget, shots=shots, seed=seed)
    result, backend = _run(settings, out, resume=False)
    adapter = Adapter.from_pretrained(result.adapter)
    task = Task.from_folder(demo_folder(), split="test")
    ledger = RunDirectory(out).side_ledger("evaluate", task.fingerprint())
    with RunDirectory(out).locked():
        unseen = evaluation.evaluate(adapter, task, backend, ledger)
    if as_json:
        print_json({**dataclasses.asdict(result), "test": dataclasses.asdict(unseen)})
        return
    print_table(
        f"{unseen.n_images} test images that were not seen, strategy {result.strategy}",
        [
            ("zero-shot accuracy", percent(unseen.zero_shot_accuracy)),
            ("tuned accuracy", percent(unseen.accuracy)),
            ("queries spent", f"{result.queries_spent} of {result.budget}"),
            ("evaluation", f"{unseen.queries_spent} queries, from a budget of its own"),
            ("adapter", result.adapter),
        ],
    )


# -- steps that commands share ----------------------------------------------------------------


def _run(settings: Settings, out: Path, *, resume: bool) -> tuple[TuneResult, Backend]:
    from blackbox_vlm.progress import Reporter
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.tuning import tune

    if not resume:
        RunDirectory(out).check_free()  # before the data is read and the model loaded
    task = settings.load_task()
    for broken in task.skipped[:20]:
        say(f"Skipped {broken}")
    if len(task.skipped) > 20:
        say(f"... and {len(task.skipped) - 20} more; --strict refuses them")
    backend = settings.open_backend()
    with StopSignals(out) as stop, Reporter(sys.stderr) as reporter:
        result = tune(
            task,
            backend,
            out,
            settings.options,
            resume=resume,
            description=settings.to_description(),
            on_plan=reporter.plan,
            on_spent=reporter.spent,
            on_progress=reporter.progress,
            should_stop=stop.is_set,
        )
    return result, backend


def _show_plan(settings: Settings, *, as_json: bool) -> None:
    from blackbox_vlm.tuning import dry_run

    task = settings.load_task()
    plan: Plan = dry_run(task, settings.open_backend().capabilities, settings.options)
    if as_json:
        steps = [dataclasses.asdict(step) for step in plan.steps]
        print_json(
            {"budget": plan.budget, "queries": plan.queries, "usd": plan.usd, "steps": steps}
        )
        return
    rows = [(f"{step.purpose}: {step.why}", f"{step.queries} queries") for step in plan.steps]
    print_table(
        f"method {plan.method.value}, budget {plan.budget}",
        [*rows, ("in all", f"{plan.queries} queries, {plan.usd:g} USD")],
    )


def _show_result(result: TuneResult, *, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    print_table(
        f"{result.n_images} training images, strategy {result.strategy}",
        [
            ("zero-shot accuracy", percent(result.zero_shot_accuracy)),
            ("tuned accuracy (out-of-fold)", percent(result.tuned_accuracy)),
            ("queries spent", f"{result.queries_spent} of {result.budget}"),
            ("adapter", result.adapter),
        ],
    )
    click.echo(result.reason)


def _settings(run: Path) -> Settings:
    from blackbox_vlm.run_directory import RunDirectory
    from blackbox_vlm.settings import Settings

    return Settings.from_description(RunDirectory(run).describe(), run)


def _adapter(directory: RunDirectory) -> Adapter:
    from blackbox_vlm.adapter import Adapter

    if not directory.result.exists():
        raise InputError(
            f"{directory.path} is not finished; blackbox-vlm resume {directory.path} first"
        )
    return Adapter.from_pretrained(directory.adapter)


def _default_run(data: Path, settings: Settings) -> Path:
    method = settings.method or ("craft" if settings.access == "soft" else "refine")
    where = data.absolute()
    name = where.parent.name if where.name == "train" else where.stem
    return Path("runs") / f"{name}-{method}-{settings.seed}"


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _absolute_if_there(name: str) -> str:
    """A path that exists, made to mean the same from every folder; other names as they are."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _find(paths: tuple[Path, ...]) -> list[Image]:
    """The readable images among files and folders; the others are listed."""
    from blackbox_vlm.images import Image, check_images, find_images

    found: list[Image] = []
    for path in paths:
        files, root = (find_images(path), path) if path.is_dir() else ([path], path.parent)
        for checked in check_images(files, root):
            if isinstance(checked, Image):
                found.append(checked)
            else:
                say(f"Skipped {checked}")
    if not found:
        raise InputError("none of the paths holds a readable image; nothing was asked")
    return found


def _stages(trajectory: list[dict[str, Any]]) -> list[tuple[str, str]]:
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in trajectory:
        stages.setdefault(record["stage"], []).append(record)
    return [
        (
            f"{stage}, {len(records)} generations",
            f"{records[0]['mean']:.4f} to {records[-1]['mean']:.4f}",
        )
        for stage, records in stages.items()
    ]
