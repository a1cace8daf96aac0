"""The command `serve-blackbox`: any local model as an endpoint, to rehearse a hosted one."""

from __future__ import annotations

import signal
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from blackbox_vlm.console import say
from blackbox_vlm.errors import InputError

if TYPE_CHECKING:
    from blackbox_vlm.backend import Backend
USD = click.FloatRange(min=0)


@click.command("serve-blackbox")
@click.option(
    "--model",
    default="nano",
    show_default=True,
    help="nano, or as in tune.",
)
@click.option("--pretrained", help='Tag of its weights, e.g. "openai".')
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--access",
    type=click.Choice(["soft", "embeddings", "scores", "label"]),
    default="scores",
    show_default=True,
    help="What callers may see.",
)
@click.option(
    "--restrict", multiple=True, metavar="NAME=VALUE", help="As for tune; may be repeated."
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Others than this machine's need a token (and a proxy for TLS).",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--allow-host", multiple=True, metavar="NAME", help="A name (Host header) it is called by."
)
@click.option("--token-env", metavar="NAME", help="Environment variable with the token to ask for.")
@click.option("--price-request", type=USD, default=0.0, help="USD for each request.")
@click.option("--price-image", type=USD, default=0.0, help="USD for each image.")
@click.option("--price-text", type=USD, default=0.0, help="USD for each text.")
@click.option("--quota", metavar="N/min", help="Requests in a window: 120/min, 5/s or 1000/h.")
@click.option(
    "--quota-headers/--no-quota-headers",
    default=True,
    show_default=True,
    help="Whether answers say what is left and when to come back.",
)
@click.option("--latency", type=click.FloatRange(min=0), default=0.0, help="Milliseconds.")
@click.option(
    "--fault",
    multiple=True,
    metavar="NAME=RATE",
    help="Injected, e.g. drop=0.05. Not billed: error429, error503. Billed: error500, drop, "
    "garbage, slow. May be repeated.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of faults.")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Requests in work at the same time; one more is refused.",
)
@click.option(
    "--show-protocol",
    type=click.Choice(["blackbox", "zero-shot", "embeddings", "kserve"]),
    default="blackbox",
    show_default=True,
    help="Which of its protocols the printed endpoint file uses.",
)
def serve_blackbox(show_protocol: str, port: int, **options: Any) -> None:
    """Serve a local model as an endpoint, to rehearse a hosted one for nothing.

    Prints an endpoint file for `tune --backend`. It speaks our own protocol (see /openapi.json),
    Hugging Face zero-shot classification, OpenAI embeddings and KServe V2; /usage shows what it
    has billed.
    """
    server = _installed()
    settings = _settings(server, options)
    listening = server.bind(options["host"], port, settings)
    with listening:
        backend = _backend(options)
        url = server.url_of(listening)
        shown = server.declaration(show_protocol, url, backend.capabilities, settings)
        _show(show_protocol, shown, options["token_env"])
        say(f"Serving {backend.capabilities.model_id} at {url}; Ctrl-C stops it.")
        stopped_by = server.serve(backend, settings, listening)
    say("Stopped.")
    if stopped_by == signal.SIGINT:
        click.get_current_context().exit(130)


def _installed() -> Any:
    """The server, which needs packages that the client does without."""
    try:
        return import_module("blackbox_vlm.backends.server")
    except ImportError as error:
        raise InputError(
            f"serving needs the package {error.name}: pip install 'blackbox-vlm[serve]'"
        ) from None


def _settings(server: Any, options: dict[str, Any]) -> Any:
    from blackbox_vlm.backend import Price
    from blackbox_vlm.secret import Secret

    token, quota = options["token_env"], options["quota"]
    prices = (options[f"price_{what}"] for what in ("request", "image", "text"))
    return server.ServerSettings(
        token=None if token is None else Secret.from_env(token),
        hosts=(*server.LOOPBACK_NAMES, options["host"], *map(str.lower, options["allow_host"])),
        price=Price(*prices),
        quota=None if quota is None else server.Rate.parse(quota),
        quota_headers=options["quota_headers"],
        latency=options["latency"] / 1000,
        faults=dict(map(_fault, options["fault"])),
        seed=options["seed"],
        concurrency=options["concurrency"],
    )


def _fault(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    try:
        return name, float(rate)
    except ValueError:
        raise InputError(f"got --fault {text!r}; wanted NAME=RATE, e.g. drop=0.05") from None


def _backend(options: dict[str, Any]) -> Backend:
    from blackbox_vlm.backend import open_backend
    from blackbox_vlm.settings import parse_restrictions

    own = {name: options[name] for name in ("model", "pretrained", "device", "access")}
    return open_backend("local", **own, **parse_restrictions(options["restrict"]))


def _show(protocol: str, declared: dict[str, Any], token_env: str | None) -> None:
    from blackbox_vlm.endpoint import Endpoint

    key = {} if token_env is None else {"key_env": token_env}
    click.echo(Endpoint(protocol, {**declared, **key}).to_toml(), nl=False)
