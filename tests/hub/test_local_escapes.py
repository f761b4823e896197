"""The escape suite on the local backend, an attempt a test; `pytest -rP` shows what each tried and what stopped it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from ash_hub.escapes import ATTEMPTS, Attempt, Verdict
from ash_hub.testing import Jail, jail
from tests.hub.local_parts import needs_isolation, under_test

pytestmark = [pytest.mark.anyio, needs_isolation]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def cell(anyio_backend: str) -> AsyncIterator[Jail]:
    async with under_test() as it, jail(it) as made:
        yield made


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
async def test_a_hostile_sandbox_does_not_get_out(attempt: Attempt, cell: Jail) -> None:
    outcome = await cell.attempt(attempt)
    print(outcome)  # noqa: T201 - the report of the suite
    if outcome.verdict is Verdict.ABSENT:
        pytest.skip(str(outcome))
    assert outcome.verdict is Verdict.STOPPED, str(outcome)


def test_the_suite_is_as_long_as_it_was_meant_to_be_and_no_name_comes_twice() -> None:
    assert len(ATTEMPTS) >= 40
    assert len({attempt.name for attempt in ATTEMPTS}) == len(ATTEMPTS)
    assert all(attempt.stopped_by for attempt in ATTEMPTS)
