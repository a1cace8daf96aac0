"""A hosted endpoint as a small TOML file: its protocol, and that protocol's options.

    protocol = "zero-shot"
    url = "https://example.org/models/clip"
    model = "clip-vit-base-patch32"
    key_env = "ENDPOINT_KEY"

`protocol` names an installed backend, a third party's too; every other key is passed to it as an
option. The key itself stands in the environment or in a file of its own, never here.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blackbox_vlm.backend import Backend, backend_names, open_backend
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import quote, read_file
from blackbox_vlm.running import run_sync

SUFFIX = ".toml"
MOST_BYTES = 64 * 1024
_PATHS = ("key_file", "ca_file")  # read from the file's own folder, where they are relative


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What an endpoint file says.

    Attributes:
        protocol: the name of an installed backend.
        options: for that backend, as TOML values; paths are absolute.
    """

    protocol: str
    options: Mapping[str, Any]

    @classmethod
    def from_file(cls, path: Path) -> Endpoint:
        """Read an endpoint file.

        Raises:
            InputError: no regular file of at most `MOST_BYTES`, no TOML, or no protocol; the
                message names the file.
        """
        options = _parse(_read(path), path)
        protocol = options.pop("protocol", None)
        if not isinstance(protocol, str) or not protocol:
            got = "missing" if protocol is None else repr(protocol)[:100]
            known = ", ".join(backend_names())
            raise InputError(f"{quote(path)}: protocol is {got}; wanted one of {known}")
        if "inner" in options:  # the tests' door into a protocol, and no option
            raise InputError(f"{quote(path)}: unknown option inner; leave it out")
        for name in _PATHS:
            if isinstance(options.get(name), str):
                options[name] = str(path.absolute().parent / os.path.expanduser(options[name]))
        return cls(protocol, options)

    def open(self) -> Backend:
        """Open the backend. Sends nothing.

        Raises:
            InputError: the protocol is not installed, or refuses an option.
        """
        return open_backend(self.protocol, **self.options)

    def accepting(self, options: Mapping[str, Any]) -> Endpoint:
        """This endpoint with those of the options that its protocol takes.

        Raises:
            InputError: it cannot be opened as it is.
        """
        with closing(self.open()):
            endpoint = self
        for name, value in options.items():
            wider = Endpoint(self.protocol, {**endpoint.options, name: value})
            with suppress(InputError), closing(wider.open()):
                endpoint = wider
        return endpoint

    def to_toml(self) -> str:
        """The text of a file that `from_file` reads as this endpoint."""
        tables = {k: v for k, v in self.options.items() if isinstance(v, Mapping)}
        plain = {k: v for k, v in self.options.items() if k not in tables}
        parts = ["\n".join(_lines({"protocol": self.protocol, **plain}))]
        return "\n\n".join([*parts, *(_table(k, v) for k, v in tables.items())]) + "\n"


def open_endpoint(path: str | os.PathLike[str]) -> Backend:
    """Open the endpoint that a file describes. Sends nothing.

    Raises:
        InputError: something in the file is not what is wanted; the message names file and key.
    """
    endpoint = Endpoint.from_file(Path(path))
    try:
        return endpoint.open()
    except InputError as error:
        said = str(error)
    raise InputError(f"{quote(path)}: {said}")


@contextmanager
def closing(backend: Backend) -> Iterator[Backend]:
    """A backend that is closed at the end."""
    try:
        yield backend
    finally:
        run_sync(backend.aclose())


def _read(path: Path) -> bytes:
    data = read_file(path)
    if len(data) > MOST_BYTES:
        raise InputError(f"{quote(path)} has more than {MOST_BYTES} bytes; is it another file?")
    return data


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        said = "it is not UTF-8"
    except tomllib.TOMLDecodeError as error:
        said = str(error)
    except RecursionError:
        said = "it is nested too deep"
    raise InputError(f"{quote(path)} is no TOML: {said}; correct it")


def _table(name: str, values: Mapping[str, Any]) -> str:
    return "\n".join([f"[{_key(name)}]", *_lines(values)])


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{_key(name)} = {_value(value)}" for name, value in values.items()]


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else _value(name)


def _value(value: Any) -> str:
    """A TOML value; strings, numbers and booleans are written as in JSON."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(_lines(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
