"""A trial of the launcher that forks: one process is started behind walls, with nothing loaded, and ended."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ash_hub.backends.local import seccomp
from ash_hub.backends.local.forks import fork_order
from ash_hub.backends.local.keeper.launchers import ForkParents
from ash_hub.backends.local.keeper.user_ranges import UserRanges
from ash_hub.backends.local.limits import Enforcement, Limits
from ash_hub.backends.local.plans import HostFacts, IsolatedPlans
from ash_hub.backends.local.runtime import Runtime
from ash_mcp.types import SandboxId, SandboxSpec

__all__ = ["try_to_fork"]

_SECONDS = 15.0
_NOTHING = "load = lambda given: None\nmain = lambda: 0"
_MIB = 1024 * 1024
_LIMITS = Limits(
    memory_bytes=256 * _MIB,
    cpu=None,
    processes=64,
    open_files=64,
    workspace_bytes=_MIB,
    home_bytes=_MIB,
    tmp_bytes=_MIB,
    shm_bytes=_MIB,
)


def try_to_fork(facts: HostFacts, runtime: Runtime) -> str | None:
    """Return why no process can be forked for sandboxes here, or None. Not to be called where an event loop runs."""
    return asyncio.run(_tried(facts, runtime))


async def _tried(facts: HostFacts, runtime: Runtime) -> str | None:
    spec = SandboxSpec(id=SandboxId("sbx-trial"), recipe="trial", server={"python": "none:none"}, installed=True)
    nothing = replace(runtime, forked=_NOTHING)
    enforcement = Enforcement(version=0, controllers=frozenset(), namespaced_processes=False)
    plan = IsolatedPlans(facts, enforcement, Path("/")).plan(spec, nothing, _LIMITS)
    order: Mapping[str, Any] = fork_order(
        spec,
        nothing,
        plan,
        system_call_filter=seccomp.for_machine(os.uname().machine, nests=True),
        group={},
        idle_seconds=_SECONDS,
        changes="",
    )
    told: list[Mapping[str, Any]] = []
    parents = ForkParents(lambda name: None, UserRanges(), told.append)
    try:
        parents.prepare(json.loads(json.dumps(order)))
        async with asyncio.timeout(_SECONDS):
            await parents.until_known(order["key"])
        return next((message["why"] for message in told), "it was not heard of")
    except TimeoutError:
        return f"it was not ready within {_SECONDS:g} s"
    finally:
        parents.end()
        await parents.cleared()
