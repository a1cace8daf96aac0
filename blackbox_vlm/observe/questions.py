"""What to ask an endpoint that only names the best of some texts, and what that costs (ours).

The plain question offers the classes. The others offer words that have nothing to do with them, a
list each: colours, tools, garments. They are of at most 18 words, since a chat model chooses badly
among many. Their order in `data/questions.txt` is greedy: the first lists told most on the training
images of the development sets that `choose.py` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from blackbox_vlm.backend import Capabilities
from blackbox_vlm.errors import InputError

Question = tuple[str, ...]  # the texts of one request

FEW = 6  # images per class, below which more candidates are more luck than choice


def n_candidates(images_per_class: float, most: int) -> int:
    """How many questions to ask about the training images, to find the `most` for a prediction.

    At one image per class nothing can be chosen, and the first ones stand. On the development sets
    19 candidates were better than 10 by 2 points at 8 and 16 images per class, and worse by 1 at 4.
    """
    if images_per_class < 2:
        return most
    return max(most, 10 if images_per_class < FEW else 19)


def candidate_questions(
    class_names: Sequence[str], template: str, *, limit: int | None, most: int
) -> tuple[Question, ...]:
    """The plain question, about the classes in the user's own template, then lists of words.

    Args:
        class_names, template: of the task.
        limit: texts per request; None: any number.
        most: questions in all, the plain one among them; there are 41.

    Raises:
        InputError: the classes are more than one request may list.
    """
    plain = tuple(template.replace("{}", name) for name in class_names)
    if limit is not None and len(plain) > limit:
        raise InputError(
            f"a label endpoint must see all {len(plain)} classes in one request, and this one "
            f"takes {limit} texts; use an endpoint with a higher limit"
        )
    questions = [plain, *(question[:limit] for question in word_questions())]
    return tuple(dict.fromkeys(questions))[: max(most, 1)]


@cache
def word_questions() -> tuple[Question, ...]:
    """The lists of words, at most 18 in each, most telling list first."""
    text = (files("blackbox_vlm") / "data" / "questions.txt").read_text(encoding="utf-8")
    return tuple(_read(line) for line in text.splitlines() if line and not line.startswith("#"))


def question_queries(n_images: int, n_questions: int, capabilities: Capabilities) -> int:
    """What it costs to ask so many questions about each of so many different images, in queries."""
    at_once = capabilities.images_per_request or max(n_images, 1)
    return n_questions * -(-n_images // at_once)


def affordable_questions(n_images: int, budget: int, capabilities: Capabilities) -> int:
    """How many questions about all of the images a budget of queries pays for."""
    return budget // max(question_queries(n_images, 1, capabilities), 1)


def _read(line: str) -> Question:
    template, words = line.split(" | ")
    return tuple(template.replace("{}", word) for word in words.split(", "))
