"""`probe`: find out what an endpoint does, and how to declare it."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blackbox_vlm.cli_options import PATH, json_option
from blackbox_vlm.console import print_json, print_table, printable, say, usd
from blackbox_vlm.errors import InputError

if TYPE_CHECKING:
    from blackbox_vlm.endpoint import Endpoint
    from blackbox_vlm.images import Image
    from blackbox_vlm.probe import Report

PRICE_HINT = """
# No price is declared, so that --max-cost is refused. What is billed, in USD:
# [price]
# per_request = 0.001
"""


@click.command()
@click.argument("url")
@click.option("--protocol", required=True, help="An installed backend, e.g. zero-shot.")
@click.option("--model", required=True, help="What the endpoint is asked for.")
@click.option("--key-env", help="The environment variable that holds the key.")
@click.option("--key-header", help="The header that carries it.  [default: Authorization]")
@click.option(
    "--option",
    "extra",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other key of an endpoint file, e.g. timeout=20 or price.per_request=0.001. May be "
    "repeated.",
)
@click.option("--images", type=PATH, help="A folder of images to show; embedded ones, if left out.")
@click.option("--max-queries", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--out", type=PATH, help="A new folder for endpoint.toml and the ledger.")
@click.option("--yes", is_flag=True, help="Spend the queries without asking.")
@json_option
def probe(
    url: str,
    images: Path | None,
    max_queries: int,
    out: Path | None,
    yes: bool,
    as_json: bool,
    **described: Any,
) -> None:
    """Spend a few queries to find out what the endpoint at URL does.

    Prints what was found, and the endpoint file that declares it. Soft prompts are not probed, and
    neither is whether the endpoint honours idempotency keys.
    """
    from blackbox_vlm.probe import probe as ask
    from blackbox_vlm.run_directory import RunDirectory

    endpoint = _endpoint(url, **described)
    if out is not None:
        RunDirectory(out).check_free()
    shown = _images(images)
    _consent(endpoint, max_queries, shown, yes=yes)
    with _folder(out) as folder:
        report = ask(endpoint, shown, folder / "probe.sqlite", max_queries)
    declaration = report.endpoint.to_toml()
    if "price" not in report.endpoint.options:
        declaration += PRICE_HINT
    if out is not None:
        (out / "endpoint.toml").write_text(declaration, encoding="utf-8")
    _show(report, declaration, max_queries, as_json=as_json)


def _endpoint(
    url: str,
    *,
    protocol: str,
    model: str,
    key_env: str | None,
    key_header: str | None,
    extra: tuple[str, ...],
) -> Endpoint:
    """What is known about the endpoint."""
    from blackbox_vlm.endpoint import Endpoint

    given = {"url": url, "model": model, "key_env": key_env, "key_header": key_header}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for text in extra:
        _put(options, text)
    return Endpoint(protocol, options)


def _put(options: dict[str, Any], text: str) -> None:
    """Add `NAME=VALUE`; a dot in NAME leads into a table, VALUE is a TOML value or a text."""
    name, equals, value = text.partition("=")
    *tables, last = name.split(".")
    if not equals or not all([*tables, last]):
        raise InputError(f"got --option {text!r}; wanted NAME=VALUE, e.g. timeout=20")
    for table in tables:
        options = options.setdefault(table, {})
        if not isinstance(options, dict):
            raise InputError(f"got --option {text!r}, and {table} has a value already")
    try:
        options[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        options[last] = value


def _images(folder: Path | None) -> list[Image]:
    """A few readable images of a folder, spread over it."""
    from blackbox_vlm.demo import demo_folder
    from blackbox_vlm.images import Image, check_images, find_images
    from blackbox_vlm.probe import MOST_IMAGES

    root = demo_folder() / "train" if folder is None else folder
    files = find_images(root)
    step = max(1, len(files) // MOST_IMAGES)
    checked = check_images(files[::step][:MOST_IMAGES], root)
    found = {image.sha256: image for image in checked if isinstance(image, Image)}
    if not found:
        raise InputError(f"{root} holds no readable image; nothing was asked")
    return list(found.values())


def _consent(endpoint: Endpoint, max_queries: int, images: list[Image], *, yes: bool) -> None:
    """Say what it may cost at most, and ask; the declaration is checked on the way."""
    where = str(endpoint.options["url"]).split("?")[0]
    cost = usd(_most_usd(endpoint, max_queries, images))
    say(
        f"Probing {where} spends at most {max_queries} queries ({cost}) and shows it "
        f"{len(images)} images."
    )
    if yes:
        return
    if not _on_terminal():
        raise InputError("there is no terminal to ask for consent; give --yes to spend the queries")
    if not click.confirm("Go on?", err=True):
        raise InputError("not agreed; nothing was sent")


def _on_terminal() -> bool:
    return sys.stdin.isatty()


def _most_usd(endpoint: Endpoint, max_queries: int, images: list[Image]) -> float | None:
    from blackbox_vlm.backend import TextScores
    from blackbox_vlm.endpoint import closing
    from blackbox_vlm.probe import TEXTS

    with closing(endpoint.open()) as backend:
        price = backend.capabilities.price
    largest = TextScores(tuple(images), TEXTS)
    return None if price is None else max_queries * price.of(largest)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where the ledger lies; it goes with the probe unless a folder was named."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="blackbox-vlm-probe-") as temporary:
            yield Path(temporary)
        return
    from blackbox_vlm.run_directory import RunDirectory

    RunDirectory(out).make()
    yield out


def _show(report: Report, declaration: str, max_queries: int, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "findings": [dataclasses.asdict(finding) for finding in report.findings],
                "declaration": declaration,
                "queries_spent": report.queries,
                "stopped": report.stopped or None,
            }
        )
        return
    rows = [(f.about, f"{f.found} [answers: {f.queries}]") for f in report.findings]
    print_table(
        f"{report.queries} of {max_queries} queries spent",
        [*rows, ("idempotency keys", "not probed; the bill tells")],
    )
    if report.stopped:
        say(f"Stopped early: {report.stopped}")
    click.echo("\n".join(map(printable, declaration.splitlines())))
