"""Runs servers that nobody here wrote, each from an environment of its own, on the loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("INTEROP_VENVS", HERE.parents[1] / ".venv-interop"))
KEY = "sk-interop-0123456789"
KEY_ENV = "INTEROP_KEY"
HEADERS = {"Authorization": f"Bearer {KEY}", "X-API-Key": KEY}  # some guard their health, too
QUIET = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def binaries(name: str) -> Path:
    """The folder of programs of an environment; skips the test where it was not made."""
    folder = ENVIRONMENTS / name / "bin"
    if not (folder / "python").exists():
        pytest.skip(f"no environment for {name}; run make test-interop, or see the README here")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_script(name: str, script: str, *arguments: object) -> None:
    """Run one of `servers/` to its end in an environment."""
    command = [binaries(name) / "python", HERE / "servers" / script, *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@contextmanager
def running(
    command: Sequence[object],
    ready: str,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    patience: float = 180.0,
) -> Iterator[None]:
    """Run a server while the block lasts.

    Args:
        command: program and arguments.
        ready: a URL that answers 200 once the server serves.
        log: receives what it prints.
        environment: variables beside our own.
        patience: seconds that it may take to be ready.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **QUIET, **(environment or {})},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its workers are ended with it
        )
    try:
        _wait(process, ready, log, patience)
        yield
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], ready: str, log: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(ready, headers=HEADERS, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(
        f"{process.args!r} does not serve:\n{log.read_text(errors='replace')[-3000:]}"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait(10)
