"""The local encoder: what it says, that the meter and its ledger see it, and a student of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from blackbox_vlm.backends.local import LocalBlackBox

from blackbox_vlm import Task, demo_folder
from blackbox_vlm.backend import ImageEmbeddings, Labels
from blackbox_vlm.errors import InputError
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.local_encoder import (
    IMAGES_PER_REQUEST,
    join_vectors,
    open_local_encoder,
    parse_spec,
    with_vectors,
)
from blackbox_vlm.observe.ballots import encode_votes, vote_readout
from blackbox_vlm.observe.choose import choose, ensemble_logits
from blackbox_vlm.observe.observation import Observation
from blackbox_vlm.observe.questions import candidate_questions
from blackbox_vlm.observe.votes import choose_questions
from blackbox_vlm.tuning import Options, tune

pytestmark = pytest.mark.usefixtures("one_load")


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.from_folder(demo_folder()).sample(shots=4, seed=0)


@pytest.fixture(scope="module")
def test() -> Task:
    return Task.from_folder(demo_folder(), split="test").sample(shots=5, seed=0)


@pytest.fixture(scope="module")
def endpoint(one_load: None) -> LocalBlackBox:
    return LocalBlackBox(access="label")


def ask(backend: LocalBlackBox, *requests: ImageEmbeddings | Labels) -> list[np.ndarray]:
    return [answer.values for answer in asyncio.run(backend.answer(requests))]


def votes(endpoint: LocalBlackBox, task: Task, questions: Sequence[tuple[str, ...]]) -> np.ndarray:
    """What the embedded model says behind a label endpoint, `(n, n_questions)`."""
    return np.stack(ask(endpoint, *(Labels(task.images, q) for q in questions)), axis=1)


def test_its_vectors_are_the_model_s_own(task: Task) -> None:
    with open_local_encoder("nano") as encoder:
        vectors = encoder.vectors_sync(task.images[:3])
        assert encoder.identity.startswith("open_clip:nano@embedded#")
    [plain] = ask(LocalBlackBox(access="embeddings"), ImageEmbeddings(task.images[:3]))
    assert vectors.dtype == np.float32
    assert np.allclose(vectors, plain, atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


def test_no_image_is_encoded_twice_over_restarts(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "encoder.sqlite"
    with open_local_encoder("nano", ledger) as encoder:
        first = encoder.vectors_sync(task.images)
    n_requests = -(-len(task) // IMAGES_PER_REQUEST)
    with Ledger(ledger) as book:
        assert book.totals().queries == n_requests
        assert book.totals().images == len(task)
        assert book.by_purpose() == {"local encoder": n_requests}

    def refuse(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("blackbox_vlm.backends.dual_encoder.DualEncoder.encode_images", refuse)
    with open_local_encoder("nano", ledger) as encoder:
        again = encoder.vectors_sync(task.images)
    assert np.array_equal(first, again)


def test_vectors_can_be_awaited_inside_a_run(task: Task) -> None:
    async def run() -> np.ndarray:
        with open_local_encoder("nano") as encoder:
            return await encoder.vectors(task.images[:2])

    assert asyncio.run(run()).shape == (2, 512)


def test_there_must_be_images() -> None:
    with open_local_encoder("nano") as encoder, pytest.raises(InputError, match="at least one"):
        encoder.vectors_sync(())


def test_another_encoder_s_vectors_are_refused() -> None:
    with open_local_encoder("nano") as encoder:
        encoder.check(encoder.identity)
        with pytest.raises(InputError, match="same --local-encoder"):
            encoder.check("open_clip:ViT-B-32@openai#0123456789abcdef")


def test_a_spec_names_a_model_and_its_weights(tmp_path: Path) -> None:
    assert parse_spec("nano") == ("nano", None)
    assert parse_spec("ViT-B-32:openai") == ("ViT-B-32", "openai")
    assert parse_spec("hf-hub:timm/ViT-B-16") == ("hf-hub:timm/ViT-B-16", None)
    assert parse_spec(f"local-dir:{tmp_path}") == (f"local-dir:{tmp_path}", None)
    folder = tmp_path / "odd:name"
    folder.mkdir()
    assert parse_spec(str(folder)) == (str(folder), None)


@pytest.mark.parametrize("spec", ["", "ViT-B-32", "ViT-B-32:", ":openai", "/no/such/folder"])
def test_a_spec_that_names_nothing_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match="NAME:TAG"):
        parse_spec(spec)


@pytest.mark.parametrize("spec", ["ViT-B-32:nobody", "No-Such-Model:openai"])
def test_a_model_that_cannot_be_had_is_refused(spec: str) -> None:
    with pytest.raises(InputError), open_local_encoder(spec):
        pass


@pytest.mark.parametrize("method", [None, "prompts"])
def test_a_refused_model_leaves_no_run_behind(
    method: str | None, task: Task, endpoint: LocalBlackBox, tmp_path: Path
) -> None:
    options = Options(budget=4000, method=method, local_encoder="ViT-B-32:nobody")
    with pytest.raises(InputError, match="nobody"):
        tune(task, endpoint, tmp_path / "run", options)
    assert not (tmp_path / "run").exists()


def test_the_endpoint_is_the_prior_and_the_vectors_are_the_features() -> None:
    random = np.random.default_rng(0)
    votes = encode_votes(np.array([[0], [1], [2]]), [3])
    vectors = random.standard_normal((3, 5)).astype(np.float32)
    plain = Observation(votes, vote_readout([3], 3, 0.9))
    observation = with_vectors(plain, vectors)
    assert np.array_equal(observation.zero_shot, plain.zero_shot)
    assert np.array_equal(observation.answers, join_vectors(votes, vectors))
    spread = observation.answers.var(axis=0)
    assert spread[3:].sum() > 1e4 * spread[:3].sum()


def test_a_student_sees_more_than_its_endpoint_tells(
    task: Task, test: Task, endpoint: LocalBlackBox
) -> None:
    """The same weights on both sides: this is about the path, not about what another would gain."""
    assert task.labels is not None
    assert test.labels is not None
    plain = candidate_questions(task.class_names, task.template, limit=None, most=1)
    n_classes = len(task.class_names)
    learned, shown = (encode_votes(votes(endpoint, t, plain), [n_classes]) for t in (task, test))
    with open_local_encoder("nano") as encoder:
        seen, new = encoder.vectors_sync(task.images), encoder.vectors_sync(test.images)
    observation = with_vectors(
        Observation(learned, vote_readout([n_classes], n_classes, 0.9)), seen
    )
    ensemble, _ = choose(observation, task.labels, seed=0)
    student = ensemble_logits(ensemble, join_vectors(shown, new)).argmax(axis=1)
    bare = float((shown.argmax(axis=1) == test.labels).mean())
    assert float((student == test.labels).mean()) >= bare + 0.05


def test_words_tell_classes_apart_at_a_real_label_endpoint(
    task: Task, test: Task, endpoint: LocalBlackBox
) -> None:
    assert task.labels is not None
    assert test.labels is not None
    questions = candidate_questions(task.class_names, task.template, limit=20, most=10)
    sizes = [len(question) for question in questions]
    answers = encode_votes(votes(endpoint, task, questions), sizes)
    chosen = choose_questions(answers, task.labels, sizes, sizes[0], most=5, seed=0)
    asked = [questions[q] for q in chosen.kept]
    shown = encode_votes(votes(endpoint, test, asked), [len(question) for question in asked])
    tuned = float((ensemble_logits(chosen.ensemble, shown).argmax(1) == test.labels).mean())
    bare = float((shown[:, : sizes[0]].argmax(axis=1) == test.labels).mean())
    assert tuned > bare
