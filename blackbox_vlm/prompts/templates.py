"""Which words to put around a class name: candidates for a search, in a fixed order.

The task's own template comes first and is what everything else is compared with. Then come
variations of it (a modifier before its medium, other openings before what it says after the name),
because a template that names the domain is hard to beat by one that does not, and between them
frames that suit any domain. The most different ones are first, since a small budget tries only the
beginning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

from blackbox_vlm._classes import MAX_TEMPLATE, check_template
from blackbox_vlm.errors import InputError

PLACE = "{}"
PHOTO = "a photo of a {}."

FRAMES = (
    "{}",
    PHOTO,
    "a photo of {}.",
    "a close-up photo of a {}.",
    "a drawing of a {}.",
    "an image that shows {}.",
    "a satellite image of {}.",
    "a {} in its usual surroundings.",
    "a painting of a {}.",
    "the texture of {}.",
    "one {} on a plain background.",
    "a typical example of {}.",
    "many {}s together.",
    "a sketch of a {}.",
    "a product photo of a {}.",
    "a {} seen from above.",
    "this is a {}.",
    "the word for this picture is {}.",
    "a person with a {}.",
    "a cartoon of a {}.",
    "a microscope image of {}.",
    "a piece of {}.",
    "a {} outdoors.",
    "a {} indoors.",
    "an aerial photo of {}.",
    "part of a {}.",
    "a pattern that looks {}.",
    "the surface is {}.",
    "a toy {}.",
    "a 3D rendering of a {}.",
    "a stock photo of a {}.",
    "an old photo of a {}.",
    "a scan of a {}.",
    "a logo with a {}.",
    "a scene with {} in it.",
    "a kind of thing called {}.",
)

MODIFIERS = (
    "close-up",
    "blurry",
    "bright",
    "simple",
    "cropped",
    "dark",
    "detailed",
    "tiny",
    "cluttered",
    "black-and-white",
)

OPENINGS = (
    "{}",
    "a {}",
    "a picture of a {}",
    "a picture of {}",
    "a close-up of a {}",
    "many {}s",
    "a good view of the {}",
    "an example of {}",
)

_ARTICLE = re.compile(r"(an?|the) (?=\w)", re.IGNORECASE)
_EMPTY_TAILS = ("", ".", "!", "?")


class Prompt(NamedTuple):
    """A candidate: one text for every class.

    Attributes:
        name: the template; for class descriptions, what they are called in reports.
        texts: in label order.
    """

    name: str
    texts: tuple[str, ...]


def candidates(
    template: str, more: Iterable[str] = (), *, most: int | None = None
) -> tuple[str, ...]:
    """Different templates to try, the task's own first.

    Args:
        template: the task's own.
        more: others that somebody proposes; they come next.
        most: how many at most.

    Raises:
        InputError: one of those given holds "{}" not exactly once, is too long, or holds
            characters that nobody can see.
    """
    given = [check_template(text) for text in (template, *more)]
    kinds = _reopened(template), _modified(template), FRAMES, _modified(PHOTO)
    mixed = chain.from_iterable(zip_longest(*kinds))  # a small budget sees some of each
    every = dict.fromkeys([*given, *(text for text in mixed if text is not None)])
    return tuple(text for text in every if len(text) <= MAX_TEMPLATE)[:most]


def prompts(
    class_names: Sequence[str],
    templates: Iterable[str],
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Prompt, ...]:
    """The texts of templates and of class descriptions; those that say the same come once.

    Args:
        class_names: in label order.
        templates: the task's own first.
        descriptions: texts for every class, such as "a {} has white petals" or whole sentences; the
            i-th of all classes make one candidate, and a class with fewer starts over.

    Raises:
        InputError: a class has no description, one is there for a class that is not, or two
            classes share one.
    """
    made = [
        Prompt(template, tuple(template.replace(PLACE, name) for name in class_names))
        for template in templates
    ]
    for row in _described(class_names, descriptions or {}):
        _check_different(row)
        made.append(row)
    first: dict[tuple[str, ...], Prompt] = {}
    for prompt in made:
        first.setdefault(prompt.texts, prompt)
    return tuple(first.values())


def _described(
    class_names: Sequence[str], descriptions: Mapping[str, Sequence[str]]
) -> list[Prompt]:
    if not descriptions:
        return []
    for name in class_names:
        if isinstance(descriptions.get(name), str) or not descriptions.get(name):
            raise InputError(
                f"the class {name!a} has no list of descriptions; describe every class, or none"
            )
    unknown = sorted(set(descriptions) - set(class_names))
    if unknown:
        raise InputError(f"there are descriptions of {unknown[0]!a}, which is no class; remove it")
    rows = range(max(map(len, descriptions.values())))
    return [
        Prompt(f"description {row + 1}", tuple(_nth(descriptions[n], row, n) for n in class_names))
        for row in rows
    ]


def _check_different(prompt: Prompt) -> None:
    """An endpoint that names a text could not tell two classes with the same one apart."""
    if len(set(prompt.texts)) < len(prompt.texts):
        shared = next(text for text in prompt.texts if prompt.texts.count(text) > 1)
        raise InputError(f"two classes have the {prompt.name} {shared!a}; describe what differs")


def _nth(texts: Sequence[str], row: int, name: str) -> str:
    return texts[row % len(texts)].replace(PLACE, name)


def _reopened(template: str) -> Iterator[str]:
    """Opening x domain: "a photo of a {}, a type of flower." as "many {}s, a type of flower."."""
    tail = template.partition(PLACE)[2]
    return (start + tail for start in OPENINGS if tail.strip() not in _EMPTY_TAILS)


def _modified(template: str) -> Iterator[str]:
    """Modifier x medium: "a sketch of a {}." as "a blurry sketch of a {}."."""
    article = _ARTICLE.match(template.partition(PLACE)[0])
    if article is not None:
        rest = template[article.end() :]
        yield from (f"{_before(modifier)} {rest}" for modifier in MODIFIERS)


def _before(modifier: str) -> str:
    return f"{'an' if modifier[0] in 'aeiou' else 'a'} {modifier}"
