"""The tuned artefact: what to ask the endpoint, and how to refine what it answers.

A folder of two files: `adapter_config.json` (what it is, which model it belongs to, how it was made
and what it cost) and `adapter_model.safetensors` (its numbers). No pickle, ever.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.special import softmax

from blackbox_vlm._classes import check_names, check_template
from blackbox_vlm.backend import Access, Backend, Capabilities, Request
from blackbox_vlm.batching import distinct
from blackbox_vlm.craft.guard import Strategy
from blackbox_vlm.errors import InputError, StorageError
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import (
    Logits,
    plain_logits,
    plain_requests,
    prompt_logits,
    prompt_requests,
)
from blackbox_vlm.running import run_sync
from blackbox_vlm.scores import predicted
from blackbox_vlm.task import Classes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1
REFINER_NAMES = ("hidden_weight", "hidden_bias", "output_weight", "output_bias")


class Predictions(NamedTuple):
    """Predictions for images, in their order.

    Attributes:
        labels: index of the predicted class, `(n_images,)` int64; `NO_LABEL` where the endpoint
            prefers none.
        probabilities: `(n_images, n_classes)` float32; rows sum to 1.
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Adapter:
    """A tuned adapter. Make one with `tune`, or load one with `from_pretrained`.

    Attributes:
        strategy: which modules it deploys.
        classes: class names in label order, and the template.
        model_id: the model that it belongs to; it refuses another.
        access: the access level that it asks for.
        offset: `A z` of the deployed prompt, `(context_tokens, width)` float32, or None.
        refiner: the four tensors of `g`, or None.
        recipe: how it was made: every setting, the seed, the out-of-fold figures.
        cost: what it cost: queries, images, texts, USD.
    """

    strategy: Strategy
    classes: Classes
    model_id: str
    access: Access
    offset: NDArray[np.float32] | None = None
    refiner: dict[str, NDArray[np.float32]] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)

    # -- prediction -------------------------------------------------------------------------

    def queries(self, n_images: int | Sequence[Image], capabilities: Capabilities) -> int:
        """How many queries predicting so many images costs: one per request that is sent."""
        images = _placeholders(n_images) if isinstance(n_images, int) else tuple(n_images)
        return len(distinct(self._requests(images, capabilities), capabilities))

    def predict(self, images: Sequence[Image], backend: Backend, *, budget: int) -> Predictions:
        """Predict images. Costs one query per request, `queries(images, ...)` in all.

        Raises:
            BudgetError: it would cost more than `budget`; nothing was sent.
            InputError: the backend serves another model or another access level.
        """
        from tempfile import TemporaryDirectory

        self.check(backend.capabilities)
        with TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.sqlite", budget) as book:
            logits = run_sync(self.logits(Meter(backend, book), images, "predict"))
        return to_predictions(logits)

    async def logits(self, meter: Meter, images: Sequence[Image], purpose: str) -> Logits:
        """Refined logits of images, `(n_images, n_classes)` float32, asked through a meter."""
        shown = tuple(images)
        if not shown:
            raise InputError("there are no images to predict; give at least one")
        if self.offset is not None and self.strategy.uses_prompt:
            offsets = self.offset[None]
            plain = (await prompt_logits(meter, shown, self.classes, offsets, purpose))[0]
        else:
            plain = await plain_logits(meter, shown, self.classes, purpose)
        return self.refined(plain)

    def refined(self, logits: Logits) -> Logits:
        """`Y_O` of centred logits `Y_I` `(n_images, n_classes)`; without a refiner, `Y_I`."""
        if self.refiner is None or not self.strategy.uses_refiner:
            return logits
        g = self.refiner
        hidden = np.maximum(logits @ g["hidden_weight"].T + g["hidden_bias"], 0)
        refined: Logits = logits + hidden @ g["output_weight"].T + g["output_bias"]
        return refined

    def check(self, capabilities: Capabilities) -> None:
        """Refuse a backend that this adapter was not tuned for.

        Raises:
            InputError: another model, or an access level that cannot serve the strategy.
        """
        if capabilities.model_id != self.model_id:
            raise InputError(
                f"this adapter belongs to {self.model_id!r}, the backend serves "
                f"{capabilities.model_id!r}; use that model or tune again"
            )
        if capabilities.access is not self.access:
            raise InputError(
                f"this adapter asks for {self.access.value!r} access, the backend gives "
                f"{capabilities.access.value!r}; open it with that access"
            )

    def _requests(self, images: tuple[Image, ...], capabilities: Capabilities) -> list[Request]:
        if self.offset is not None and self.strategy.uses_prompt:
            return prompt_requests(images, self.classes, self.offset[None])
        return plain_requests(capabilities, images, self.classes)

    # -- storage ----------------------------------------------------------------------------

    def save_pretrained(self, folder: Path) -> None:
        """Write the two files, each atomically.

        Raises:
            StorageError: the folder cannot be written.
        """
        folder = Path(folder)
        tensors = {} if self.offset is None else {"offset": self.offset}
        tensors |= {f"refiner.{name}": array for name, array in (self.refiner or {}).items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / WEIGHTS_FILE, save(_contiguous(tensors)))
            write_atomically(folder / CONFIG_FILE, to_json(self._config()))
        except OSError as error:
            raise StorageError(f"cannot write {folder}: {error.strerror}") from error

    def _config(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "strategy": self.strategy.value,
            "class_names": list(self.classes.names),
            "template": self.classes.template,
            "model_id": self.model_id,
            "access": self.access.value,
            "recipe": self.recipe,
            "cost": self.cost,
        }

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Read an adapter and check that its parts fit together.

        Raises:
            InputError: a file is missing, of another version, or its contents do not fit.
        """
        path = Path(folder)
        config, tensors = _read_config(path), _read_weights(path)
        try:
            adapter = cls(
                strategy=Strategy(config["strategy"]),
                classes=_classes_of(config),
                model_id=str(config["model_id"]),
                access=Access(config["access"]),
                offset=tensors.pop("offset", None),
                refiner={name.removeprefix("refiner."): a for name, a in tensors.items()} or None,
                recipe=dict(config["recipe"]),
                cost=dict(config["cost"]),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path / CONFIG_FILE} is not an adapter: {error!r}") from None
        adapter._check_shapes(path)
        return adapter

    def _check_shapes(self, path: Path) -> None:
        n_classes = len(self.classes.names)
        problem = None
        if self.strategy.uses_prompt and (self.offset is None or self.offset.ndim != 2):
            problem = "its strategy deploys a prompt, and there is none of shape (tokens, width)"
        if self.strategy.uses_refiner:
            problem = problem or _refiner_problem(self.refiner, n_classes)
        if problem:
            raise InputError(f"{path / WEIGHTS_FILE} does not fit its config: {problem}")


def _classes_of(config: dict[str, Any]) -> Classes:
    names, template = config["class_names"], config["template"]
    if not isinstance(names, list) or not all(isinstance(t, str) for t in (*names, template)):
        raise TypeError("class_names must be a list of texts, and template a text")
    return Classes(check_names(names), check_template(template))


def _refiner_problem(refiner: dict[str, NDArray[np.float32]] | None, n_classes: int) -> str | None:
    if refiner is None or set(refiner) != set(REFINER_NAMES):
        return f"wanted the refiner's tensors {', '.join(REFINER_NAMES)}"
    hidden = refiner["hidden_bias"].shape[0]
    shapes = ((hidden, n_classes), (hidden,), (n_classes, hidden), (n_classes,))
    for name, shape in zip(REFINER_NAMES, shapes, strict=True):
        if refiner[name].shape != shape:
            return f"refiner.{name} is {refiner[name].shape}, wanted {shape}"
    return None


def to_predictions(logits: Logits) -> Predictions:
    """Labels and probabilities of logits `(n_images, n_classes)`."""
    return Predictions(predicted(logits), softmax(logits, axis=1))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, even after a crash."""
    partial = path.with_name(path.name + ".partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def to_json(value: Any) -> bytes:
    """Readable JSON, in ASCII, without NaN."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _placeholders(n_images: int) -> tuple[Image, ...]:
    return tuple(Image(Path(), f"{index:064x}") for index in range(n_images))


def _contiguous(tensors: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in tensors.items()}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path / CONFIG_FILE}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path / CONFIG_FILE} is not JSON: {error}") from None
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path / CONFIG_FILE} has format version {version!r}, this program reads "
            f"{FORMAT_VERSION}; use the program that wrote it or tune again"
        )
    return dict(config)


def _read_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    try:
        tensors: dict[str, NDArray[np.float32]] = load_file(path / WEIGHTS_FILE)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"cannot read {path / WEIGHTS_FILE}: {error}") from None
    for name, array in tensors.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise InputError(f"{path / WEIGHTS_FILE}: {name} is not finite float32")
    return tensors
