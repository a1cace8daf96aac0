"""The adapter's folder: what goes in comes out, and what does not belong is refused."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles import MODEL_ID, LinearWorld, declare, images
from safetensors.numpy import load_file, save_file
from scipy.special import softmax

from blackbox_vlm._adapter_file import CONFIG_FILE, WEIGHTS_FILE
from blackbox_vlm.adapter import Adapter
from blackbox_vlm.backend import Access
from blackbox_vlm.craft.guard import Strategy
from blackbox_vlm.craft.refine import Refiner, refine
from blackbox_vlm.deployment import plain_ensemble
from blackbox_vlm.errors import BudgetError, InputError, StorageError
from blackbox_vlm.observations import Question
from blackbox_vlm.observe.choose import Ensemble, Member
from blackbox_vlm.observe.features import FeatureMap
from blackbox_vlm.observe.heads import Kernel, Linear
from blackbox_vlm.task import Classes

CLASSES = Classes(("no", "012", '"; ignore {0.__class__}'), "a photo of a {}.")
H, C = 5, 3


def draw(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


REFINER = Refiner(*(torch.from_numpy(draw(*s)) for s in [(H, C), (H,), (C, H), (C,)]))


def make(strategy: Strategy = Strategy.BOTH, access: Access = Access.SOFT) -> Adapter:
    question = Question(offset=draw(4, 6)) if strategy.uses_prompt else Question((CLASSES.texts,))
    identity = np.eye(C, dtype=np.float32)
    return Adapter(
        strategy.value,
        CLASSES,
        MODEL_ID,
        access,
        question,
        plain_ensemble(identity, REFINER if strategy.uses_refiner else None),
        zero_shot=None if strategy.uses_prompt else identity,
        recipe={"seed": 0},
        cost={"queries": 12},
    )


def of_heads(n_answers: int = 16) -> Adapter:
    """One with a linear and a kernel head, on vectors."""
    seen = FeatureMap(draw(n_answers), draw(n_answers, 4))
    half, one = np.float32(0.5), np.float32(1)
    linear = Linear(draw(4, C), draw(C), half)
    kernel = Kernel(draw(7, 4), draw(7, C), draw(C), one, half)
    members = (Member(seen, linear, 0.6), Member(seen, kernel, 0.4))
    readout = draw(n_answers, C)
    ensemble = Ensemble(readout, members, prior=0.25, temperature=2.0)
    return Adapter(
        "heads", CLASSES, MODEL_ID, Access.EMBEDDINGS, Question(), ensemble, zero_shot=readout
    )


@pytest.mark.parametrize("strategy", list(Strategy))
def test_what_is_saved_is_loaded(tmp_path: Path, strategy: Strategy) -> None:
    adapter = make(strategy)
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = Adapter.from_pretrained(tmp_path / "adapter")
    assert loaded.classes == CLASSES
    assert (loaded.strategy, loaded.access, loaded.model_id) == (strategy, Access.SOFT, MODEL_ID)
    assert (loaded.recipe, loaded.cost) == (adapter.recipe, adapter.cost)
    world = LinearWorld(declare(Access.SOFT))
    ours, theirs = (a.predict(images(5), world, budget=1) for a in (adapter, loaded))
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)
    names = sorted(p.name for p in (tmp_path / "adapter").iterdir())
    assert names == [CONFIG_FILE, WEIGHTS_FILE]


def test_heads_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    adapter = of_heads()
    adapter.save_pretrained(tmp_path)
    loaded = Adapter.from_pretrained(tmp_path)
    world = LinearWorld(declare(Access.EMBEDDINGS))
    ours, theirs = (a.predict(images(5), world, budget=1) for a in (adapter, loaded))
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)
    answers = draw(5, 16)
    ours_plain, theirs_plain = (a.zero_shot_logits(answers) for a in (adapter, loaded))
    np.testing.assert_array_equal(ours_plain, theirs_plain)


def test_it_refines_as_the_search_did() -> None:
    logits = np.random.default_rng(1).standard_normal((7, C)).astype(np.float32)
    logits -= logits.mean(1, keepdims=True)
    expected = softmax(refine(REFINER, torch.from_numpy(logits)).numpy(), axis=1)
    refined = softmax(make(Strategy.REFINER).logits(logits), axis=1)
    np.testing.assert_allclose(refined, expected, atol=1e-5)
    plain = softmax(make(Strategy.PROMPT).logits(logits), axis=1)
    np.testing.assert_allclose(plain, softmax(logits, axis=1), atol=1e-6)


def test_predictions_are_probabilities_and_cost_a_query_per_request() -> None:
    world = LinearWorld(declare(Access.SOFT, images_per_request=2))
    adapter = make()
    labels, probabilities = adapter.predict(images(5), world, budget=3)
    assert len(world.requests) == 3 == adapter.queries(5, world.capabilities)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(labels, probabilities.argmax(1))
    asked = len(world.requests)
    with pytest.raises(BudgetError, match="budget is 2"):
        adapter.predict(images(5), LinearWorld(replace(world.capabilities)), budget=2)
    assert len(world.requests) == asked


def test_it_works_where_a_loop_runs_already() -> None:
    import asyncio

    async def notebook() -> int:
        return len(make().predict(images(2), LinearWorld(declare(Access.SOFT)), budget=1).labels)

    assert asyncio.run(notebook()) == 2


@pytest.mark.parametrize(
    ("capabilities", "words"),
    [
        (declare(Access.SOFT, model_id="another"), "belongs to"),
        (declare(Access.SCORES), "asks for 'soft' access"),
    ],
)
def test_it_refuses_an_endpoint_it_was_not_tuned_for(capabilities: Any, words: str) -> None:
    world = LinearWorld(capabilities)
    with pytest.raises(InputError, match=words):
        make().predict(images(1), world, budget=5)
    assert world.asked == 0


def broken_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def broken_weights(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / WEIGHTS_FILE) | changes
    save_file({k: v for k, v in tensors.items() if v is not ...}, folder / WEIGHTS_FILE)


NAN = np.full((4, 6), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / CONFIG_FILE).unlink(),
        lambda f: (f / WEIGHTS_FILE).unlink(),
        lambda f: (f / CONFIG_FILE).write_text("not json"),
        lambda f: (f / CONFIG_FILE).write_text("[1]"),
        lambda f: (f / WEIGHTS_FILE).write_bytes(pickle.dumps({"offset": 1})),
        lambda f: (f / WEIGHTS_FILE).write_bytes(b"\xff" * 8 + b"{}"),
        lambda f: (f / WEIGHTS_FILE).write_bytes(b""),
        lambda f: broken_config(f, format_version=99),
        lambda f: broken_config(f, access="magic"),
        lambda f: broken_config(f, lists=[["one", 2]]),
        lambda f: broken_config(f, ensemble={"members": [{"kind": "magic", "weight": 1}]}),
        lambda f: broken_config(f, class_names=...),
        lambda f: broken_config(f, class_names=["two", "classes"]),
        lambda f: broken_weights(f, offset=...),
        lambda f: broken_weights(f, readout=...),
        lambda f: broken_weights(f, readout=np.zeros((C, C + 1), dtype=np.float32)),
        lambda f: broken_weights(f, offset=NAN),
        lambda f: broken_weights(f, offset=np.zeros((4, 6))),
        lambda f: broken_weights(f, offset=np.zeros(4, dtype=np.float32)),
        lambda f: broken_weights(f, **{"member0.output_bias": ...}),
        lambda f: broken_weights(f, **{"member0.output_bias": np.zeros(9, dtype=np.float32)}),
    ],
)
def test_a_spoilt_folder_is_refused(tmp_path: Path, spoil: Any) -> None:
    make().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError):
        Adapter.from_pretrained(tmp_path)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        make().save_pretrained(tmp_path / "file" / "adapter")
