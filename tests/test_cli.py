"""The command line as a stranger meets it: JSON, exit codes, bad input, interruption, resume."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blackbox_vlm.backends.zero_shot import ZeroShot
from click.testing import CliRunner, Result

import blackbox_vlm
from blackbox_vlm import demo_folder
from blackbox_vlm.adapter import Adapter
from blackbox_vlm.cli import main
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.testing import Received, ScriptedServer
from blackbox_vlm.testing.server import message, reply

SMALL = ("--shots", "2", "--budget", "130", "--method", "craft")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def ok(*words: object) -> Any:
    """Run with --json; the one object on stdout."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three classes of the embedded images, few of each, with train and test."""
    root = tmp_path_factory.mktemp("data") / "small"
    for split in ("train", "test"):
        for folder in sorted((demo_folder() / split).iterdir())[:3]:
            (root / split / folder.name).mkdir(parents=True)
            for picture in sorted(folder.iterdir())[:4]:
                shutil.copy(picture, root / split / folder.name)
    return root


@pytest.fixture(scope="module")
def finished(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, ok("tune", small, *SMALL, "--out", out)


def test_version_and_help() -> None:
    assert blackbox_vlm.__version__ in run("--version").output
    text = run("--help").output
    commands = "tune resume evaluate predict inspect probe serve-blackbox demo"
    for command in commands.split():
        assert command in text
        assert run(command, "--help").exit_code == 0


def test_tune_says_what_it_promises(finished: tuple[Path, Any], small: Path) -> None:
    out, result = finished
    for name in ("zero_shot_accuracy", "tuned_accuracy"):
        assert 0 <= result[name] <= 1
    assert result["budget"] == 130
    assert result["queries_spent"] == result["queries_planned"] <= 130
    assert result["strategy"] in {"zero-shot", "prompt", "refiner", "prompt+refiner"}
    assert (Path(result["adapter"]) / "adapter_config.json").exists()
    plan = ok("tune", small, *SMALL, "--dry-run")
    assert plan["queries"] == result["queries_spent"]
    assert sum(step["queries"] for step in plan["steps"]) == plan["queries"]
    with Ledger(out / "ledger.sqlite") as ledger:
        assert ledger.totals().queries == result["queries_spent"]


def test_a_dry_run_leaves_nothing(small: Path, tmp_path: Path) -> None:
    result = run("tune", small, *SMALL, "--dry-run", "--out", tmp_path / "run")
    assert result.exit_code == 0
    assert "in all" in result.stdout
    assert not (tmp_path / "run").exists()


def test_evaluate_spends_from_its_own_budget(finished: tuple[Path, Any], small: Path) -> None:
    out, tuned = finished
    first = ok("evaluate", out, small)
    assert first["n_images"] == 12
    assert 0 <= first["accuracy"] <= 1
    assert 0 <= first["zero_shot_accuracy"] <= 1
    assert first["queries_spent"] == first["budget"] > 0
    assert ok("evaluate", out, small)["queries_spent"] == 0
    with Ledger(out / "ledger.sqlite") as ledger:
        assert ledger.totals().queries == tuned["queries_spent"]
    assert "from a budget of its own" in run("evaluate", out, small).stderr
    refused = run("evaluate", out, small / "train", "--budget", "0")
    assert refused.exit_code == 3
    assert "nothing was sent" in refused.stderr


def test_predict_prints_csv_or_json(finished: tuple[Path, Any], small: Path) -> None:
    out, _ = finished
    files = sorted((small / "test").rglob("*.png"))[:3]
    predicted = ok("predict", out, *files)
    assert predicted["queries_spent"] == 1
    assert [Path(row["path"]) for row in predicted["predictions"]] == files
    table = list(csv.DictReader(io.StringIO(run("predict", out, *files).stdout)))
    assert [row["label"] for row in table] == [row["label"] for row in predicted["predictions"]]
    assert run("predict", out, small / "none.png").exit_code == 2


def test_inspect_shows_where_the_queries_went(finished: tuple[Path, Any]) -> None:
    out, tuned = finished
    seen = ok("inspect", out)
    assert seen["totals"]["queries"] == tuned["queries_spent"]
    assert seen["totals"]["left"] == 130 - tuned["queries_spent"]
    assert seen["spent_by_purpose"] == tuned["spent_by_purpose"]
    assert seen["result"] == tuned
    assert seen["trajectory"][-1]["stage"] == "search"
    assert "finished" in run("inspect", out).stdout


def test_resuming_a_finished_run_is_free(finished: tuple[Path, Any]) -> None:
    out, tuned = finished
    assert ok("resume", out) == tuned


def spoil(folder: Path, what: str) -> None:
    first = sorted(folder.iterdir())[0]
    if what == "one class":
        for other in sorted(folder.iterdir())[1:]:
            shutil.rmtree(other)
    elif what == "empty class":
        (folder / "empty").mkdir()
    elif what == "broken class":
        for picture in first.iterdir():
            picture.write_bytes(b"not a picture")
    elif what == "bidi":
        first.rename(folder / "evil\u202egnp")


@pytest.mark.parametrize(
    ("spoilt", "words", "said"),
    [
        ("one class", (), "at least two"),
        ("empty class", (), "'empty'"),
        ("broken class", (), "no readable image"),
        ("bidi", (), "\\u202e"),
        ("", ("--shots", "9"), "9"),
        ("", ("--budget", "0"), "at least 1"),
        ("", ("--budget", "30", "--method", "craft"), "one generation"),
        ("", ("--restrict", "images_per_request=1", "--budget", "5"), "give --budget 6"),
        ("", ("--model", "no-such-model"), "no-such-model"),
        ("", ("--model", "ViT-B-32"), "--pretrained"),
        ("", ("--access", "scores", "--method", "craft"), "--access soft"),
        ("", ("--recipe", "magic"), "craft-paper"),
        ("", ("--template", "no place"), "{}"),
        ("", ("--restrict", "decimals"), "NAME=VALUE"),
        ("", ("--restrict", "wings=2"), "texts_per_request"),
        ("", ("--backend", "carrier-pigeon"), "local"),
        ("", ("--backend", "nowhere.toml"), "nowhere.toml"),
        ("", ("--backend", "https://example.org"), "blackbox-vlm probe URL"),
    ],
)
def test_bad_input_is_one_line_before_a_query(
    small: Path, tmp_path: Path, spoilt: str, words: tuple[str, ...], said: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small / "train", data)
    spoil(data, spoilt)
    result = run("tune", data, "--shots", 2, "--budget", 130, "--out", out, "--json", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert errors[0].isprintable()
    assert not out.exists()


def test_a_taken_folder_and_no_folder(finished: tuple[Path, Any], small: Path) -> None:
    out, _ = finished
    taken = run("tune", small, *SMALL, "--out", out)
    assert taken.exit_code == 2
    assert f"blackbox-vlm resume {out}" in taken.stderr
    for command in (("resume",), ("inspect",), ("predict", small), ("evaluate", small)):
        name, *rest = command
        assert run(name, out.parent / "nothing", *rest).exit_code == 2
    assert run("tune", small / "nothing", *SMALL).exit_code == 2


def test_broken_images_are_listed_first(small: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(small / "train", data)
    bad = sorted(data.iterdir())[0] / "aaa.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n")
    words = ("--shots", 2, "--budget", 5, "--method", "refine")
    result = run("tune", data, *words, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "Skipped" in result.stderr
    assert "aaa.png" in result.stderr
    strict = run("tune", data, *words, "--strict", "--out", tmp_path / "strict")
    assert strict.exit_code == 2
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("access", "restrict"),
    [
        ("soft", ["images_per_request=4"]),
        ("scores", ["score_kind=softmax", "decimals=3", "images_per_request=1"]),
        ("scores", ["score_kind=softmax", "texts_per_request=2", "top_k=1"]),
        ("scores", ["score_kind=sigmoid", "noise=0.1"]),
        ("embeddings", ["images_per_request=2"]),
        ("label", []),
    ],
)
def test_every_access_level_tunes_and_evaluates(
    small: Path, tmp_path: Path, access: str, restrict: list[str]
) -> None:
    limits = [word for limit in restrict for word in ("--restrict", limit)]
    words = ("tune", small, "--shots", 2, "--budget", 300, "--access", access, *limits)
    plan = ok(*words, "--method", "refine", "--dry-run")
    tuned = ok(*words, "--method", "refine", "--out", tmp_path / "run")
    assert plan["queries"] == tuned["queries_spent"]
    assert ok("evaluate", tmp_path / "run", small)["n_images"] == 12


@pytest.mark.parametrize(
    ("access", "method", "strategies"),
    [
        ("soft", None, {"heads", "prompt", "refiner", "prompt+refiner"}),
        ("soft", "craft", {"prompt", "refiner", "prompt+refiner", "zero-shot"}),
        ("scores", None, {"heads"}),
        ("scores", "refine", {"heads", "zero-shot"}),
        ("scores", "kernel", {"heads", "zero-shot"}),
        ("embeddings", None, {"heads"}),
        ("embeddings", "prompts", {"text prompt", "text prompts", "zero-shot"}),
        ("label", None, {"heads", "zero-shot"}),
        ("label", "prompts", {"text prompt", "text prompts", "zero-shot"}),
    ],
)
def test_an_adapter_of_every_strategy_serves_whoever_loads_it(
    one_load: None,
    few_drawings: int,
    small: Path,
    tmp_path: Path,
    access: str,
    method: str | None,
    strategies: set[str],
) -> None:
    """Tuned in one command, used in others; what they spend is what tuning said."""
    chosen = () if method is None else ("--method", method)
    words = ("tune", small, "--shots", 4, "--budget", 170, "--access", access, *chosen)
    limits = ("--restrict", "images_per_request=6")
    tuned = ok(*words, *limits, "--out", tmp_path / "run")
    assert tuned["strategy"] in strategies
    evaluated = ok("evaluate", tmp_path / "run", small)
    assert evaluated["strategy"] == tuned["strategy"]
    files = sorted((small / "test").rglob("*.png"))
    predicted = ok("predict", tmp_path / "run", *files)
    assert (
        predicted["queries_spent"] == 2 * tuned["queries_per_image"]
    )  # twelve images, six in each
    right = [Path(row["path"]).parent.name == row["label"] for row in predicted["predictions"]]
    assert sum(right) / len(files) == evaluated["accuracy"]
    assert (evaluated["queries_spent"] == predicted["queries_spent"]) == _reads_zero_shot(tmp_path)


def _reads_zero_shot(folder: Path) -> bool:
    """Whether the endpoint's own prediction is read off the answers that the adapter asks for."""
    return Adapter.from_pretrained(folder / "run" / "adapter").zero_shot is not None


# -- a hosted endpoint --------------------------------------------------------------------------


def hosted(received: Received) -> list[bytes]:
    """A zero-shot endpoint whose scores depend on the picture and the text alone."""
    body = json.loads(received.body)
    rows = []
    for label in body["parameters"]["candidate_labels"]:
        digest = hashlib.sha256(f"{body['inputs']} {label}".encode()).digest()
        rows.append({"label": label, "score": 0.01 + digest[0] / 256})
    total = sum(row["score"] for row in rows)
    return [message(json.dumps([{**row, "score": row["score"] / total} for row in rows]).encode())]


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An endpoint file in the current folder."""
    monkeypatch.setenv("HOSTED_KEY", "s3cret")
    monkeypatch.chdir(tmp_path)
    with ScriptedServer(hosted) as server:
        Path("hosted.toml").write_text(
            f'protocol = "zero-shot"\nurl = "{server.url}"\nmodel = "clip"\n'
            'key_env = "HOSTED_KEY"\ndeterministic = true\n'
        )
        yield Path("hosted.toml")


def test_an_endpoint_file_is_all_that_a_run_needs(
    small: Path, endpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ZeroShot] = []
    aclose = ZeroShot.aclose

    async def watched(self: ZeroShot) -> None:
        closed.append(self)
        await aclose(self)

    monkeypatch.setattr(ZeroShot, "aclose", watched)
    words = ("tune", small, "--shots", 2, "--budget", 20, "--backend", endpoint)
    plan = ok(*words, "--dry-run")
    assert plan["usd"] is None
    assert "price unknown" in run(*words, "--dry-run").stdout
    tuned = ok(*words)
    out = tmp_path / "runs" / "small-hosted-0"
    assert tuned["queries_spent"] == plan["queries"] == 18
    assert tuned["spent_by_purpose"] == {"observe": 6, "views": 12}
    assert json.loads((out / "run.json").read_text())["backend"] == str(tmp_path / "hosted.toml")
    monkeypatch.chdir("/")
    assert {**ok("resume", out), "adapter": tuned["adapter"]} == tuned
    assert ok("evaluate", out, small)["queries_spent"] == 12
    assert ok("predict", out, small / "test")["queries_spent"] == 12
    [picture] = [*small.rglob("*.png")][:1]
    assert "takes 1 query," in run("predict", out, picture).stderr
    assert len(closed) == len(set(map(id, closed))) == 7
    assert "none declared" in run("inspect", out).stdout
    assert not [
        path for path in out.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()
    ]


def test_money_is_not_spent_at_an_unknown_price(small: Path, endpoint: Path) -> None:
    words = ("tune", small, "--shots", 2, "--budget", 20, "--backend", endpoint)
    refused = run(*words, "--max-cost", 1, "--out", "run")
    assert refused.exit_code == 2
    assert "price" in refused.stderr
    assert not Path("run").exists()
    unpriced = endpoint.read_text()
    endpoint.write_text(unpriced + "[price]\nper_million_tokens = 5.0\n")
    refused = run(*words, "--max-cost", 1, "--out", "run")  # of how many tokens, at most?
    assert (refused.exit_code, "most_tokens" in refused.stderr) == (2, True)
    endpoint.write_text(unpriced + "[price]\nper_request = 0.5\n")
    assert run(*words, "--max-cost", 2, "--out", "run").exit_code == 2
    assert not Path("run").exists()
    fitted = run(*words, "--max-cost", 8, "--dry-run", "--json")
    assert json.loads(fitted.stdout)["usd"] == 3  # the pass over six images, without their views
    assert ok(*words, "--max-cost", 9, "--out", "run")["cost_usd"] == 9
    assert "9 USD" in run("inspect", "run").stdout


def test_options_of_the_local_black_box_are_refused_beside_a_file(
    small: Path, endpoint: Path
) -> None:
    words = ("tune", small, "--budget", 20, "--backend", endpoint, "--out", "run")
    for more in (("--model", "nano"), ("--access", "soft"), ("--restrict", "decimals=4")):
        refused = run(*words, *more)
        assert refused.exit_code == 2
        assert f"{more[0]} is for the local backend" in refused.stderr


def test_an_empty_account_has_its_exit_code(small: Path, endpoint: Path) -> None:
    with ScriptedServer(reply(b'{"error": "pay"}', 402)) as server:
        lines = endpoint.read_text().splitlines()
        lines[1] = f'url = "{server.url}"'
        endpoint.write_text("\n".join(lines))
        words = ("tune", small, "--budget", 20, "--backend", endpoint, "--out", "run")
        assert run(*words).exit_code == 7


def test_a_failure_says_how_to_go_on(small: Path, endpoint: Path) -> None:
    words = ("tune", small, "--budget", 20, "--backend", endpoint, "--out", "run")
    with ScriptedServer(reply(b"sorry", 500)) as server:
        described = endpoint.read_text()
        endpoint.write_text(re.sub('url = ".*"', f'url = "{server.url}"', described))
        failed = run(*words)
    said = failed.stderr.splitlines()
    assert failed.exit_code == 4
    assert "answered 500" in said[-2]
    assert said[-1] == "Go on with: blackbox-vlm resume run"


def test_what_cannot_go_on_is_not_told_to(small: Path, endpoint: Path) -> None:
    words = ("tune", small, "--budget", 20, "--backend", endpoint, "--out")
    nowhere = run(*words, endpoint / "run")  # below a file: there is no run
    assert nowhere.exit_code == 6
    ok(*words, "run", "--shots", 2)
    with endpoint.open("a") as file:
        file.write("timeout = 5\nmax_image_side = 32\n")
    another = run("resume", "run")  # it would be refused again
    assert another.exit_code == 2
    for refused in (nowhere, another):
        assert "Go on with" not in refused.stderr


def test_a_protocol_by_its_name_is_told_of_the_endpoint_file(small: Path) -> None:
    refused = run("tune", small, "--budget", 20, "--backend", "zero-shot", "--dry-run")
    assert refused.exit_code == 2
    assert "lacks url" in refused.stderr
    assert "--backend endpoint.toml" in refused.stderr


@pytest.mark.slow
def test_the_readme_wraps_an_endpoint_in_ten_lines(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a new user would, against the server in another process."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    [wrapped] = re.findall(r"```toml\n(.*?)```", readme, flags=re.DOTALL)
    [served] = re.findall(r"^ENDPOINT_KEY=(\w+) blackbox-vlm (serve-blackbox .*)$", readme, re.M)
    [exported] = re.findall(r"^export ENDPOINT_KEY=(\w+)$", readme, re.M)
    assert len(wrapped.splitlines()) < 10
    monkeypatch.setenv("ENDPOINT_KEY", exported)
    with start(*served[1].split(), "--port", "0", ENDPOINT_KEY=served[0]) as server:
        assert server.stdout is not None
        try:
            printed = [next(server.stdout) for _ in range(3)]
            [port] = re.findall(r":(\d+)", "".join(printed))
            (tmp_path / "endpoint.toml").write_text(wrapped.replace(":8000/", f":{port}/"))
            words = ("--shots", 2, "--budget", 20, "--max-cost", 1, "--out", tmp_path / "run")
            tuned = ok("tune", small, "--backend", tmp_path / "endpoint.toml", *words)
            evaluated = ok("evaluate", tmp_path / "run", small)
        finally:
            server.send_signal(signal.SIGINT)
            _, said = server.communicate()
    assert server.returncode == 130
    assert said.splitlines()[-1] == "Stopped."
    assert tuned["cost_usd"] == pytest.approx(0.001 * tuned["queries_spent"])
    assert tuned["zero_shot_accuracy"] > 0.5  # the model's own predictions, through HTTP
    assert evaluated["n_images"] == 12


def test_a_reader_that_has_enough_is_no_error(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    with start("inspect", out, "--json") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "blackbox_vlm", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def wait_for_queries(process: subprocess.Popen[str], run: Path, count: int) -> None:
    """Until the run has spent so many queries."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "ledger.sqlite").exists() and (run / "run.json").exists():
            try:
                with Ledger(run / "ledger.sqlite") as ledger:
                    if ledger.spent() >= count:
                        return
            except blackbox_vlm.BlackboxError:
                pass  # it is being made
        time.sleep(0.02)
    raise AssertionError(f"ended early: {process.communicate()}")


def outcome(run: Path) -> dict[str, bytes]:
    kept = [run / "result.json", *sorted((run / "adapter").iterdir())]
    return {path.name: path.read_bytes().replace(str(run).encode(), b"RUN") for path in kept}


LONG = ("--shots", "4", "--budget", "2000", "--method", "craft")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_ended_resumes_to_the_same_bytes(
    small: Path, tmp_path: Path, number: int
) -> None:
    with start("tune", small, *LONG, "--out", tmp_path / "whole") as whole:
        whole.communicate()
    assert whole.returncode == 0
    out = tmp_path / "run"
    words: tuple[object, ...] = ("tune", small, *LONG, "--out", out)
    for count in (100, 700):
        with start(*words) as process:
            wait_for_queries(process, out, count)
            process.send_signal(number)
            _, errors = process.communicate()
        words = ("resume", out)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130, errors
            assert f"blackbox-vlm resume {out}" in errors
        with Ledger(out / "ledger.sqlite") as ledger:
            assert ledger.totals().queries <= 2000
    with start(*words, "--json") as last:
        stdout, errors = last.communicate()
    assert last.returncode == 0, errors
    assert json.loads(stdout)["queries_spent"] <= 2000
    assert outcome(out) == outcome(tmp_path / "whole")
