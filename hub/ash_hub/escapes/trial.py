"""An attempt carried out in a sandbox."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio

from ash_hub.backends.base import Instance
from ash_hub.escapes.attempt import Attempt, Outcome, Verdict, program, verdict
from ash_hub.escapes.bait import Bait

__all__ = ["Prison", "Ran", "try_to_escape"]

_SECONDS = 60.0
_ANSWER_SECONDS = 10.0
_PAUSE_SECONDS = 0.05
_NO_ANSWER = (OSError, anyio.EndOfStream, anyio.BrokenResourceError, ValueError)


class Ran(Protocol):
    """What a command inside a sandbox did."""

    @property
    def code(self) -> int: ...
    @property
    def out(self) -> str: ...
    @property
    def error(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prison:
    """What the escape suite needs to know of a backend that promises isolation."""

    run: Callable[[Instance, Sequence[str]], Awaitable[Ran]]
    """Runs a command in a sandbox. A sandbox that dies meanwhile is a ConnectionError or an EndOfStream."""
    bounds: Mapping[str, Any]
    """What a sandbox was given: `memory_bytes`, `processes`, `open_files`, `cpu`, `places` (path -> bytes), and
    `hive_bytes`, what it may make the hive take. What the backend says it cannot bound on this host is left out."""
    hive_bytes: Callable[[], int]
    """Tells what the hive's own processes and directories take of memory and disk."""
    run_dir: str
    """Where the hive has its sockets."""
    hidden_paths: Sequence[str] = ()
    """Directories of the host that are seen inside, but not under their names."""


async def try_to_escape(attempt: Attempt, prison: Prison, bait: Bait, inside: Instance, other: Instance) -> Outcome:
    """Make one attempt from `inside`, beside a sandbox `other`, and say what became of it."""
    if not attempt.watched:
        return await _carried_out(attempt, prison, bait, inside, other)
    outcomes: list[Outcome] = []

    async def carry_out() -> None:
        outcomes.append(await _carried_out(attempt, prison, bait, inside, other))
        tasks.cancel_scope.cancel()

    async def notice(harm: Awaitable[str]) -> None:
        outcomes.append(Outcome(attempt, Verdict.ESCAPED, await harm))
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notice, _growth(prison))
        tasks.start_soon(notice, _silence(prison, other))
        tasks.start_soon(carry_out)
    return outcomes[0]


async def _growth(prison: Prison) -> str:
    """Return when the hive takes more than a sandbox may make it take."""
    bound, before = prison.bounds.get("hive_bytes", math.inf), prison.hive_bytes()
    while (grown := prison.hive_bytes() - before) <= bound:  # noqa: ASYNC110 - memory has no event
        await anyio.sleep(_PAUSE_SECONDS)
    return f"the hive takes {grown} bytes more"


async def _silence(prison: Prison, other: Instance) -> str:
    """Return when a neighbour is not answered."""
    while True:
        try:
            with anyio.fail_after(_ANSWER_SECONDS):
                await prison.run(other, ["true"])
        except _NO_ANSWER as error:
            return f"its neighbour does not answer: {error!r}"
        await anyio.sleep(_PAUSE_SECONDS)


async def _carried_out(attempt: Attempt, prison: Prison, bait: Bait, inside: Instance, other: Instance) -> Outcome:
    own, foreign = (one.endpoint.unix if one.endpoint else None for one in (inside, other))
    told = bait.to_json(
        bounds=dict(prison.bounds),
        run_dir=prison.run_dir,
        hidden_paths=list(prison.hidden_paths),
        socket=own,
        other=foreign,
    )
    try:
        with anyio.fail_after(_SECONDS):
            ran = await prison.run(inside, program(attempt, told))
    except _NO_ANSWER as error:
        if attempt.fatal:
            return Outcome(attempt, Verdict.STOPPED, "its whole sandbox ended")
        return Outcome(attempt, Verdict.BROKEN, f"the sandbox did not answer: {error!r}")
    return verdict(attempt, ran.code, ran.out, ran.error)
