"""The escape suite on the local backend, an attempt a test; `pytest -rP` shows what each tried and what stopped it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from ash_hub.backends.base import Instance, Phase
from ash_hub.testing.conformance import Jail, jail
from ash_hub.testing.escapes import ATTEMPTS, Attempt, Verdict
from ash_mcp.types import Endpoint, SandboxId
from tests.hub.backends.local.local_parts import needs_isolation, run_inside, under_test

pytestmark = [pytest.mark.anyio, needs_isolation]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


SANDBOXES = {
    "bubblewrap": {"launcher": "bubblewrap"},
    "bubblewrap, read-only": {"launcher": "bubblewrap", "machine": False},
    "fork": {"launcher": "fork"},
    "fork, read-only": {"launcher": "fork", "machine": False},
}
QUICK = "bubblewrap"
"""The others are heavy. A launch by `fork` is refused while sandboxes have all descriptors in flight that their
ordinary user may have. Some of these attempts do that, and other workers of the quick suite make them at the same
time."""


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == QUICK else pytest.mark.heavy) for name in SANDBOXES]
)
async def cell(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[Jail]:
    async with under_test(**SANDBOXES[request.param]) as it, jail(it) as made:
        yield made


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
async def test_a_hostile_sandbox_does_not_get_out(attempt: Attempt, cell: Jail) -> None:
    outcome = await cell.attempt(attempt)
    print(outcome)  # noqa: T201 - the report of the suite
    if outcome.verdict in (Verdict.ABSENT, Verdict.SHARED):
        pytest.skip(str(outcome))
    assert outcome.verdict is Verdict.STOPPED, str(outcome)


async def test_a_command_given_up_in_the_turn_in_which_its_answer_arrives_breaks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    instance = Instance(id=SandboxId("sbx-x"), phase=Phase.RUNNING, endpoint=Endpoint(unix=str(path)))
    with anyio.CancelScope() as scope, socket.socket(socket.AF_UNIX) as listener:

        async def answer_and_give_up() -> None:
            with accepted[0]:
                await anyio.wait_readable(accepted[0])
                accepted[0].send(b"{}")
                # runs before what the loop then hears of the answer
                asyncio.get_running_loop().call_soon(scope.cancel)

        listener.bind(str(path))
        listener.listen()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_inside, instance, "true")
            await anyio.wait_readable(listener)
            accepted = listener.accept()
            tasks.start_soon(answer_and_give_up)
    assert scope.cancelled_caught


def test_the_suite_is_as_long_as_it_was_meant_to_be_and_no_name_comes_twice() -> None:
    assert len(ATTEMPTS) >= 40
    assert len({attempt.name for attempt in ATTEMPTS}) == len(ATTEMPTS)
    assert all(attempt.stopped_by for attempt in ATTEMPTS)
