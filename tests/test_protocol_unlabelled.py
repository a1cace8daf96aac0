"""`tune FOLDER --unlabeled` on the remote protocols: the owner's books, an audit, and SIGKILL.

Real servers on this machine, and the embedded model behind all but the last of them.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
from paid_client import Clients
from test_cli import ok, run
from test_crash_http import COLOURS, Owner, check_books
from test_protocol_plans import DRAWINGS, SINGLE, others, ours

from blackbox_vlm import demo_folder
from blackbox_vlm.audit import RECORD_FILE, TABLE_FILE, read
from blackbox_vlm.coft.dual import DualSettings
from blackbox_vlm.coft.settings import CoftSettings
from blackbox_vlm.endpoint import Endpoint
from blackbox_vlm.ledger import Ledger

NAMES = ("building", "flower", "vehicle")
N = 18  # pictures, as many of each class


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in one folder, beside names that say what they show to nobody but the tests."""
    folder = tmp_path_factory.mktemp("photos")
    for name in NAMES:
        pictures = sorted((demo_folder() / "train" / name).iterdir())[: N // len(NAMES)]
        for at, picture in enumerate(pictures):
            shutil.copy(picture, folder / f"{at} {name}.png")
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("classes") / "classes.txt"
    file.write_text("\n".join(NAMES))
    return file


@pytest.fixture
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer trains its prompts in fewer steps."""
    quick = CoftSettings(dual=DualSettings(steps=40))
    monkeypatch.setattr("blackbox_vlm.collaboration.CoftSettings", lambda: quick)


class Case(NamedTuple):
    """A protocol: its server, in a folder for files, and the queries by purpose."""

    name: str
    serve: Callable[[Path], Any]
    purposes: dict[str, int]


CASES = [
    Case(
        "zero-shot",
        lambda _: ours("zero-shot", "scores", **SINGLE, score_kind="softmax"),
        {"observe": N, "background": DRAWINGS},
    ),
    Case(
        "embeddings",
        lambda _: ours("embeddings", "embeddings", **SINGLE),
        {"observe": N, "texts": 1},
    ),
    Case(
        "score",
        lambda folder: others("score", folder, deterministic=True, logit_scale=100.0),
        {"observe": N, "background": DRAWINGS},
    ),
    Case(
        "kserve",
        lambda _: ours("kserve", "scores", images_per_request=4),
        {"observe": -(-N // 4), "background": DRAWINGS // 4},
    ),
]


def shown_in(path: str) -> str:
    """The class of a picture."""
    return Path(path).stem.split()[1]


@pytest.mark.usefixtures("one_load", "few_drawings", "_few_steps")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_folder_without_labels(case: Case, photos: Path, classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with case.serve(tmp_path) as (endpoint, billed):
        (tmp_path / "endpoint.toml").write_text(endpoint.to_toml())
        asked = ("tune", photos, "--unlabeled", "--classes", classes, "--budget", 2000)
        words = (*asked, "--backend", tmp_path / "endpoint.toml", "--audit", N)
        plan = ok(*words, "--dry-run")
        assert billed() == 0
        tuned = ok(*words, "--out", out)
        spent = billed()
        with Ledger(out / "ledger.sqlite") as ledger:
            totals = ledger.totals()
        assert (totals.queries, totals.unknown) == (spent, 0)
        assert spent == tuned["queries_spent"] == plan["queries"]
        assert tuned["spent_by_purpose"] == case.purposes
        assert (tuned["method"], tuned["strategy"]) == ("coft", "coft")
        assert (tuned["zero_shot_accuracy"], tuned["tuned_accuracy"]) == (None, None)
        assert tuned["unlabelled"]["n_images"] == N
        assert ok("resume", out) == tuned
        assert billed() == spent
        report = audited(out)
        assert billed() == spent
        drawn = read(out)
        again = ok("predict", out, *(image.path for image in drawn.images[:4]))
    assert report["n_labelled"] == N
    assert report["after"]["share"] > report["before"]["share"]
    said = [row["label"] for row in again["predictions"]]
    assert said == [NAMES[label] for label in drawn.after[:4]]  # what was judged is what was saved


def audited(out: Path) -> Any:
    """The audit's report, once a person has filled the table in."""
    assert run("audit", out).exit_code == 2  # nothing is filled in yet
    with (out / TABLE_FILE).open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    with (out / TABLE_FILE).open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((p, shown_in(p)) for p in paths)])
    return ok("audit", out)


@pytest.mark.usefixtures("one_load", "few_drawings", "_few_steps")
def test_an_endpoint_that_names_labels_is_refused_before_it_is_asked(
    photos: Path, classes: Path, tmp_path: Path
) -> None:
    with ours("blackbox", "label", **SINGLE) as (endpoint, billed):
        (tmp_path / "endpoint.toml").write_text(endpoint.to_toml())
        words = ("tune", photos, "--unlabeled", "--classes", classes, "--budget", 2000)
        refused = run(*words, "--backend", tmp_path / "endpoint.toml", "--out", tmp_path / "run")
        assert billed() == 0
    assert refused.exit_code == 2
    assert "--local-encoder" in refused.stderr
    assert not (tmp_path / "run").exists()


# -- SIGKILL ---------------------------------------------------------------------------------------


BUDGET = 18  # a query for every picture, and none for drawings


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Small pictures of three colours, in one folder."""
    folder, rng = tmp_path / "colours", np.random.default_rng(0)
    folder.mkdir()
    for name, colour in COLOURS.items():
        for index in range(BUDGET // len(COLOURS)):
            pixels = np.clip(rng.normal(colour, 60, (4, 4, 3)), 0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{index}{name}.png")
    return folder


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    folder = tmp_path / "owner"
    folder.mkdir()
    owner = Owner(folder)
    yield owner
    owner.close()


@pytest.fixture
def tuners() -> Iterator[Clients]:
    tuners = Clients("blackbox_vlm.cli", "blackbox_vlm.progress", "blackbox_vlm.tuning")
    yield tuners
    tuners.close()


@pytest.mark.slow
def test_a_killed_run_leaves_the_same_adapter_and_pays_nothing_twice(
    tuners: Clients, owner: Owner, colours: Path, tmp_path: Path
) -> None:
    """Killed after every few answers, then while it learns."""
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(COLOURS))
    words = ("tune", colours, "--unlabeled", "--classes", names, "--budget", BUDGET, "--audit", 4)

    def start(account: str) -> int:
        out = tmp_path / account
        if (out / "run.json").exists():
            return tuners.start("command", "resume", str(out))
        options = owner.endpoint(account, ms=20, concurrency=2, honours=True)
        declared = tmp_path / f"{account}.toml"
        declared.write_text(Endpoint(options.pop("protocol"), options).to_toml())
        asked = (*words, "--backend", declared, "--out", out)
        return tuners.start("command", *map(str, asked))

    start("alone")
    assert tuners.status() == 0
    for target in (1, 9, BUDGET):
        pid = start("killed")
        while owner.billed("killed") < target:
            assert not tuners.over(0.001), "it ended before it was killed"
        os.kill(pid, signal.SIGKILL)
        assert tuners.status() == -signal.SIGKILL
        check_books(tmp_path / "killed" / "ledger.sqlite", BUDGET, lambda: owner.billed("killed"))
    start("killed")
    assert tuners.status() == 0
    totals = check_books(
        tmp_path / "killed" / "ledger.sqlite", BUDGET, lambda: owner.billed("killed")
    )
    assert totals is not None
    assert (totals.queries, totals.unknown, totals.open) == (BUDGET, 0, 0)
    assert owner.billed("killed") == owner.billed("alone") == BUDGET
    assert left(tmp_path / "killed") == left(tmp_path / "alone")


def left(out: Path) -> dict[str, bytes]:
    """What a run leaves; paths in it are made equal."""
    names = ("result.json", TABLE_FILE, RECORD_FILE)
    kept = [*(out / name for name in names), *(out / "adapter").iterdir()]
    return {path.name: path.read_bytes().replace(str(out).encode(), b"RUN") for path in kept}
