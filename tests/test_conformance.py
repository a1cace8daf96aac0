"""The conformance suite on the linear world, and on worlds that break one promise each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import LinearWorld, declare, first_is, other_model, too_few, with_values

from blackbox_vlm.backend import Access, Answer, Backend, Capabilities, Request, ScoreKind
from blackbox_vlm.errors import ContractError, NotSent
from blackbox_vlm.testing import BackendConformance

RESTRICTIONS: list[dict[str, Any]] = [
    {},
    {"images_per_request": 1, "texts_per_request": 2, "idempotent": True},
    {"decimals": 2, "top_k": 1, "score_kind": ScoreKind.SOFTMAX, "requests_per_batch": 5},
    {"score_kind": ScoreKind.SIGMOID, "requests_per_batch": 2, "idempotent": True},
]


@pytest.mark.parametrize("restrictions", RESTRICTIONS, ids=str)
@pytest.mark.parametrize("access", Access)
class TestLinearWorld(BackendConformance):
    @pytest.fixture(autouse=True)
    def _setting(self, access: Access, restrictions: dict[str, Any]) -> None:
        self._capabilities = declare(access, **restrictions)

    def make_backend(self) -> Backend:
        return LinearWorld(self._capabilities)


class Broken(LinearWorld):
    """A world of soft access, with limits and batches, that spoils its answers."""

    def __init__(
        self,
        spoil: Callable[[list[Answer]], list[Answer]] = lambda answers: answers,
        **changes: Any,
    ) -> None:
        limits = {"images_per_request": 2, "texts_per_request": 3, "requests_per_batch": 4}
        super().__init__(declare(Access.SOFT, idempotent=True, **(limits | changes)))
        self.spoil = spoil

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return self.spoil(await super().answer(requests))


class Careless(Broken):
    """Checks no limit and no access level."""

    def _check(self, request: Request) -> None:
        pass


class Moody(Broken):
    """Never says the same twice."""

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        answers = await super().answer(requests)
        return [replace(a, values=a.values + np.float32(self.asked)) for a in answers]


class Drifting(Broken):
    """Declares something else after the first answer."""

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        answers = await super().answer(requests)
        self.capabilities: Capabilities = replace(self.capabilities, concurrency=2)
        return answers


class Fragile(Broken):
    """Cannot be closed twice."""

    async def aclose(self) -> None:
        await super().aclose()
        if self.closed > 1:
            raise NotSent("closed already")


def reverse(answers: list[Answer]) -> list[Answer]:
    return answers[::-1]


def doubles(answers: list[Answer]) -> list[Answer]:
    return with_values(lambda values: values.astype(np.float64))(answers)


SEAM = "test_answers_have_the_declared_shape_and_type"
SANE = "test_capabilities_are_sane_and_constant"
BREACHES: list[Any] = [
    (SEAM, lambda: Broken(other_model), ContractError),
    (SEAM, lambda: Broken(first_is(np.nan)), ContractError),
    (SEAM, lambda: Broken(with_values(lambda v: v[:, 1:])), ContractError),
    (SEAM, lambda: Broken(too_few), ValueError),
    (SEAM, lambda: Broken(doubles), AssertionError),
    (SANE, lambda: Broken(concurrency=0), AssertionError),
    (SANE, lambda: Broken(top_k=0), AssertionError),
    (SANE, lambda: Broken(model_id=""), AssertionError),
    (SANE, lambda: Broken(soft_prompts=None), AssertionError),
    (SANE, Drifting, AssertionError),
    ("test_an_idempotent_backend_repeats_itself", Moody, AssertionError),
    ("test_a_batch_is_answered_in_order", lambda: Broken(reverse), AssertionError),
    ("test_limits_are_enforced", Careless, AssertionError),
    ("test_limits_are_enforced", lambda: Careless(texts_per_request=None), AssertionError),
    ("test_limits_are_enforced", lambda: Careless(images_per_request=None), AssertionError),
    ("test_kinds_outside_the_access_level_are_refused", Careless, AssertionError),
    ("test_closing_twice_is_harmless", Fragile, NotSent),
]


@pytest.mark.parametrize(("test", "make", "error"), BREACHES)
def test_a_broken_promise_is_found(
    tmp_path: Path, test: str, make: Callable[[], Backend], error: type[Exception]
) -> None:
    class Suite(BackendConformance):
        def make_backend(self) -> Backend:
            return make()

    arguments = [] if "closing" in test else [tmp_path]
    with pytest.raises(error):
        getattr(Suite(), test)(*arguments)


def test_a_sound_world_passes_where_the_broken_ones_fail(tmp_path: Path) -> None:
    class Suite(BackendConformance):
        def make_backend(self) -> Backend:
            return Broken()

    for test in {test for test, _, _ in BREACHES}:
        getattr(Suite(), test)(*([] if "closing" in test else [tmp_path]))


def test_make_backend_is_wanted() -> None:
    with pytest.raises(NotImplementedError, match="make_backend"):
        BackendConformance().make_backend()
