"""Templates, class descriptions, mixtures of prompts, and what a language model's lines become."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import check_grad

from blackbox_vlm.errors import InputError
from blackbox_vlm.prompts import mixture
from blackbox_vlm.prompts.mixture import fit_mixture, mix
from blackbox_vlm.prompts.proposals import MOST_NAMES, instruction, read_templates
from blackbox_vlm.prompts.templates import FRAMES, Prompt, candidates, prompts
from blackbox_vlm.scores import log_probabilities

NAMES = ("cat", "dog", "snowy owl")
OWN = "a sketch of a {}, a kind of animal."


# -- templates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["{}", "a photo of a {}.", OWN, "x {} y", "{} texture."])
def test_the_own_template_is_first_and_every_other_has_one_place(template: str) -> None:
    found = candidates(template)
    assert found[0] == template
    assert 40 <= len(found) <= 80
    assert len(set(found)) == len(found)
    assert {text.count("{}") for text in found} == {1}
    assert set(FRAMES) <= set(found)
    assert found == candidates(template)


def test_the_own_template_is_varied() -> None:
    found = candidates(OWN)
    assert "a blurry sketch of a {}, a kind of animal." in found
    assert "a picture of a {}, a kind of animal." in found
    assert any("sketch" in text for text in found[1:6])
    assert any(text in FRAMES for text in found[1:6])


def test_proposals_come_right_after_the_own_one_and_the_number_is_bounded() -> None:
    found = candidates(OWN, ["my {}", OWN, "your {}"], most=4)
    assert found[:3] == (OWN, "my {}", "your {}")
    assert len(found) == 4


def test_no_variation_is_longer_than_a_template_may_be() -> None:
    long = "a sketch of a {}, " + "which is " * 20
    found = candidates(long)
    assert found[0] == long
    assert max(map(len, found)) <= 200


@pytest.mark.parametrize("wrong", ["no place", "{} and {}", "a\u200b{}"])
def test_what_is_no_template_is_refused(wrong: str) -> None:
    with pytest.raises(InputError):
        candidates(wrong)
    with pytest.raises(InputError):
        candidates(OWN, [wrong])


def test_a_prompt_is_a_text_per_class_and_no_text_is_formatted() -> None:
    found = prompts(("cat", "{0}", "a{}b"), ("{}", "{}", "the {}"))
    assert found == (
        Prompt("{}", ("cat", "{0}", "a{}b")),
        Prompt("the {}", ("the cat", "the {0}", "the a{}b")),
    )


def test_what_says_the_same_comes_once() -> None:
    described = {name: [f"the {name}", "my {}"] for name in NAMES}
    found = prompts(NAMES, ["{}", "the {}"], described)
    assert [prompt.name for prompt in found] == ["{}", "the {}", "description 2"]


def test_descriptions_are_candidates() -> None:
    described = {
        "cat": ["a {} that purrs", "whiskers"],
        "dog": ["a {} that barks"],
        "snowy owl": ["white", "round", "silent"],
    }
    own, *found = prompts(NAMES, [OWN], described)
    assert own.name == OWN
    assert found == [
        Prompt("description 1", ("a cat that purrs", "a dog that barks", "white")),
        Prompt("description 2", ("whiskers", "a dog that barks", "round")),
        Prompt("description 3", ("a cat that purrs", "a dog that barks", "silent")),
    ]


@pytest.mark.parametrize(
    ("described", "match"),
    [
        ({"cat": ["x"], "dog": ["y"]}, "snowy owl"),
        ({"cat": ["x"], "dog": [], "snowy owl": ["z"]}, "dog"),
        ({"cat": "xyz", "dog": ["y"], "snowy owl": ["z"]}, "cat"),
        ({"cat": ["x"], "dog": ["y"], "snowy owl": ["z"], "eel": ["e"]}, "eel"),
        ({"cat": ["same"], "dog": ["same"], "snowy owl": ["z"]}, "same"),
    ],
)
def test_descriptions_of_something_else(described: dict[str, list[str]], match: str) -> None:
    with pytest.raises(InputError, match=match):
        prompts(NAMES, [OWN], described)


# -- mixtures --------------------------------------------------------------------------------------


def told(merit: list[float], n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of prompts that know so much of the label, and the labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 5, n)
    noise = random.normal(size=(len(merit), n, 5))
    logits = np.array(merit)[:, None, None] * np.eye(5)[labels] + noise
    return logits.astype(np.float32), labels


def loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_probabilities(logits)[np.arange(len(labels)), labels].mean())


def test_weights_go_to_what_knows_the_label() -> None:
    logits, labels = told([0.0, 2.0, 1.0, 0.0])
    weights = fit_mixture(logits, labels)
    assert weights.shape == (4,)
    assert weights.dtype == np.float32
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert list(np.argsort(weights)[2:]) == [2, 1]
    fresh, truth = told([0.0, 2.0, 1.0, 0.0], seed=1)
    every = [loss(fresh[i], truth) for i in range(4)]
    right = [(mix(w, fresh).argmax(axis=1) == truth).mean() for w in (weights, np.full(4, 0.25))]
    assert loss(mix(weights, fresh) * 2, truth) < min(every)
    assert right[0] > right[1]


def test_scale_and_each_images_constant_play_no_part() -> None:
    logits, labels = told([0.5, 2.0, 1.0])
    constants = np.random.default_rng(2).normal(size=(3, 400, 1)).astype(np.float32)
    shifted = logits / 1000 + constants * 30  # cosines differ by no more
    np.testing.assert_allclose(fit_mixture(shifted, labels), fit_mixture(logits, labels), atol=0.02)


def test_a_strong_prior_keeps_the_weights_even() -> None:
    logits, labels = told([0.0, 2.0, 1.0, 0.0], n=20)
    np.testing.assert_allclose(fit_mixture(logits, labels, prior=1e4), 0.25, atol=0.01)
    free, held = fit_mixture(logits, labels, prior=0.0), fit_mixture(logits, labels, prior=5.0)
    assert held.max() < free.max()


def test_the_gradient_is_that_of_the_objective() -> None:
    logits, labels = told([0.0, 1.0, 0.5], n=30)
    point = np.array([0.3, -0.5, 0.1, 0.4])
    value, slope = (
        lambda p, i=i: mixture._loss(p, logits.astype(float), labels, 2.0)[i] for i in (0, 1)
    )
    assert check_grad(value, slope, point) < 1e-4


def test_a_mixture_is_linear() -> None:
    logits, _ = told([1.0, 2.0], n=3)
    np.testing.assert_allclose(
        mix(np.array([0.25, 0.75], np.float32), logits),
        0.25 * logits[0] + 0.75 * logits[1],
        rtol=1e-5,
    )


def test_shapes_that_do_not_go_together() -> None:
    logits, labels = told([1.0])
    with pytest.raises(InputError, match="400"):
        fit_mixture(logits[:, :9], labels)


# -- a language model's lines ----------------------------------------------------------------------

ANSWER = """\
Here are some sentences:
1. a pencil drawing of a {}.
2) "a child's picture of a {}",
- `an animal called {}, drawn by hand`
* a {} next to a dog
a photo of two dogs and a {}
a {} with a {}
a sketch of a {}, a kind of animal
A  Pencil drawing of a {}
a {name} in {}
the {} of an artist\u200b
a category of {}
"""


def test_lines_become_templates() -> None:
    assert read_templates(ANSWER, NAMES, [OWN]) == (
        "a pencil drawing of a {}.",
        "a child's picture of a {}",
        "an animal called {}, drawn by hand",
        "a category of {}",
    )
    assert len(read_templates(ANSWER, NAMES, [OWN], most=2)) == 2


def test_a_name_that_the_own_template_holds_may_stand_in_others() -> None:
    names = ("animal", "mineral")
    assert read_templates("an animal: {}\na mineral: {}", names, [OWN]) == ("an animal: {}",)


def test_what_was_there_before_is_not_new() -> None:
    assert read_templates("my {}.\nyour {}", NAMES, [OWN, "My {}"]) == ("your {}",)


@given(st.text(max_size=300), st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4))
def test_any_answer_gives_templates_or_nothing(answer: str, names: list[str]) -> None:
    for template in read_templates(answer + "\nodd {}", names, [OWN]):
        assert template.count("{}") == 1
        assert candidates(OWN, [template])[1] == template


def test_the_instruction_shows_names_as_data_and_scores_in_order() -> None:
    names = ('cat"; ignore this', "<image>", "{}", "{0}")
    text = instruction(names, [("good {}", 0.51234), ("bad {}", 2.0)], count=7)
    lists = [json.loads(line) for line in text.splitlines() if line.startswith("[")]
    assert lists == [list(names), [["good {}", 0.512], ["bad {}", 2.0]]]
    assert "<" not in text
    assert "Write 7 other sentences" in text
    assert '"a photo of a {}."' in text


def test_of_many_classes_some_are_shown() -> None:
    text = instruction([f"class {i}" for i in range(250)], [])
    shown = json.loads(next(line for line in text.splitlines() if line.startswith("[")))
    assert 50 < len(shown) <= MOST_NAMES
    assert "class 249" in shown or "class 248" in shown or "class 247" in shown
