"""Several sandboxes of one spawn: started side by side within a bound and a deadline, each with its own outcome."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio

from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_hub.spawning.spawn_request import SpawnAsk
from ash_hub.spawning.starting import Progress
from ash_mcp.errors import AshError, AshTimeout, CapacityExceeded, ConfigError, HiveFault
from ash_mcp.types import Principal, Scope

__all__ = ["Batch", "spawn_batch"]

log = logging.getLogger("ash.hub")


@dataclass(slots=True)
class Batch:
    """What became of each sandbox of a spawn, by its index."""

    count: int
    made: dict[int, Sandbox] = field(default_factory=dict[int, Sandbox])
    failed: dict[int, AshError] = field(default_factory=dict[int, AshError])

    @property
    def sandboxes(self) -> Sequence[Sandbox]:
        return [self.made[index] for index in sorted(self.made)]


async def spawn_batch(
    sandboxes: Sandboxes,
    principal: Principal,
    scope: Scope,
    ask: SpawnAsk,
    count: int,
    progress: Progress,
    *,
    at_once: int | None = None,
    deadline_seconds: float | None = None,
) -> Batch:
    """Make `count` sandboxes; those that fail keep none of the others from being made.

    Callers are told once that their tools changed. With an idempotency key each sandbox has one of its own, made of
    that and its index: the same spawn again returns those that there are and makes those that are lacking. What was
    made ends when its caller leaves before the answer, unless there is such a key: then it stays for the repetition.

    Args:
        at_once: How many are begun at the same time; None: as many as this hive and the caller may start.
        deadline_seconds: What is not ready by then is given up, as `AshTimeout`, retryable.

    Raises:
        ConfigError: The count is more than this hive takes, or a session is named, which is one sandbox's.
        CapacityExceeded: It is more than the caller may ever have; `data["limit"]` says whose limit that is.
    """
    _check_count(sandboxes, principal, ask, count)
    places = sandboxes.limits.places(principal)
    begun = min(count, at_once or min(sandboxes.limits.starting, places.starting or count))
    batch, room, full = Batch(count), anyio.CapacityLimiter(begun), list[CapacityExceeded]()

    async def one(index: int) -> None:
        key = (
            f"{ask.idempotency_key}#{index}" if ask.idempotency_key is not None and count > 1 else ask.idempotency_key
        )
        async with room:
            if full:  # the next ones would be refused as well, each later than the one before
                batch.failed[index] = full[0]
                return
            try:
                asked = ask.model_copy(update={"idempotency_key": key})
                batch.made[index] = await sandboxes.spawn(principal, scope, asked, _unheard, announce=False)
            except CapacityExceeded as error:
                batch.failed[index] = error
                if "limit" in error.data:  # else it is this one that has to wait
                    full.append(error)
            except AshError as error:
                batch.failed[index] = error
            except Exception:
                log.exception("a spawn of several failed inside the hive")
                batch.failed[index] = HiveFault("the spawn failed inside the hive; its log says why")
        done = len(batch.made) + len(batch.failed)
        await progress(0.95 * done / count, f"{len(batch.made)} of {count} are ready")

    try:
        with anyio.move_on_after(deadline_seconds):
            async with anyio.create_task_group() as group:
                for index in range(count):
                    group.start_soon(one, index)
    except BaseException:
        if ask.idempotency_key is None:
            await sandboxes.abandon(batch.sandboxes)
        raise
    finally:
        if batch.made:
            with anyio.CancelScope(shield=True):
                await sandboxes.announce(principal, scope)
    for index in range(count):
        if index not in batch.made and index not in batch.failed:
            message = f"it was not ready within deadline_seconds ({deadline_seconds:g}), and nothing is left of it"
            batch.failed[index] = AshTimeout(message, retryable=True)
    return batch


async def _unheard(done: float, message: str) -> None:
    """Take the progress of one of several, of which only the sum is told."""
    del done, message


def _check_count(sandboxes: Sandboxes, principal: Principal, ask: SpawnAsk, count: int) -> None:
    most = sandboxes.limits.spawn_count
    if count > most:
        raise ConfigError(
            f"count is at most {most} on this hive (ASH_HUB_LIMITS__SPAWN_COUNT), not {count}; spawn in several calls"
        )
    if count > 1 and ask.session is not None:
        raise ConfigError("a session name is one sandbox's: leave session out, or count")
    places = sandboxes.limits.places(principal)
    owner_most = places.owner if places.owner is not None else count
    if count > min(owner_most, places.hive or count):
        whose = ("key" if places.owner_by_key else "owner") if count > owner_most else "hive"
        allows = {"key": "your key allows", "owner": "one owner may have here", "hive": "this hive holds"}[whose]
        bound = owner_most if whose != "hive" else places.hive
        message = f"count is {count}, and {allows} {bound} sandboxes at most; nothing was made. Ask for fewer"
        raise CapacityExceeded(message, retryable=False, limit=whose)
