"""How a run was asked for on the command line: enough to open its data and its endpoint again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from blackbox_vlm.backend import Backend, open_backend
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import SUFFIXES, quote
from blackbox_vlm.ledger import Lost
from blackbox_vlm.task import Task
from blackbox_vlm.tuning import Options


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of `blackbox-vlm tune`. Kept in a run's `run.json`; holds no secret."""

    data: str
    budget: int
    shots: int | None = None
    method: str | None = None
    recipe: str = "craft"
    seed: int = 0
    max_cost: float | None = None
    on_lost: Lost = "stop"
    classes: str | None = None
    template: str | None = None
    strict: bool = False
    backend: str = "local"
    model: str = "nano"
    pretrained: str | None = None
    device: str = "auto"
    access: str = "soft"
    restrict: tuple[str, ...] = ()

    @classmethod
    def from_description(cls, description: Mapping[str, Any], run: Path) -> Self:
        """Read what `to_description` wrote.

        Raises:
            InputError: the run was not started on the command line.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not {"data", "budget"} <= description.keys() <= names:
            raise InputError(
                f"{run} was not started by `blackbox-vlm tune`; go on with it where it was, "
                "with tune(..., resume=True)"
            )
        values = dict(description)
        values["restrict"] = tuple(values.get("restrict", ()))
        return cls(**values)

    def to_description(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @property
    def options(self) -> Options:
        """What `tune` is asked to do."""
        names = [field.name for field in dataclasses.fields(Options)]
        return Options(**{name: getattr(self, name) for name in names})

    def load_task(self) -> Task:
        """The training images, sampled."""
        task = load_task(
            Path(self.data),
            classes=self.classes,
            template=self.template,
            strict=self.strict,
            split="train",
        )
        return task if self.shots is None else task.sample(self.shots, self.seed)

    def open_backend(self) -> Backend:
        """The endpoint."""
        restrictions = dict(parse_restriction(text) for text in self.restrict)
        if clash := restrictions.keys() & {"model", "pretrained", "device", "access"}:
            name = min(clash)
            raise InputError(f"--restrict {name}=... is an option of its own; give --{name}")
        if self.backend != "local":
            return open_backend(self.backend, **restrictions)
        return open_backend(
            "local",
            model=self.model,
            pretrained=self.pretrained,
            device=self.device,
            access=self.access,
            **restrictions,
        )


def load_task(
    data: Path, *, classes: str | None, template: str | None, strict: bool, split: str
) -> Task:
    """Read class folders, or a CSV file."""
    if data.suffix.lower() in SUFFIXES and data.is_file():
        raise InputError(
            f"{quote(data)} is one image; wanted a folder with a sub-folder per class, or a CSV "
            "file with the columns path and label"
        )
    if data.is_file():
        return Task.from_csv(data, classes=classes, template=template, strict=strict)
    return Task.from_folder(data, classes=classes, template=template, split=split, strict=strict)


def parse_restriction(text: str) -> tuple[str, str | int | float]:
    """`NAME=VALUE`, with a number where VALUE is one.

    Raises:
        InputError: there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"got --restrict {text!r}; wanted NAME=VALUE, e.g. decimals=4")
    for convert in (int, float):
        try:
            return name, convert(value)
        except ValueError:
            continue
    return name, value
