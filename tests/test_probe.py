"""The probe against endpoints whose habits are known: it finds them, and never costs more."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result
from doubles import LinearWorld, declare, images

from blackbox_vlm import commands_probe
from blackbox_vlm.backend import ScoreKind, TextScores
from blackbox_vlm.cli import main
from blackbox_vlm.endpoint import Endpoint, open_endpoint
from blackbox_vlm.errors import AuthError, BackendError, InputError
from blackbox_vlm.evidence import Seen, as_written, decimals, score_kind
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.probe import MAX_QUERIES, NO_MODEL, TEXTS, Report, probe
from blackbox_vlm.running import run_sync
from blackbox_vlm.testing import Received, ScriptedServer
from blackbox_vlm.testing.server import message
from blackbox_vlm.witness import Witness

Floats = Any


class Habits:
    """A hosted endpoint in the shapes of four protocols, told apart by its path.

    Scores are made of cosines like CLIP's: 0.15 to 0.25, and 0.1 more for the first text.
    """

    def __init__(self, **habits: Any) -> None:
        self.kind: str = habits.pop("kind", "softmax")
        self.decimals: int | None = habits.pop("decimals", None)
        self.most_texts: float = habits.pop("most_texts", math.inf)
        self.most_images: float = habits.pop("most_images", math.inf)
        self.too_many: int = habits.pop("too_many", 422)
        self.order: str = habits.pop("order", "score")
        self.noise: float = habits.pop("noise", 0.0)
        self.calls_itself: str | None = habits.pop("calls_itself", None)
        self.models: tuple[str, ...] | None = habits.pop("models", None)
        self.mixed_up: bool = habits.pop("mixed_up", False)
        self.says: str | None = habits.pop("says", None)
        self.headers: dict[str, str] = habits.pop("headers", {})
        self.statuses: dict[int, int] = habits.pop("statuses", {})  # of the n-th request
        assert not habits
        self.asked = 0

    def __call__(self, received: Received) -> list[bytes]:
        self.asked += 1
        status = self.statuses.get(self.asked, 200)
        if status != 200:
            return [message(b'{"error": "as scripted"}', status)]
        route = received.path.split("?")[0].split("/")[1]
        body = json.loads(received.body)
        named = body.get("model", received.path.split("/")[3] if route == "v2" else "")
        if self.models is not None and named not in self.models:
            return [message(b'{"error": "no such model"}', 404)]
        answer = {"hf": self.hf, "v2": self.v2, "score": self.score, "embed": self.embed}.get(
            route, self.chat
        )(body)
        if answer is None:
            return [message(b'{"error": "too many"}', self.too_many)]
        return [message(json.dumps(answer).encode(), 200, self.headers)]

    def hf(self, body: Any) -> Any:
        texts = body["parameters"]["candidate_labels"]
        if len(texts) > self.most_texts:
            return None
        scores = self.scores([body["inputs"]], texts)[0].tolist()
        rows = [{"label": t, "score": s} for t, s in zip(texts, scores, strict=True)]
        keys: dict[str, Callable[[Any], Any]] = {
            "score": lambda row: -row["score"],
            "sent": lambda row: 0,
            "name": lambda row: row["label"][::-1],
        }
        return sorted(rows, key=keys[self.order])

    def v2(self, body: Any) -> Any:
        pictures, texts = (tensor["data"] for tensor in body["inputs"])
        if len(texts) > self.most_texts or len(pictures) > self.most_images:
            return None
        scores = self.scores(pictures, texts)
        if self.mixed_up:
            scores = scores[::-1]
        output = {"name": "logits", "datatype": "FP32", "shape": [*scores.shape]}
        data = scores.ravel().tolist()
        return {"model_name": self.calls_itself or "clip", "outputs": [{**output, "data": data}]}

    def score(self, body: Any) -> Any:
        picture = body["queries"]["content"][0]["image_url"]["url"]
        if len(body["documents"]) > self.most_texts:
            return None
        scores = self.scores([picture], body["documents"])[0].tolist()
        rows = [{"index": index, "score": score} for index, score in enumerate(scores)]
        return {"model": self.calls_itself or body["model"], "data": rows}

    def embed(self, body: Any) -> Any:
        if "input" not in body:  # Titan's dialect, one at a time
            return {"embedding": self.vector(body.get("inputText", "an image")).tolist()}
        shown = [item.startswith("data:") for item in body["input"]]
        if len(shown) > (self.most_images if any(shown) else self.most_texts):
            return None
        vectors = [self.vector(item) for item in body["input"]]
        rows = [{"index": i, "embedding": v.tolist()} for i, v in enumerate(vectors)]
        return {"model": self.calls_itself or body["model"], "data": rows}

    def chat(self, body: Any) -> Any:
        text = "a photo of a bird" if self.asked % 2 else self.says or "a photo of a bird"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        return {"model": body["model"], "choices": [{**choice, "finish_reason": "stop"}]}

    def scores(self, pictures: list[str], texts: list[str]) -> Floats:
        cosines = np.array([[self.cosine(p, t) for t in texts] for p in pictures])
        logits = 100 * cosines + self.noise * self.asked
        powers = np.exp(logits)
        shown = {
            "softmax": powers / powers.sum(axis=1, keepdims=True),
            "sigmoid": 1 / (1 + np.exp(31 - logits)),
            "cosine": logits / 100,
            "low cosine": logits / 100 - 0.2,
            "logits": logits,
        }[self.kind]
        return shown if self.decimals is None else np.round(shown, self.decimals)

    def cosine(self, picture: str, text: str) -> float:
        digest = hashlib.sha256(f"{picture} {text}".encode()).digest()
        chance = int.from_bytes(digest[:6], "little") / 2**48
        return 0.15 + 0.1 * chance + 0.1 * (text == TEXTS[0])

    def vector(self, item: str) -> Floats:
        seed = int.from_bytes(hashlib.sha256(item.encode()).digest()[:4], "little")
        vector = np.random.default_rng(seed).standard_normal(12)
        return vector / np.linalg.norm(vector) + self.noise * self.asked


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, ...]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in range(8):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{name}.png")
    return tuple(Image.from_file(path) for path in sorted(folder.iterdir()))


Probe = Callable[..., Report]
ROUTES = {"zero-shot": "hf", "kserve": "", "score": "score", "embeddings": "embed", "chat": "chat"}


@pytest.fixture
def probing(pictures: tuple[Image, ...], tmp_path: Path) -> Probe:
    """Probe an endpoint of some habits; it must have seen as many requests as were charged."""
    count = iter(range(100))

    def run(
        habits: Habits, protocol: str = "zero-shot", most: int = MAX_QUERIES, **options: Any
    ) -> Report:
        with ScriptedServer(habits) as server:
            url = f"{server.url}/{ROUTES[protocol]}"
            endpoint = Endpoint(protocol, {"url": url, "model": "clip", **options})
            report = probe(endpoint, pictures, tmp_path / f"{next(count)}.sqlite", most)
            assert report.queries == len(server.received) <= most
        return report

    return run


def found(report: Report, about: str) -> str:
    [finding] = [finding for finding in report.findings if finding.about == about]
    return finding.found


def declared(report: Report) -> dict[str, Any]:
    """What a probe adds to the declaration, read back from its TOML."""
    values = tomllib.loads(report.endpoint.to_toml())
    assert (values.pop("model"), values.pop("protocol")) == ("clip", report.endpoint.protocol)
    del values["url"]
    return values


# -- what the scores are ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "cosine", "logits"])
@pytest.mark.parametrize("places", [None, 5])
def test_the_kind_of_scores(probing: Probe, kind: str, places: int | None) -> None:
    report = probing(Habits(kind=kind, decimals=places))
    assert found(report, "scores").startswith(f"{kind}: ")
    assert "undecided" not in found(report, "scores")
    assert declared(report)["score_kind"] == kind
    assert declared(report).get("decimals") == places


def test_cosines_below_zero(probing: Probe) -> None:
    assert declared(probing(Habits(kind="low cosine")))["score_kind"] == "cosine"


def seen(*rows: list[float], texts: tuple[str, ...] = TEXTS) -> Seen:
    request = TextScores(images(len(rows)), texts[: len(rows[0])])
    return Seen(request, np.array(rows), "clip")


@pytest.mark.parametrize(
    ("answers", "kind", "said"),
    [
        ([seen([0.9, 0.3]), seen([0.9, 0.3, 0.05])], "sigmoid", "undecided"),
        ([seen([0.04, 0.4]), seen([0.04, 0.4, 0.3])], "sigmoid", "undecided"),
        ([seen([0.2, 0.3]), seen([0.1234567891, 0.2, 0.3])], "softmax", "undecided"),
        ([seen([0.7, 0.3]), seen([0.5, 0.2, math.nan])], "softmax", "only the best"),
        ([seen([0.7, 0.3]), seen([0.5, 0.2, 0.3])], "softmax", "sums to 1"),
        ([seen([0.33, 0.33, 0.33]), seen([0.49, 0.5])], "softmax", "sums to 1"),
        ([seen([0.001, 0.002])], "sigmoid", "close to 0"),
        ([seen([1.0000001, 0.3])], "cosine", "all alike"),
        ([seen([1.01, 0.3])], "logits", "beyond"),
    ],
)
def test_evidence_for_a_kind(answers: list[Seen], kind: str, said: str) -> None:
    finding = score_kind(answers)
    assert (finding.declares, finding.queries) == ({"score_kind": kind}, len(answers))
    assert said in finding.found


def test_noise_is_no_dependence() -> None:
    answers = [seen([0.2, 0.30]), seen([0.22, 0.32, 0.25])]
    assert "undecided" in score_kind(answers).found
    assert score_kind(answers, noise=0.02).found.startswith("cosine: each text for itself")


# -- rounding, order, determinism -------------------------------------------------------------


@pytest.mark.parametrize("places", [2, 4, 7, 8])
def test_rounding(probing: Probe, places: int) -> None:
    report = probing(Habits(kind="cosine", decimals=places))
    assert found(report, "rounding") == f"to {places} decimals"
    assert declared(report)["decimals"] == places


def test_no_rounding_and_nothing_to_tell_it_by(probing: Probe) -> None:
    assert found(probing(Habits()), "rounding") == "none"
    assert decimals(np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.5, math.nan])) is None
    assert decimals(np.array([0.5, 0.25, 0.125, 0.1, 0.2])) == 3
    saturated = seen([1.0, 0.0, 0.0, 0.0])
    from blackbox_vlm.evidence import rounding

    assert "cannot be told" in rounding([saturated]).found


def test_digits_are_read_from_the_answer_as_it_was_written() -> None:
    written = [0.123456789012, {"score": 0.25}, 1e300, 7]
    values = np.array([[0.123456789012, 0.25, 0.5]], dtype=np.float32)
    assert as_written(values, written).tolist() == [[0.123456789012, 0.25, 0.5]]


@pytest.mark.parametrize(
    ("order", "said"),
    [("sent", "as sent"), ("score", "by score"), ("name", "neither as sent nor by score")],
)
def test_the_order_of_labels(probing: Probe, order: str, said: str) -> None:
    assert found(probing(Habits(order=order)), "order").startswith(f"{said};")
    assert "do not name" in found(probing(Habits(kind="cosine"), "score"), "order")


def test_answers_that_repeat_and_answers_that_do_not(probing: Probe) -> None:
    assert declared(probing(Habits()))["deterministic"] is True
    noisy = probing(Habits(kind="logits", noise=0.25))
    assert found(noisy, "asked twice") == "differs by up to 0.25"
    assert "deterministic" not in declared(noisy)


def test_an_idempotency_key_does_not_make_an_endpoint_look_deterministic(probing: Probe) -> None:
    habits = Habits(kind="logits", noise=0.25)
    keys: list[str | None] = []

    def watched(received: Received) -> list[bytes]:
        keys.append(received.headers.get("idempotency-key"))
        return habits(received)

    report = probing(watched, idempotency_header="Idempotency-Key")  # type: ignore[arg-type]
    assert set(keys) == {None}
    assert declared(report)["idempotency_header"] == "Idempotency-Key"


# -- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "most"), [(math.inf, None), (64, None), (63, 32), (16, 16), (9, 8), (4, None)]
)
@pytest.mark.parametrize("status", [422, 500])
def test_texts_per_request(probing: Probe, limit: float, most: int | None, status: int) -> None:
    report = probing(Habits(most_texts=limit, too_many=status))
    assert declared(report).get("texts_per_request") == (4 if limit == 4 else most)
    assert not report.stopped
    [asked] = [f.queries for f in report.findings if f.about == "texts_per_request"]
    assert asked == 1 if limit >= 64 else asked <= 3
    if limit >= 64:
        assert "64 taken, more were not tried" in found(report, "texts_per_request")
    else:
        assert f"({status}" not in found(report, "texts_per_request")
        assert "too many" in found(report, "texts_per_request")


def test_two_texts_are_tried_where_four_are_too_many(probing: Probe) -> None:
    report = probing(Habits(most_texts=2))
    assert declared(report)["texts_per_request"] == 2
    assert declared(report)["score_kind"] == "softmax"


@pytest.mark.parametrize(("limit", "most"), [(math.inf, 8), (5, 4), (2, 2), (1, 1)])
def test_images_per_request(probing: Probe, limit: float, most: int) -> None:
    report = probing(Habits(kind="logits", most_images=limit), "kserve")
    assert declared(report).get("images_per_request", 1) == most


def test_a_protocol_of_one_image_costs_no_query(probing: Probe) -> None:
    assert found(probing(Habits()), "images_per_request") == "1, as the protocol is"


def test_a_batch_whose_answers_are_mixed_up_is_not_declared(probing: Probe) -> None:
    report = probing(Habits(kind="logits", mixed_up=True), "kserve")
    assert declared(report).get("images_per_request", 1) == 1
    assert "other answers than one alone" in found(report, "images_per_request")


# -- models, limits on the rate ---------------------------------------------------------------


def test_an_unknown_model_that_is_answered(probing: Probe) -> None:
    echo = probing(Habits(kind="cosine"), "score")
    assert f"ANSWERED all the same: '{NO_MODEL}', as asked" in found(echo, "unknown model")
    assert found(echo, "model") == "'clip', as asked"
    named = probing(Habits(kind="cosine", calls_itself="clip-large"), "score")
    assert "ANSWERED" in found(named, "unknown model")
    assert "'clip-large'" in found(named, "unknown model")
    assert declared(named)["answered_model"] == "clip-large"


def test_an_unknown_model_that_is_refused(probing: Probe) -> None:
    report = probing(Habits(kind="cosine", models=("clip",)), "score")
    assert found(report, "unknown model").startswith("refused (")
    in_path = probing(Habits(kind="logits", models=("clip",)), "kserve")
    assert found(in_path, "unknown model").startswith("refused (")


def test_a_protocol_that_names_no_model_is_not_asked_for_one(probing: Probe) -> None:
    report = probing(Habits())
    assert found(report, "unknown model") == "not asked: requests do not name a model"
    assert "names none" in found(report, "model")


def test_what_is_said_about_rate_limits(probing: Probe) -> None:
    assert found(probing(Habits()), "rate limits") == "no answer tells any"
    headers = {"x-ratelimit-remaining-requests": "58", "x-ratelimit-reset-requests": "1.5s"}
    told = found(probing(Habits(headers=headers)), "rate limits")
    assert told.startswith("58 requests left, more in 1.5 s (x-ratelimit-remaining-requests, ")
    odd = found(probing(Habits(headers={"X-RateLimit-Tokens": "9"})), "rate limits")
    assert odd == "in no form that is read (x-ratelimit-tokens)"


# -- embeddings and labels --------------------------------------------------------------------


def test_embeddings(probing: Probe) -> None:
    report = probing(Habits(most_texts=16, most_images=4), "embeddings")
    assert found(report, "vectors") == "12 numbers, of length 1"
    expected = {"deterministic": True, "texts_per_request": 16, "images_per_request": 4}
    assert declared(report) == expected
    loose = probing(Habits(noise=0.01), "embeddings")
    assert found(loose, "vectors") == "12 numbers, not of length 1"
    assert "deterministic" not in declared(loose)


@pytest.mark.parametrize("limit", [3, 1])
def test_embeddings_of_one_text_at_a_time(probing: Probe, limit: int) -> None:
    report = probing(Habits(most_texts=limit, most_images=1), "embeddings")
    assert declared(report)["texts_per_request"] == 1
    assert found(report, "vectors") == "12 numbers, of length 1"
    as_declared = probing(Habits(most_texts=1), "embeddings", dialect="titan")
    assert found(as_declared, "texts_per_request") == "1, as the protocol is"
    assert found(as_declared, "vectors") == "12 numbers, of length 1"


def test_labels(probing: Probe) -> None:
    report = probing(Habits(says="none of them"), "chat", mode="labels")
    assert found(report, "labels") == "3 of 4 answers are one of the texts"
    assert found(report, "asked twice") == "differs by up to 1"
    assert found(report, "unknown model").startswith("ANSWERED")


# -- the budget, and what goes wrong ----------------------------------------------------------


@pytest.mark.parametrize("most", range(1, 12))
def test_no_budget_is_exceeded_and_what_was_found_is_told(probing: Probe, most: int) -> None:
    habits = Habits(kind="cosine", most_texts=20, models=("clip",))
    report = probing(habits, "score", most)
    assert bool(report.stopped) == (most < 7)
    assert "budget" in report.stopped or most >= 7
    assert found(report, "model")
    assert declared(report)["score_kind"] == "cosine"


def test_nothing_found_is_an_error(probing: Probe) -> None:
    with pytest.raises(AuthError):
        probing(Habits(statuses={1: 401}))
    with pytest.raises(BackendError):
        probing(Habits(statuses={1: 500}))
    with pytest.raises(BackendError, match="422"):  # and not that fewer texts cost too much
        probing(Habits(most_texts=3), most=1)
    with pytest.raises(InputError, match="wings"):
        probing(Habits(), wings=2)


@pytest.mark.parametrize("status", [401, 402, 500])
def test_an_endpoint_that_stops_answering_ends_the_questions(probing: Probe, status: int) -> None:
    report = probing(Habits(statuses=dict.fromkeys(range(3, 20), status)))
    assert report.queries == 3
    assert str(status) in report.stopped
    assert declared(report)["score_kind"] == "softmax"


def test_any_backend_can_be_watched(tmp_path: Path) -> None:
    """One that shows no raw answers, and another model than it declares."""
    world = LinearWorld(declare(score_kind=ScoreKind.SOFTMAX, texts_per_request=2, decimals=2))
    witness = Witness(world)
    request = TextScores(images(1), TEXTS[:5])
    with Ledger(tmp_path / "ledger.sqlite", 2) as ledger:
        meter = Meter(witness, ledger)
        with pytest.raises(InputError, match="this endpoint takes 2"):
            run_sync(meter.observe([request], "probe"))
        assert ledger.spent() == 0
        small = TextScores(images(1), TEXTS[:2])
        run_sync(meter.observe([small], "probe"))
    assert witness.seen[small].values.tolist() == [
        [round(v, 2) for v in witness.seen[small].values[0]]
    ]
    run_sync(witness.aclose())
    assert world.closed == 1


# -- the command ------------------------------------------------------------------------------


def command(*words: object, **more: Any) -> Result:
    return CliRunner().invoke(main, ["probe", *map(str, words)], **more)


@pytest.fixture
def served() -> Iterator[ScriptedServer]:
    with ScriptedServer(Habits(kind="sigmoid", decimals=4)) as server:
        yield server


def words(server: ScriptedServer) -> list[str]:
    return [f"{server.url}/hf?key=s3cret-query", "--protocol", "zero-shot", "--model", "clip"]


def test_consent_is_asked_for(served: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = command(*words(served))
    assert refused.exit_code == 2
    assert "give --yes" in refused.stderr
    assert "at most 12 queries (price unknown)" in refused.stderr
    assert "s3cret" not in refused.output
    monkeypatch.setattr(commands_probe, "_on_terminal", lambda: True)
    no = command(*words(served), input="n\n")
    assert no.exit_code == 2
    assert "nothing was sent" in no.stderr
    assert not served.received
    yes = command(*words(served), input="y\n")
    assert yes.exit_code == 0, yes.output
    assert served.received


def test_the_declaration_is_printed_kept_and_valid(
    served: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROBE_KEY", "s3cret-key")
    out = tmp_path / "endpoint"
    options = ["timeout=20", "price.per_request=0.25", 'headers.X-Tier="low"', "key_prefix=Key "]
    given = [word for option in options for word in ("--option", option)]
    done = command(*words(served), "--key-env", "PROBE_KEY", *given, "--yes", "--out", out)
    assert done.exit_code == 0, done.output
    assert "s3cret-key" not in done.output
    assert "at most 12 queries (3 USD)" in done.stderr
    assert served.received[0].headers["authorization"] == "Key s3cret-key"
    assert served.received[0].headers["x-tier"] == "low"
    text = (out / "endpoint.toml").read_text()
    assert text in done.stdout
    values = tomllib.loads(text)
    assert values["score_kind"] == "sigmoid"
    assert values["decimals"] == 4
    assert values["timeout"] == 20
    assert values["price"] == {"per_request": 0.25}
    assert open_endpoint(out / "endpoint.toml").capabilities.score_kind is ScoreKind.SIGMOID
    assert f"{len(served.received)} of 12 queries spent" in done.stdout
    assert command(*words(served), "--yes", "--out", out).exit_code == 2


def test_findings_as_json(served: ScriptedServer) -> None:
    done = command(*words(served), "--yes", "--json", "--max-queries", 3)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["queries_spent"] == len(served.received) == 3
    assert "budget" in report["stopped"]
    assert {"about", "found", "queries", "declares"} == report["findings"][0].keys()
    assert "# [price]" in report["declaration"]
    assert tomllib.loads(report["declaration"])["protocol"] == "zero-shot"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--option", "timeout"], "NAME=VALUE"),
        (["--option", ".=2"], "NAME=VALUE"),
        (["--option", "model.name=2"], "model has a value already"),
        (["--option", "wings=2"], "wings"),
        (["--option", "timeout=soon"], "timeout"),
        (["--key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["--images", "nowhere-at-all"], "nowhere-at-all"),
    ],
)
def test_what_is_wrong_is_said_before_a_query(
    served: ScriptedServer, more: list[str], said: str
) -> None:
    result = command(*words(served), "--yes", *more)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not served.received


def test_own_images_are_shown(served: ScriptedServer, pictures: tuple[Image, ...]) -> None:
    folder = pictures[0].path.parent
    assert "shows it 8 images" in command(*words(served), "--images", folder).stderr


def test_a_key_that_is_refused_has_its_exit_code() -> None:
    with ScriptedServer(Habits(statuses={1: 401})) as server:
        assert command(*words(server), "--yes").exit_code == 5
    with ScriptedServer(Habits(statuses={1: 402})) as server:
        assert command(*words(server), "--yes").exit_code == 7
