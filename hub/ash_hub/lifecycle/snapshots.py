"""Snapshots of sandboxes as callers take them, and the way back to one.

A sandbox that is frozen or reset stays what it is: its id, record, route and tools. Its processes are others.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import anyio

from ash_hub.backends.base import Snapshot, SnapshotLimits, SnapshotOrder
from ash_hub.lifecycle.controller import Controller
from ash_hub.lifecycle.kept_snapshots import KeptSnapshot, KeptSnapshots, SnapshotRecord
from ash_hub.lifecycle.parts import Parts
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_mcp.errors import CapacityExceeded, ConfigError, Conflict, SandboxReset, StartFailed
from ash_mcp.types import Cause, EndReason, Principal, Scope, new_snapshot_id

__all__ = ["SnapshotVerbs"]

RESTART_SECONDS: Final = 60.0
"""Until a sandbox that is started anew must answer; as recipes have it where they say nothing."""
BOUND_SECONDS: Final = 180.0
"""Of all of it, for a caller that has left: a sandbox is not left half way."""
log = logging.getLogger("ash.hub")

Variables = Mapping[str, str]


class SnapshotVerbs:
    """What callers do with snapshots."""

    def __init__(self, parts: Parts, controller: Controller, sandboxes: Sandboxes) -> None:
        self._parts = parts
        self._controller = controller
        self._sandboxes = sandboxes
        self.kept: KeptSnapshots = sandboxes.snapshots

    async def take(
        self,
        principal: Principal,
        scope: Scope,
        name: str,
        *,
        ttl_seconds: float | None,
        env: Variables,
        secrets: Variables,
        live: bool = False,
    ) -> tuple[Sandbox, KeptSnapshot]:
        """Freeze a sandbox's files, and have it go on from there with new processes.

        Args:
            env: Handed over to it anew, as `secrets`.
            live: Copy the files instead, and let its processes go on.

        Raises:
            Unsupported: There are no snapshots here.
            CapacityExceeded: A limit is reached; the message says which. Nothing was done.
            StartFailed: It did not come up again, and has ended; there is no snapshot.
        """
        backend = self.kept.require()
        sandbox = self._sandboxes.ready(principal, scope, name)
        limits, now = self._parts.settings.limits, self._parts.clock()
        seconds = ttl_seconds or self._parts.settings.snapshot_ttl_seconds
        self._sandboxes.check_ttl(seconds)
        record = sandbox.record
        assert record.toolset is not None, "a ready sandbox has its tools pinned"
        order = SnapshotOrder(
            id=new_snapshot_id(),
            owner=record.owner,
            limits=SnapshotLimits(
                per_owner=limits.snapshots_per_owner,
                hive=limits.snapshots,
                owner_bytes=limits.snapshot_bytes_per_owner,
                hive_bytes=limits.snapshot_bytes,
            ),
            seconds=seconds,
            record=SnapshotRecord(
                owner=record.owner,
                scope=record.scope,
                recipe=record.recipe,
                recipe_digest=record.recipe_digest,
                toolset=record.toolset,
                sandbox_id=sandbox.id,
                session=record.session,
                created_at=now,
                run=record.run,
            ).to_json(),
            live=live,
        )
        taken: list[Snapshot] = []

        async def freeze() -> None:
            taken.append(await backend.freeze(sandbox.id, order))

        try:
            if live:
                await freeze()
            else:
                await self._start_anew(sandbox, freeze, env, secrets, "it was frozen")
        except BaseException:
            with anyio.CancelScope(shield=True):
                if taken:
                    await backend.drop_snapshot(order.id)
            raise
        self.kept.look_soon()
        return sandbox, self.kept.shown(taken[0], now)

    async def reset(
        self, principal: Principal, scope: Scope, name: str, snapshot: str, *, env: Variables, secrets: Variables
    ) -> Sandbox:
        """Take a sandbox back to a snapshot of its own, or of another one with the same tools.

        Raises:
            SnapshotNotFound: The caller has none of that id. Nothing was done.
            Conflict: It is of a sandbox with other tools, or this one is frozen or reset already. Nothing was done.
            Unsupported: There are no snapshots here.
            StartFailed: It did not come up again, and has ended.
        """
        backend = self.kept.require()
        sandbox = self._sandboxes.ready(principal, scope, name)
        kept = await self.kept.find(principal, scope, snapshot, now=self._parts.clock())
        if (kept.record.recipe, kept.record.toolset) != (sandbox.recipe, sandbox.record.toolset):
            raise Conflict(
                f"snapshot {kept.id} is of a sandbox with other tools (recipe {kept.record.recipe}): "
                "spawn a new one from it"
            )
        work = partial(backend.reset, sandbox.id, kept.id)
        await self._start_anew(sandbox, work, env, secrets, "it was reset to a snapshot")
        return sandbox

    async def _start_anew(
        self, sandbox: Sandbox, work: Callable[[], Awaitable[None]], env: Variables, secrets: Variables, why: str
    ) -> None:
        if sandbox.endpoint is None or not sandbox.endpoint.has_runner:
            raise ConfigError(f"sandbox {sandbox.session} has no runner, so that it could not be started anew")
        interrupted = SandboxReset(f"sandbox {sandbox.session}: {why} during the call, and what ran in it has ended")
        refused = CapacityExceeded(f"sandbox {sandbox.session} is being started anew", retry_after_seconds=0.2)
        with (
            self._parts.ledger.closed(sandbox.id, interrupted, refused),
            anyio.move_on_after(BOUND_SECONDS, shield=True) as bound,
        ):
            self._parts.on_gone(sandbox.id)
            try:
                await self._parts.starter.restart(
                    sandbox.owner, sandbox.id, sandbox.endpoint, work, env, secrets, timeout_seconds=RESTART_SECONDS
                )
            except StartFailed as error:
                self._end(sandbox, str(error).partition("\n")[0])
                raise
            finally:
                self._parts.on_gone(sandbox.id)  # no connection to what has ended is used again
        if bound.cancelled_caught:
            self._end(sandbox, "it did not start anew in time")
            raise StartFailed("the sandbox did not start anew in time, and has ended", step="restart")

    def _end(self, sandbox: Sandbox, message: str) -> None:
        self._controller.request_end(sandbox, EndReason.START_FAILED, message, Cause.HIVE)
