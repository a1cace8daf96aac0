"""Clients that can be killed: each runs in a process forked from a warm interpreter.

    python paid_client.py [MODULE ...]

imports the modules, reads lines `(function, arguments)`, runs each in a child, and prints the
child's process id and, when it has ended, its status. A start, and so a kill, costs milliseconds.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from blackbox_vlm.backend import Array, Request, TextScores, open_backend
from blackbox_vlm.endpoint import closing
from blackbox_vlm.errors import BlackboxError
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.running import run_sync

Options = dict[str, Any]  # of an endpoint, with its protocol


def questions(pictures: Sequence[str], count: int) -> list[Request]:
    """So many different questions: of each picture in turn, then the same with other texts."""
    images = [Image.from_file(picture) for picture in pictures]
    rounds = range(-(-count // len(images)))
    asked = [tuple(f"question {r}, text {t}" for t in range(3)) for r in rounds]
    return [TextScores((image,), texts) for texts in asked for image in images][:count]


def observe(options: Options, ledger: str, budget: int, asked: list[Request]) -> list[Array]:
    """Ask an endpoint, inside a budget."""
    options = dict(options)
    opened = open_backend(options.pop("protocol"), **options)
    with closing(opened) as backend, Ledger(Path(ledger), budget) as books:
        meter = Meter(backend, books, on_lost="resend")
        return run_sync(meter.observe(asked, "search"))


def ask(options: Options, ledger: str, budget: int, pictures: list[str], count: int) -> None:
    """What a killed client was doing."""
    observe(options, ledger, budget, questions(pictures, count))


def command(*words: str) -> None:
    """What the command line does."""
    from blackbox_vlm.cli import main

    main(list(words))


class Clients:
    """Starts clients in processes of their own, one at a time.

    Args:
        modules: imported beforehand, once.
    """

    def __init__(self, *modules: str) -> None:
        here = Path(__file__)
        path = os.pathsep.join([str(here.parent), str(here.parent.parent)])
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
        self._python = subprocess.Popen(
            [sys.executable, str(here), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": path},
            text=True,
            bufsize=1,
        )
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        self._input, self._output = self._python.stdin, self._python.stdout

    def start(self, function: str, *arguments: object) -> int:
        """Start a function of this module and return its process id."""
        self._input.write(f"{(function, arguments)!r}\n")
        return int(self._output.readline())

    def over(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        return bool(select.select([self._output], [], [], seconds)[0])

    def status(self) -> int:
        """How it ended: its exit code, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(int(self._output.readline()))

    def close(self) -> None:
        """Close the interpreter."""
        self._input.close()
        self._python.wait(timeout=30)
        self._output.close()


def _run(function: str, arguments: tuple[Any, ...]) -> int:
    try:
        {"ask": ask, "command": command}[function](*arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except BlackboxError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


def _warm_up() -> None:
    """Do once what every client does first; reading the certificates takes longest."""
    for module in sys.argv[1:]:
        import_module(module)
    for protocol in ("zero-shot", "blackbox"):
        open_backend(protocol, url="http://127.0.0.1:1", model="any")


def _serve() -> None:
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a client prints is no report
    _warm_up()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(_run(*eval(line)))
            except BaseException:
                traceback.print_exc()
                os._exit(99)
        reports.write(f"{pid}\n")
        reports.write(f"{os.waitpid(pid, 0)[1]}\n")


if __name__ == "__main__":
    _serve()
