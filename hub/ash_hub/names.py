"""Session names and idempotency keys of sandboxes: taken in the store, and freed of holders that died too early.

A replica that is killed between taking a name and making the sandbox leaves the name with a sandbox that nobody has.
Nobody looks for those; who next wants the name finds out and takes it.
"""

from __future__ import annotations

import logging

from ash_hub.backends.base import Backend
from ash_hub.registry import Registry
from ash_hub.sandbox import Sandbox
from ash_hub.siblings import Siblings
from ash_mcp.errors import SessionTaken
from ash_mcp.types import SandboxId, Scope, SessionName
from ash_router.store.base import Store

__all__ = ["Names", "hold_again"]

log = logging.getLogger("ash.hub")


class Names:
    """Takes names for sandboxes that are about to be made."""

    def __init__(self, store: Store, backend: Backend, registry: Registry, siblings: Siblings) -> None:
        self._store = store
        self._backend = backend
        self._registry = registry
        self._siblings = siblings

    async def claim_key(self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId) -> SandboxId:
        """Bind an idempotency key and return the sandbox that it is bound to, the first one to come."""
        holder = await self._store.claim_key(owner, scope, key, sandbox_id)
        if holder != sandbox_id and await self._is_nobody(holder):
            await self._store.release_key(owner, scope, key, holder)
            holder = await self._store.claim_key(owner, scope, key, sandbox_id)
        return holder

    async def reserve(
        self, owner: str, scope: Scope, wanted: SessionName | None, sandbox_id: SandboxId
    ) -> SessionName:
        """Take a session name.

        Raises:
            SessionTaken: Another sandbox has it.
        """
        try:
            return await self._store.reserve_session(owner, scope, wanted, sandbox_id)
        except SessionTaken as taken:
            holder = taken.data.get("holder")
            if wanted is None or holder is None or not await self._is_nobody(SandboxId(holder)):
                raise
            await self._store.release_session(owner, scope, wanted, SandboxId(holder))
            return await self._store.reserve_session(owner, scope, wanted, sandbox_id)

    async def _is_nobody(self, holder: SandboxId) -> bool:
        if self._registry.by_id(holder) is not None or await self._siblings.make(holder):
            return False
        if await self._backend.get(holder) is not None:
            return False
        log.warning("freeing a name of a sandbox that was never made", extra={"sandbox": holder})
        return True


async def hold_again(store: Store, sandbox: Sandbox) -> None:
    """Have the store know what a sandbox held before the store, or the hive, was another.

    Raises:
        ConnectFailed: The store is away.
    """
    try:
        await store.reserve_session(sandbox.owner, sandbox.scope, sandbox.session, sandbox.id, restoring=True)
    except SessionTaken:
        log.error("another sandbox got its name", extra={"sandbox": sandbox.id, "session": sandbox.session})
    if sandbox.key is not None:
        await store.claim_key(sandbox.owner, sandbox.scope, sandbox.key, sandbox.id, restoring=True)
