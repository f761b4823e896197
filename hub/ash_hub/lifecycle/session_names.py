"""Session names, places and idempotency keys of sandboxes: taken in the store, freed of holders that died too early.

A replica that is killed between taking a name and making the sandbox leaves name and place with a sandbox that nobody
has. They are freed by the next resync, and before that by a spawn that wants the name or finds no place.
"""

from __future__ import annotations

import logging
import math

import anyio

from ash_hub.backends.base import Backend
from ash_hub.lifecycle.registry import Registry
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.siblings import Siblings
from ash_mcp.errors import CapacityExceeded, SessionTaken
from ash_mcp.types import RunId, SandboxId, Scope, SessionName
from ash_router.store.base import PlaceLimits, Store

__all__ = ["Names", "hold_again"]

log = logging.getLogger("ash.hub")

_FREE_SECONDS = 1.0


class Names:
    """Takes names for sandboxes that are about to be made."""

    def __init__(self, store: Store, backend: Backend, registry: Registry, siblings: Siblings) -> None:
        self._store = store
        self._backend = backend
        self._registry = registry
        self._siblings = siblings
        self._freed_at = -math.inf

    async def claim_key(self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId) -> SandboxId:
        """Bind an idempotency key and return the sandbox that it is bound to, the first one to come."""
        holder = await self._store.claim_key(owner, scope, key, sandbox_id)
        if holder != sandbox_id and await self._was_never_made(holder):
            await self._store.release_key(owner, scope, key, holder)
            holder = await self._store.claim_key(owner, scope, key, sandbox_id)
        return holder

    async def reserve(
        self,
        owner: str,
        scope: Scope,
        wanted: SessionName | None,
        sandbox_id: SandboxId,
        most: PlaceLimits,
        run: RunId | None = None,
    ) -> SessionName:
        """Take a session name, and a place among the living.

        Raises:
            RunEnded: The run that it is for is not open.
            SessionTaken: Another sandbox has it; retryable where that is a spawn which may still fail.
            CapacityExceeded: The owner, or the hive, has as many sandboxes as it may.
        """
        try:
            return await self._store.reserve_session(owner, scope, wanted, sandbox_id, most=most, run=run)
        except SessionTaken as taken:
            holder = taken.data.get("holder")
            if wanted is None or holder is None:
                raise
            if not await self._has_ended(SandboxId(holder)):
                if await self._exists(SandboxId(holder)):
                    raise
                raise SessionTaken(
                    f"another spawn is just taking the session {wanted}; try again", retryable=True, holder=holder
                ) from taken
            await self._store.release_session(owner, scope, wanted, SandboxId(holder))
        except CapacityExceeded as full:
            if not await self._free_abandoned_places(None if full.data.get("limit") == "hive" else owner):
                raise
        return await self._store.reserve_session(owner, scope, wanted, sandbox_id, most=most, run=run)

    async def _free_abandoned_places(self, owner: str | None) -> bool:
        """Free the abandoned places of an owner, or of all; at most once a second, however often it is called."""
        if anyio.current_time() < self._freed_at + _FREE_SECONDS:
            return False
        self._freed_at = anyio.current_time()
        return await self.free_places(owner)

    async def free_places(self, owner: str | None = None) -> bool:
        """Free the places of an owner, or of all, whose sandbox does not exist; return whether there were any."""
        freed = False
        for holder, place in (await self._store.places()).items():
            if owner in (None, place.owner) and await self._has_ended(holder):
                await self._store.release_session(place.owner, place.scope, place.session, holder)
                freed = True
        return freed

    async def _has_ended(self, holder: SandboxId) -> bool:
        known = self._registry.by_id(holder)
        return await self._was_never_made(holder) if known is None else known.state.ended

    async def _was_never_made(self, holder: SandboxId) -> bool:
        if self._registry.by_id(holder) is not None:
            return False
        if await self._siblings.is_being_made(holder) or await self._exists(holder):
            return False
        log.warning("freeing a name of a sandbox that was never made", extra={"sandbox": holder})
        return True

    async def _exists(self, holder: SandboxId) -> bool:
        return self._registry.by_id(holder) is not None or await self._backend.get(holder) is not None


async def hold_again(store: Store, sandbox: Sandbox) -> None:
    """Have the store know what a sandbox held before the store, or the hive, was another.

    Raises:
        ConnectFailed: The store is away.
    """
    if (run := sandbox.record.run) is not None:
        await store.renew_run(run.id, run, restoring=True)
    try:
        await store.reserve_session(sandbox.owner, sandbox.scope, sandbox.session, sandbox.id, restoring=True)
    except SessionTaken:
        log.error("another sandbox got its name", extra={"sandbox": sandbox.id, "session": sandbox.session})
    if sandbox.key is not None:
        await store.claim_key(sandbox.owner, sandbox.scope, sandbox.key, sandbox.id, restoring=True)
