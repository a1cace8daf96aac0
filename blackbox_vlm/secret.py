"""A key that cannot be shown by accident."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from blackbox_vlm.errors import InputError
from blackbox_vlm.images import quote

_MASK = "***"
_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,99}")
_VISIBLE = re.compile(r"[!-~]+")
_MOST_BYTES = 16 * 1024


class Secret:
    """A key whose `repr`, `str`, `format` and pickle are `***`; only `reveal` shows it.

    Raises:
        InputError: it is empty or holds anything but visible ASCII; the message does not show it.
    """

    __slots__ = ("_prefix", "_reveal")

    def __init__(self, text: str, source: str = "the key", *, prefix: str = "") -> None:
        held = _hold(text.strip())
        del text  # a traceback that shows locals must not show it
        if not _VISIBLE.fullmatch(held()):
            got = "not visible ASCII without spaces" if held() else "empty"
            raise InputError(f"{source} is {got}; put the key there, and nothing else")
        if not (prefix.isascii() and prefix.isprintable()):
            raise InputError(f"the key's prefix is {prefix!r}; wanted printable ASCII")
        self._prefix = prefix
        self._reveal = held

    @classmethod
    def from_env(cls, name: str) -> Secret:
        """Read an environment variable. Raises InputError: it is not set, no name, or no key."""
        if not _NAME.fullmatch(name):  # somebody may have put the key itself there
            raise InputError(
                "the name of the environment variable with the key is no such name (capitals, "
                "digits and _); it is not shown, in case it is the key"
            )
        if name not in os.environ:
            raise InputError(f"the environment variable {name} is not set; put the key there")
        return cls(os.environ[name], f"the environment variable {name}")

    @classmethod
    def from_file(cls, path: Path) -> Secret:
        """Read a file that nobody else may read. Raises InputError: other rights, or no key."""
        return cls(_private_text(path), quote(path))

    def reveal(self) -> str:
        """The key itself after its prefix, for the one header that carries it."""
        return self._prefix + self._reveal()

    def prefixed(self, prefix: str) -> Secret:
        """The same key as a header wants it, e.g. after `Bearer `."""
        return Secret(self._reveal(), prefix=prefix)

    def scrub(self, text: str) -> str:
        """The text without the key, also where JSON has put backslashes into it."""
        return re.sub(r"\\*".join(map(re.escape, self._reveal())), _MASK, text)

    def __repr__(self) -> str:
        return _MASK

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return _MASK

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return Secret, (_MASK,)


def _hold(text: str) -> Callable[[], str]:
    """A closure: no attribute, and no `repr` of one, shows the text."""

    def held() -> str:
        return text

    return held


def _private_text(path: Path) -> str:
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            private = _is_private(os.fstat(file.fileno()).st_mode)
            data = file.read(_MOST_BYTES) if private else b""
    except (OSError, ValueError):
        raise InputError(f"cannot read a key from {quote(path)}; wanted a small file") from None
    if not private:
        raise InputError(f"{quote(path)} is no file that only you can read; run chmod 600 on it")
    return data.decode("ascii", "replace")


def _is_private(mode: int) -> bool:
    return stat.S_ISREG(mode) and not stat.S_IMODE(mode) & 0o077
