"""Many spawns side by side: each with its own outcome, within one bound."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import anyio

from ash_mcp.errors import AshError, AshTimeout, ConfigError
from ash_mcp.sandbox import Sandbox
from ash_mcp.types import SandboxInfo

__all__ = ["SpawnedMany", "spawn_many"]

_CLEANUP_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class SpawnedMany:
    """What became of many spawns, by index."""

    made: Mapping[int, Sandbox]
    failed: Mapping[int, AshError]

    @property
    def sandboxes(self) -> Sequence[Sandbox]:
        """Those that were made, in the order of their indices."""
        return [self.made[index] for index in sorted(self.made)]

    def check(self) -> Sequence[Sandbox]:
        """Return all sandboxes; where one is lacking, raise why the first of these failed."""
        if self.failed:
            raise self.failed[min(self.failed)]
        return self.sandboxes


async def spawn_many(
    spawn: Callable[..., Awaitable[Sandbox]],
    count: int,
    recipe: str | Mapping[str, Any] | None,
    asked: Mapping[str, Any],
    *,
    at_once: int,
    timeout_seconds: float,
    on_ready: Callable[[int, SandboxInfo | AshError], None] | None,
) -> SpawnedMany:
    """Spawn `count` sandboxes with `Hive.spawn` or `Run.spawn`; see `Hive.spawn_many`."""
    if count < 1 or at_once < 1:
        raise ConfigError("count and at_once are at least 1")
    if asked.get("session") is not None:
        raise ConfigError("a session name is one sandbox's; leave it out, or spawn them one by one")
    keys = asked.get("idempotency_key") or uuid.uuid4().hex
    room, deadline = anyio.CapacityLimiter(at_once), anyio.current_time() + timeout_seconds
    made: dict[int, Sandbox] = {}
    failed: dict[int, AshError] = {}

    async def one(index: int) -> None:
        async with room:
            outcome: SandboxInfo | AshError
            left = deadline - anyio.current_time()
            try:
                if left <= 0:
                    raise AshTimeout(f"its turn did not come within {timeout_seconds:g} s; nothing was made")
                mine = {**asked, "idempotency_key": f"{keys}#{index}", "timeout_seconds": left}
                made[index] = await spawn(recipe, **mine)
                outcome = made[index].info
            except AshError as error:
                outcome = failed[index] = error
            if on_ready is not None:
                on_ready(index, outcome)

    try:
        async with anyio.create_task_group() as group:
            for index in range(count):
                group.start_soon(one, index)
    except BaseException:
        with anyio.move_on_after(_CLEANUP_SECONDS, shield=True):
            async with anyio.create_task_group() as group:
                for box in made.values():
                    group.start_soon(_destroy, box)
        raise
    return SpawnedMany(made, failed)


async def _destroy(box: Sandbox) -> None:
    try:
        await box.destroy()
    except AshError:
        return  # it lives until its time is over; what is raised already says more
