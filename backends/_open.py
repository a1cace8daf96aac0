"""Opens open_clip models: by name and tag, from a hub, from a folder, or the embedded one.

open_clip reports through the root logger and falls back on random weights; a hub that cannot be
reached keeps it waiting for most of a minute. Here it is quiet, bounded, and weights are a must.
"""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL.Image import Image
from torch import Tensor, nn

from blackbox_vlm.errors import InputError

from ._torchvision import ensure_torchvision

EMBEDDED = "nano"
HUB = "hf-hub:"
FOLDER = "local-dir:"
PROBE_SECONDS = 3.0
HOW_TO_LIST = "python -c 'import open_clip; print(open_clip.list_pretrained())' lists all"


@dataclass(frozen=True, slots=True)
class Opened:
    """A model in evaluation mode on the CPU, and what belongs to it.

    Attributes:
        label: "model@weights", as people would name it; holds no path.
        preprocess: PIL image -> (3, height, width) float32.
        tokenize: texts (and optionally context_length) -> (n, context_length) int64.
    """

    label: str
    model: nn.Module
    preprocess: Callable[[Image], Tensor]
    tokenize: Any  # open_clip's tokenizers share no base class


def open_model(model: str, pretrained: str | None) -> Opened:
    """Open a model with its weights.

    Raises:
        InputError: there is no such model, tag or folder, or its weights cannot be had.
    """
    ensure_torchvision()
    with ExitStack() as stack:
        if model == EMBEDDED:
            folder = files("blackbox_vlm") / "models" / "nano-dual"
            path = stack.enter_context(as_file(folder))
            return _create(FOLDER + str(path), None, f"{EMBEDDED}@embedded")
        if model.startswith(HUB):
            return _create(model, None, f"{model}@hub")
        path = Path(model.removeprefix(FOLDER)).expanduser()
        if path.is_dir() or model.startswith(FOLDER):
            _check_folder(path)
            return _create(FOLDER + str(path), None, f"{path.resolve().name}@folder")
    tag = _check_name(model, pretrained)
    shown = Path(tag).name if Path(tag).is_file() else tag
    return _create(model, tag, f"{model}@{shown}")


def _check_folder(path: Path) -> None:
    if not (path / "open_clip_config.json").is_file():
        raise InputError(
            f"no open_clip_config.json in {str(path)!r}; wanted a folder as open_clip saves it "
            "(the config and open_clip_model.safetensors), an open_clip name, or 'nano'"
        )


def _check_name(model: str, pretrained: str | None) -> str:
    """The tag of the weights, for a name and a tag that open_clip knows."""
    import open_clip

    names = open_clip.list_models()
    if model.replace("/", "-") not in names:
        raise InputError(
            f"unknown model {model!r}{_near(model, [EMBEDDED, *names])}; {HOW_TO_LIST}"
        )
    tags = open_clip.list_pretrained_tags_by_model(model.replace("/", "-"))
    listed = ", ".join(tags) or "none; give a file of weights"
    if pretrained is None:
        raise InputError(f"{model} needs weights: give --pretrained TAG (known tags: {listed})")
    if pretrained not in tags and not Path(pretrained).is_file():
        near = _near(pretrained, tags)
        raise InputError(f"{model} has no weights {pretrained!r}{near}; known tags: {listed}")
    return pretrained


def _near(wanted: str, known: list[str]) -> str:
    lower = {name.lower(): name for name in known}
    near = [lower[name] for name in get_close_matches(wanted.lower(), lower, n=4)]
    return f", did you mean {' or '.join(near)}?" if near else ""


def _create(name: str, pretrained: str | None, label: str) -> Opened:
    import open_clip

    try:
        with _quiet(), nullcontext() if name.startswith(FOLDER) else _bounded():
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=pretrained, require_pretrained=True
            )
            tokenize = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and the hub's client raise many kinds
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"cannot load {label}: {reason}. {_advice(name)}") from None
    return Opened(label, model.eval(), preprocess, tokenize)


def _advice(name: str) -> str:
    if name.startswith(FOLDER):
        return "Wanted a folder in open_clip's format with its weights."
    return (
        "Its weights come from a model hub: connect, set HF_HOME to a folder that holds a cached "
        "copy, give a local folder in open_clip's format, or use the embedded model (--model nano)"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's messages, which go to the root logger, from being shown."""
    root, before = logging.getLogger(), logging.root.manager.disable
    handler = logging.NullHandler()  # without any handler, logging.warning() would install one
    root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(handler)


@contextmanager
def _bounded() -> Iterator[None]:
    """Use only the cache while the hub cannot be reached, instead of retrying for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not urllib.request.getproxies():
        constants.HF_HUB_OFFLINE = not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False
