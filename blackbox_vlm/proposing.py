"""Where further templates come from: a language model, or a soft prompt of a local model.

Both only propose. What they propose enters a race, and is judged by the endpoint's own answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.backend import Backend, Completion, PromptScores, TextScores, nearest_text
from blackbox_vlm.craft import craft
from blackbox_vlm.craft.prompts import offsets, prompt_space
from blackbox_vlm.craft.recipes import Recipe
from blackbox_vlm.images import Image
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.prompts import proposals
from blackbox_vlm.prompts.race import cross_entropy
from blackbox_vlm.scores import centred
from blackbox_vlm.task import Classes

# Of step sizes 5, 10 and 20 and dimensions 64 and 512, this gave the best words on five development
# sets; smaller steps lead back to the template's own words. 400 evaluations take seconds.
SURROGATE = Recipe(
    name="surrogate",
    intrinsic_dimension=512,
    population_size=20,
    sigma0=10.0,
    consistency_weight=0.0,
)
GENERATIONS = 20
PROJECTED = 10  # templates


async def written_templates(
    writer: Meter,
    class_names: tuple[str, ...],
    tried: Sequence[tuple[str, float]],
    known: Sequence[str],
    *,
    count: int = proposals.COUNT,
    purpose: str = "proposals",
) -> tuple[str, ...]:
    """New templates from a language model, for one query of the run's own ledger.

    Args:
        writer: a meter over a backend of text access, on the ledger of the run.
        class_names: of the task.
        tried: templates and their mean losses, best first.
        known: templates that are candidates already, the task's own first.
        count: templates asked for; as many come back at most, and none perhaps.

    Raises:
        InputError: the endpoint writes no text.
        BudgetError, Interrupted, BackendError: as `Meter.observe`.
    """
    question = Completion(proposals.instruction(class_names, tried, count))
    [written] = await writer.observe([question], purpose)
    text = written.tobytes().decode("utf-8", "replace")
    return proposals.read_templates(text, class_names, known, count)


async def projected_templates(
    surrogate: Backend,
    ledger: Ledger,
    images: tuple[Image, ...],
    labels: NDArray[np.int64],
    classes: Classes,
    *,
    seed: int,
    count: int = PROJECTED,
) -> tuple[str, ...]:
    """Templates made of the words nearest to soft prompts that do well on a local model.

    CraFT's search (prompt generation alone) runs on the surrogate; each generation's best prompt
    `p0 + A z` is replaced, token by token, by words, and the surrogate ranks the templates that
    come of it.

    Args:
        surrogate: a local black box with soft access; its queries cost nothing but time.
        ledger: of its own, not the run's; `GENERATIONS * 20` queries and a few more, times the
            requests that one pass over the images takes (a local model: 1).
        images, labels, classes: of the task.
        seed: of the search.
        count: templates at most, the surrogate's best first.

    Raises:
        InputError: the surrogate takes no soft prompts, or does not turn them into words.
    """
    found = await _search(surrogate, Meter(surrogate, ledger), images, labels, classes, seed)
    known = [template for template in dict.fromkeys(found) if template != classes.template]
    if not known:
        return ()
    asked = [TextScores(images, Classes(classes.names, template).texts) for template in known]
    logits = centred(np.stack(await Meter(surrogate, ledger).observe(asked, "words")))
    order = np.argsort(cross_entropy(logits, labels).mean(axis=1), kind="stable")
    return tuple(known[i] for i in order[:count])


async def _search(
    surrogate: Backend,
    meter: Meter,
    images: tuple[Image, ...],
    labels: NDArray[np.int64],
    classes: Classes,
    seed: int,
) -> list[str]:
    """The best prompt of every generation, in words."""
    soft = meter.capabilities.soft_prompts
    zero = np.zeros((soft.context_tokens, soft.width) if soft else (1, 1), dtype=np.float32)
    found = [nearest_text(surrogate, classes.template, zero)]  # or refuse before anything is asked
    assert soft is not None  # what turns soft prompts into words takes them
    space = prompt_space(soft, SURROGATE.intrinsic_dimension, entry_std=None, seed=seed)
    state = craft.init(SURROGATE, len(classes.names), seed)
    for _ in range(GENERATIONS):
        candidates, state = craft.ask(SURROGATE, seed, state)
        prompts = offsets(space, candidates)
        asked = [PromptScores(images, classes.names, classes.template, p) for p in prompts]
        logits = centred(np.stack(await meter.observe(asked, "surrogate")))
        state, fitness = craft.tell_prompts(SURROGATE, seed, state, candidates, logits, labels)
        found.append(nearest_text(surrogate, classes.template, prompts[fitness.argmin()]))
    return found
