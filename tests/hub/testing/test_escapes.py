"""The escape suite itself: what it says of a backend that shares something with the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ash_hub.backends.base import Instance, Phase
from ash_hub.testing.escapes import ATTEMPTS, Attempt, Bait, Prison, Verdict, try_to_escape
from ash_mcp.types import SandboxId
from tests.hub.backends.local.local_parts import Done

pytestmark = pytest.mark.anyio

BAIT = Bait(
    secret="s",
    file="f",
    home="h",
    pid=1,
    port=1,
    abstract="a",
    shared_memory=0,
    hostname="n",
    locked=(),
    locked_device="",
)


def attempt(name: str) -> Attempt:
    (found,) = (it for it in ATTEMPTS if it.name == name)
    return found


@pytest.mark.parametrize("name", ["quota: terminals", "locks on files", "watch the neighbour", "flood: memory"])
async def test_what_a_backend_does_not_bound_is_not_tried_and_never_passes(name: str) -> None:
    async def run(instance: Instance, command: Sequence[str]) -> Any:
        raise AssertionError("it was made")

    prison = Prison(run=run, bounds={}, serve=lambda spec, _: spec, hive_bytes=lambda: 0, run_dir="/")
    box = Instance(id=SandboxId("sbx-x"), phase=Phase.RUNNING)
    outcome = await try_to_escape(attempt(name), prison, BAIT, box, box)
    assert outcome.verdict is Verdict.SHARED and str(attempt(name).bound) in str(outcome)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("escaped eth0", Verdict.SHARED), ("stopped only lo", Verdict.STOPPED), ("nonsense", Verdict.BROKEN)],
)
async def test_a_success_that_is_known_of_a_backend_is_shared_with_its_reason(said: str, expected: Verdict) -> None:
    async def run(instance: Instance, command: Sequence[str]) -> Done:
        return Done(0, said + "\n", "")

    prison = Prison(
        run=run,
        bounds={},
        serve=lambda spec, _: spec,
        hive_bytes=lambda: 0,
        lacks={"interfaces": "it is the pod's"},
    )
    box = Instance(id=SandboxId("sbx-x"), phase=Phase.RUNNING)
    outcome = await try_to_escape(attempt("interfaces"), prison, BAIT, box, box)
    assert outcome.verdict is expected
    assert ("it is the pod's" in outcome.how) == (expected is Verdict.SHARED)
    if expected is Verdict.SHARED:  # of another attempt nothing is known
        outcome = await try_to_escape(attempt("host name"), prison, BAIT, box, box)
        assert outcome.verdict is Verdict.ESCAPED
