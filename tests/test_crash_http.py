"""SIGKILL and signals over real HTTP: billed <= spent <= budget, and nothing paid is lost (row 38).

The owner and the client are processes of their own. Moments are random; the bill's length only
keeps a run from ending before its kills. The bill is a file, or the server's `/usage`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import PIL.Image
import pytest
from doubles import billed
from paid_client import Clients, Options, observe, questions

from blackbox_vlm.demo import demo_folder
from blackbox_vlm.endpoint import Endpoint
from blackbox_vlm.ledger import Ledger, Totals

COLOURS = {"red": (210, 60, 60), "green": (60, 210, 60), "blue": (60, 60, 210)}
HERE = Path(__file__).parent
KILLS = int(os.environ.get("KILLS", "20"))  # of each of four slow tests; 50 take a minute
LINE = 65  # bytes of a line on the bill


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    clients = Clients()
    yield clients
    clients.close()


@pytest.fixture(scope="module")
def tuners() -> Iterator[Clients]:
    """Clients that tune: with everything imported that a run needs."""
    tuners = Clients("blackbox_vlm.cli", "blackbox_vlm.progress", "blackbox_vlm.tuning")
    yield tuners
    tuners.close()


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    owner = Owner(tmp_path_factory.mktemp("owner"))
    yield owner
    owner.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small pictures, a class for each colour."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for index in range(6):
            pixels = np.clip(rng.normal(colour, 60, (4, 4, 3)), 0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


class Owner:
    """`paid_server.py` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        words = [sys.executable, str(HERE / "paid_server.py"), str(folder)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._url = self._process.stdout.readline().strip()

    def endpoint(self, account: str, *, ms: float, concurrency: int, honours: bool) -> Options:
        """Its declaration; answers take so many milliseconds."""
        return {
            "protocol": "zero-shot",
            "url": f"{self._url}/{account}?ms={ms:g}",
            "model": "colours",
            "concurrency": concurrency,
            "deterministic": True,
            **({"idempotency_header": "Idempotency-Key"} if honours else {}),
        }

    def bill(self, account: str) -> list[str]:
        """What was billed."""
        return billed(self._path(account))

    def billed(self, account: str) -> int:
        """How much was billed."""
        path = self._path(account)
        return path.stat().st_size // LINE if path.exists() else 0

    def _path(self, account: str) -> Path:
        return self._folder / f"{account}.bill"

    def close(self) -> None:
        self._process.communicate(timeout=30)


def check_books(path: Path, budget: int, bill: Callable[[], int]) -> Totals | None:
    """What holds after any crash; None where it came before the ledger."""
    if not path.exists() or path.stat().st_size == 0:
        assert bill() == 0
        return None
    with Ledger(path, budget) as ledger:
        totals = ledger.totals()
        assert ledger._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        rows = ledger._db.execute("SELECT count(*) FROM attempt WHERE outcome != 'refunded'")
        assert rows.fetchone()[0] == totals.queries
    assert bill() <= totals.queries <= budget
    return totals


def kill_at_random(
    clients: Clients, start: Callable[[], int], bill: Callable[[], int], rng: np.random.Generator
) -> None:
    """Start a client and kill it a few queries and milliseconds later."""
    target = bill() + int(rng.integers(0, 5))
    pid = start()
    while bill() < target and not clients.over(0.001):
        pass
    assert not clients.over(float(rng.uniform(0, 0.006))), "all was done before the kills"
    os.kill(pid, signal.SIGKILL)
    assert clients.status() == -signal.SIGKILL


def kill_and_compare(
    clients: Clients,
    owner: Owner,
    data: Path,
    folder: Path,
    *,
    honours: bool,
    in_flight: int,
    kills: int,
) -> None:
    """Kill a client many times, let it end, and compare it with one that was left alone."""
    count = (4 + in_flight // 2) * kills + 40  # more than what is asked between the kills
    budget = count if honours else count + kills * in_flight
    account = f"{folder.name}-killed"
    options = owner.endpoint(account, ms=2, concurrency=in_flight, honours=honours)
    pictures = [str(path) for path in sorted(data.glob("*/0.png"))]
    ledger, rng = folder / "ledger.sqlite", np.random.default_rng([in_flight, honours, kills])

    def start() -> int:
        return clients.start("ask", options, str(ledger), budget, pictures, count)

    def bill() -> int:
        return owner.billed(account)

    for _ in range(kills):
        kill_at_random(clients, start, bill, rng)
        check_books(ledger, budget, bill)
    start()
    assert clients.status() == 0
    totals = check_books(ledger, budget, bill)
    assert totals is not None
    if honours:
        assert totals.open == 0
        assert bill() == len(set(owner.bill(account))) == totals.queries == count
    asked, paid = questions(pictures, count), bill()
    resumed = observe(options, str(ledger), budget, asked)
    assert bill() == paid, "not everything was kept"
    alone = owner.endpoint(f"{account}-alone", ms=0, concurrency=8, honours=honours)
    np.testing.assert_array_equal(resumed, observe(alone, str(folder / "alone"), count, asked))
    assert owner.billed(f"{account}-alone") == count


def test_twenty_kills(clients: Clients, owner: Owner, data: Path, tmp_path: Path) -> None:
    kill_and_compare(clients, owner, data, tmp_path, honours=True, in_flight=8, kills=20)


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [1, 8])
@pytest.mark.parametrize("honours", [True, False], ids=["idempotent", "not idempotent"])
def test_many_kills(
    clients: Clients, owner: Owner, data: Path, tmp_path: Path, honours: bool, in_flight: int
) -> None:
    kill_and_compare(
        clients, owner, data, tmp_path, honours=honours, in_flight=in_flight, kills=KILLS
    )


class Runs:
    """Runs of `blackbox-vlm tune` on the colours, each with an account and a folder of its own."""

    def __init__(self, owner: Owner, data: Path, folder: Path, *, ms: float) -> None:
        self._owner, self._data, self._folder, self._ms = owner, data, folder, ms
        self.new("first")

    def new(self, name: str) -> None:
        """Go over to another run."""
        self.account = f"{self._folder.name}-{name}"
        self.out = self._folder / name
        options = self._owner.endpoint(self.account, ms=self._ms, concurrency=8, honours=True)
        protocol = options.pop("protocol")
        self._endpoint = self._folder / f"{name}.toml"
        self._endpoint.write_text(Endpoint(protocol, options).to_toml())

    def start(self, tuners: Clients) -> int:
        """Start it, or go on with it."""
        if (self.out / "run.json").exists():
            return tuners.start("command", "resume", str(self.out))
        words = ["--backend", self._endpoint, "--budget", 18, "--method", "refine"]
        return tuners.start("command", "tune", *map(str, [self._data, "--out", self.out, *words]))

    def bill(self) -> int:
        return self._owner.billed(self.account)

    def check(self) -> Totals | None:
        return check_books(self.out / "ledger.sqlite", 18, self.bill)

    def check_done(self) -> dict[str, bytes]:
        """Every question was paid once; returns the adapter's files."""
        totals = self.check()
        assert totals is not None
        assert (self.bill(), totals.queries, totals.open, totals.unknown) == (18, 18, 0, 0)
        result = json.loads((self.out / "result.json").read_text())
        assert result["strategy"] == "heads", "the adapter would hold no numbers"
        return {path.name: path.read_bytes() for path in (self.out / "adapter").iterdir()}


@pytest.fixture
def finished(tuners: Clients, owner: Owner, data: Path, tmp_path: Path) -> dict[str, bytes]:
    """The adapter of a run that nothing interrupted."""
    runs = Runs(owner, data, tmp_path, ms=2)
    runs.new("alone")
    runs.start(tuners)
    assert tuners.status() == 0
    return runs.check_done()


@pytest.mark.slow
def test_a_killed_run_leaves_the_same_adapter(
    tuners: Clients, owner: Owner, data: Path, tmp_path: Path, finished: dict[str, bytes]
) -> None:
    """Moments from the start to beyond the end: before the folder, asking, fitting, saving."""
    runs, rng = Runs(owner, data, tmp_path, ms=20), np.random.default_rng(0)
    kills = ends = 0
    longest = 0.1
    while kills < 20 or not ends:
        pid = runs.start(tuners)
        if not tuners.over(float(rng.uniform(0, longest))):
            with suppress(ProcessLookupError):  # it ended just now
                os.kill(pid, signal.SIGKILL)
        status = tuners.status()
        if status == 0:
            assert runs.check_done() == finished
            ends += 1
            runs.new(f"run-{ends}")
        else:
            assert status == -signal.SIGKILL
            runs.check()
            kills += 1
            longest *= 1.1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_after_what_is_in_flight(
    tuners: Clients,
    owner: Owner,
    data: Path,
    tmp_path: Path,
    finished: dict[str, bytes],
    number: signal.Signals,
) -> None:
    runs = Runs(owner, data, tmp_path, ms=200)
    pid = runs.start(tuners)
    _wait_for(lambda: runs.bill() >= 8)
    os.kill(pid, number)
    assert tuners.status() == 130
    totals = runs.check()
    assert totals is not None
    assert (totals.queries, totals.unknown, totals.open) == (runs.bill(), 0, 0)
    assert totals.queries < 18, "it went on"
    runs.start(tuners)
    assert tuners.status() == 0
    assert runs.check_done() == finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_end_at_once(
    tuners: Clients,
    owner: Owner,
    data: Path,
    tmp_path: Path,
    finished: dict[str, bytes],
    number: signal.Signals,
) -> None:
    runs = Runs(owner, data, tmp_path, ms=20_000)
    pid = runs.start(tuners)
    _wait_for(lambda: runs.bill() == 8)
    os.kill(pid, number)
    assert not tuners.over(0.1), "it did not wait for its answers"
    os.kill(pid, number)
    assert tuners.over(5), "it waited for its answers"
    assert tuners.status() == 130
    totals = runs.check()
    assert totals is not None
    assert (totals.queries, totals.unknown, totals.open) == (8, 8, 0)


def _wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, "it never came to that"
        time.sleep(0.001)


@contextmanager
def rehearsal(folder: Path) -> Iterator[Options]:
    """`serve-blackbox` in a process of its own; gives the endpoint file that it prints."""
    words = [sys.executable, "-m", "blackbox_vlm", "serve-blackbox"]
    declared = folder / "endpoint.toml"
    with declared.open("w") as output:
        server = subprocess.Popen(
            [*words, "--port", "0", "--concurrency", "64"],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        assert server.stderr is not None
        assert server.stderr.readline().startswith("Serving")
        yield tomllib.loads(declared.read_text())
    finally:
        server.terminate()
        server.communicate(timeout=30)


@pytest.mark.slow
def test_ten_kills_against_serve_blackbox(clients: Clients, tmp_path: Path) -> None:
    """The real server: `/usage` is the bill, and the model itself says what is right."""
    pictures = [str(path) for path in sorted((demo_folder() / "train").glob("*/*.png"))[:64]]
    count, rng = 64, np.random.default_rng(0)
    asked, ledger = questions(pictures, count), tmp_path / "ledger.sqlite"
    with rehearsal(tmp_path) as declared, httpx.Client(trust_env=False) as http:
        options = {**declared, "concurrency": 4}

        def start() -> int:
            return clients.start("ask", options, str(ledger), count, pictures, count)

        def bill() -> int:
            return int(http.get(f"{options['url']}/usage").json()["billed"])

        for _ in range(10):
            kill_at_random(clients, start, bill, rng)
            check_books(ledger, count, bill)
        start()
        assert clients.status() == 0
        totals = check_books(ledger, count, bill)
        assert totals is not None
        assert bill() == totals.queries == count
        resumed = observe(options, str(ledger), count, asked)
        assert bill() == count, "not everything was kept"
    local = {"protocol": "local", "model": "nano", "access": "scores"}
    right = observe(local, str(tmp_path / "local"), count, asked[::4])
    np.testing.assert_array_equal(resumed[::4], right)
