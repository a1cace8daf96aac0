"""The two files of an adapter: a readable description, and numbers as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from blackbox_vlm._files import to_json, write_atomically
from blackbox_vlm.errors import InputError, StorageError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 2

Tensors = dict[str, NDArray[np.float32]]


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write both files, each atomically.

    Raises:
        StorageError: the folder cannot be written.
    """
    contiguous = {
        name: np.asarray(array, dtype=np.float32, order="C") for name, array in tensors.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS_FILE, save(contiguous))
        write_atomically(
            folder / CONFIG_FILE, to_json({"format_version": FORMAT_VERSION, **config})
        )
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}") from error


def read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read both files.

    Raises:
        InputError: one is missing, of another version, or not what it should be.
    """
    return _read_config(folder / CONFIG_FILE), _read_weights(folder / WEIGHTS_FILE)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version!r}, this program reads "
            f"{FORMAT_VERSION}; use the program that wrote it or tune again"
        )
    return dict(config)


def _read_weights(path: Path) -> Tensors:
    try:
        tensors: Tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    for name, array in tensors.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise InputError(f"{path}: {name} is not finite float32")
    return tensors
