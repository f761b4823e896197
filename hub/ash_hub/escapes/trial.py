"""An attempt carried out in a sandbox."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio

from ash_hub.backends.base import Instance
from ash_hub.escapes.attempt import Attempt, Outcome, Verdict, program, verdict
from ash_hub.escapes.bait import Bait

__all__ = ["Prison", "Ran", "try_to_escape"]

_SECONDS = 60.0


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
    """What a sandbox was given: `memory_bytes`, `processes`, `open_files`, `cpu`, `places` (path -> bytes). What the
    backend says it cannot bound on this host is left out."""
    run_dir: str
    """Where the hive has its sockets."""
    hidden_paths: Sequence[str] = ()
    """Directories of the host that are seen inside, but not under their names."""


async def try_to_escape(attempt: Attempt, prison: Prison, bait: Bait, inside: Instance, other: Instance) -> Outcome:
    """Make one attempt from `inside`, beside a sandbox `other`, and say what became of it."""
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
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, ValueError) as error:
        if attempt.fatal:
            return Outcome(attempt, Verdict.STOPPED, "its whole sandbox ended")
        return Outcome(attempt, Verdict.BROKEN, f"the sandbox did not answer: {error!r}")
    return verdict(attempt, ran.code, ran.out, ran.error)
