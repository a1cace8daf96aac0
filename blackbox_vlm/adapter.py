"""The tuned artefact: what to ask the endpoint about an image, and how to read its answer.

A folder of two files: `adapter_config.json` (what it is, which model it belongs to, how it was made
and what it cost) and `adapter_model.safetensors` (its numbers). No pickle, ever.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from blackbox_vlm import _adapter_file
from blackbox_vlm._classes import check_names, check_template
from blackbox_vlm.backend import Access, Backend, Capabilities
from blackbox_vlm.batching import distinct
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.local_encoder import join_vectors, open_local_encoder
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import Floats, Logits, Question, ask
from blackbox_vlm.observe.ensemble import Ensemble, ensemble_logits
from blackbox_vlm.observe.tensors import from_tensors, to_tensors
from blackbox_vlm.running import run_sync
from blackbox_vlm.scores import centred, predicted
from blackbox_vlm.task import Classes


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
        strategy: what it deploys: "zero-shot", "prompt", "refiner", "prompt+refiner", "heads" or
            "text prompt".
        classes: class names in label order, and the template.
        model_id: the model that it belongs to; it refuses another.
        access: the access level that it asks for.
        question: what it asks about every image.
        ensemble: what makes logits of the answers.
        zero_shot: reads the endpoint's own logits off the same answers, `(K, n_classes)` float32;
            None where they would have to be asked for.
        local_encoder: spec and identity of the local model whose vectors of an image follow the
            endpoint's answers; None: nobody's.
        recipe: how it was made: every setting, the seed, the out-of-fold figures.
        cost: what it cost: queries, images, texts, USD.
    """

    strategy: str
    classes: Classes
    model_id: str
    access: Access
    question: Question
    ensemble: Ensemble
    zero_shot: Floats | None = None
    local_encoder: tuple[str, str] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)

    # -- prediction -------------------------------------------------------------------------

    def queries(self, n_images: int | Sequence[Image], capabilities: Capabilities) -> int:
        """How many queries predicting so many images costs: one per request that is sent."""
        images = _placeholders(n_images) if isinstance(n_images, int) else tuple(n_images)
        requests = self.question.requests(images, self.classes, capabilities.access)
        return len(distinct(requests, capabilities))

    def predict(self, images: Sequence[Image], backend: Backend, *, budget: int) -> Predictions:
        """Predict images. Costs one query per request, `queries(images, ...)` in all.

        Raises:
            BudgetError: it would cost more than `budget`; nothing was sent.
            InputError: the backend serves another model or another access level.
        """
        from tempfile import TemporaryDirectory

        self.check(backend.capabilities)
        with TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.sqlite", budget) as book:
            answers = run_sync(self.answers(Meter(backend, book), images, "predict"))
        return to_predictions(self.logits(answers))

    async def answers(self, meter: Meter, images: Sequence[Image], purpose: str) -> Floats:
        """What the endpoint answers to the question, asked through a meter, `(n_images, K)`."""
        shown = tuple(images)
        if not shown:
            raise InputError("there are no images to predict; give at least one")
        answers = await ask(meter, self.question, shown, self.classes, purpose)
        if self.local_encoder is None:
            return answers
        spec, model_id = self.local_encoder
        with open_local_encoder(spec) as encoder:
            encoder.check(model_id)
            return join_vectors(answers, await encoder.vectors(shown))

    def logits(self, answers: Floats) -> Logits:
        """Tuned logits `(n_images, n_classes)` float32 of answers `(n_images, K)`."""
        return ensemble_logits(self.ensemble, answers)

    def zero_shot_logits(self, answers: Floats) -> Logits | None:
        """The endpoint's own logits, where they can be read off the answers."""
        return None if self.zero_shot is None else centred(answers @ self.zero_shot)

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

    # -- storage ----------------------------------------------------------------------------

    def save_pretrained(self, folder: Path) -> None:
        """Write the two files, each atomically.

        Raises:
            StorageError: the folder cannot be written.
        """
        tensors, note = to_tensors(self.ensemble)
        if self.question.offset is not None:
            tensors["offset"] = self.question.offset
        if self.zero_shot is not None:
            tensors["zero_shot"] = self.zero_shot
        _adapter_file.write(Path(folder), {**self._config(), "ensemble": note}, tensors)

    def _config(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "class_names": list(self.classes.names),
            "template": self.classes.template,
            "model_id": self.model_id,
            "access": self.access.value,
            "lists": [list(texts) for texts in self.question.lists],
            "local_encoder": self.local_encoder,
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
        config, tensors = _adapter_file.read(path)
        try:
            adapter = cls(
                strategy=str(config["strategy"]),
                classes=_classes_of(config),
                model_id=str(config["model_id"]),
                access=Access(config["access"]),
                question=Question(_lists_of(config), tensors.pop("offset", None)),
                ensemble=from_tensors(tensors, config["ensemble"]),
                zero_shot=tensors.get("zero_shot"),
                local_encoder=_encoder_of(config),
                recipe=dict(config["recipe"]),
                cost=dict(config["cost"]),
            )
            adapter._check_shapes()
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path} is not an adapter: {error!r}") from None
        return adapter

    def _check_shapes(self) -> None:
        """Raise ValueError where question, readouts and classes do not fit together."""
        offset, lists = self.question.offset, self.question.lists
        if offset is not None and offset.ndim != 2:
            raise ValueError(f"the prompt's offset is {offset.shape}, wanted (tokens, width)")
        if offset is None and not lists and self.access is not Access.EMBEDDINGS:
            raise ValueError("there is nothing to ask about an image")
        wanted = (self._n_answers(), len(self.classes.names))
        for name, array in (("readout", self.ensemble.readout), ("zero_shot", self.zero_shot)):
            if array is not None and array.shape != wanted:
                raise ValueError(f"{name} is {array.shape}, wanted {wanted}")

    def _n_answers(self) -> int:
        """`K`, as far as the question tells it."""
        if self.access is Access.EMBEDDINGS or self.local_encoder is not None:
            return len(self.ensemble.readout)
        if self.question.offset is not None:
            return len(self.classes.names)
        return sum(len(texts) for texts in self.question.lists)


def _lists_of(config: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    lists = config["lists"]
    if not all(isinstance(text, str) for texts in lists for text in texts):
        raise TypeError("lists must hold lists of texts")
    return tuple(tuple(texts) for texts in lists)


def _classes_of(config: dict[str, Any]) -> Classes:
    names, template = config["class_names"], config["template"]
    if not isinstance(names, list) or not all(isinstance(t, str) for t in (*names, template)):
        raise TypeError("class_names must be a list of texts, and template a text")
    return Classes(check_names(names), check_template(template))


def _encoder_of(config: dict[str, Any]) -> tuple[str, str] | None:
    if config["local_encoder"] is None:
        return None
    spec, model_id = config["local_encoder"]
    return str(spec), str(model_id)


def to_predictions(logits: Logits) -> Predictions:
    """Labels and probabilities of logits `(n_images, n_classes)`."""
    return Predictions(predicted(logits), softmax(logits, axis=1))


def _placeholders(n_images: int) -> tuple[Image, ...]:
    return tuple(Image(Path(), f"{index:064x}") for index in range(n_images))
