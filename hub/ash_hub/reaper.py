"""The reaper: ends what is over its time. Exactly one runs per hive, by a lease in the store."""

from __future__ import annotations

import logging
from typing import Final

import anyio

from ash_hub.sandboxes import Sandboxes
from ash_mcp.errors import ConnectFailed, LeaseHeld, LeaseLost
from ash_router.ledger import Ledger
from ash_router.store.base import Lease, Store

__all__ = ["Reaper"]

LEASE: Final = "reaper"
TICK_SECONDS: Final = 1.0
LEASE_SECONDS: Final = 10.0
log = logging.getLogger("ash.hub")


class Reaper:
    """Looks once a second; while another replica holds the lease it only reports its own calls to the store."""

    def __init__(self, sandboxes: Sandboxes, ledger: Ledger, store: Store, holder: str) -> None:
        self._sandboxes = sandboxes
        self._ledger = ledger
        self._store = store
        self._holder = holder
        self._lease: Lease | None = None

    async def run(self) -> None:
        """Reap until cancelled; gives the lease back then."""
        try:
            while True:
                await self.tick()
                await anyio.sleep(TICK_SECONDS)
        finally:
            if self._lease is not None:
                with anyio.move_on_after(1.0, shield=True):
                    await self._store.release(self._lease)

    async def tick(self) -> None:
        """Look once."""
        changed = self._ledger.take_changed()
        if changed:
            await self._store.touch(changed)
        if await self._leads():
            await self._sandboxes.expire()

    async def _leads(self) -> bool:
        try:
            if self._lease is None:
                self._lease = await self._store.grant(LEASE, self._holder, LEASE_SECONDS)
            else:
                self._lease = await self._store.renew(self._lease, LEASE_SECONDS)
        except (LeaseHeld, LeaseLost):
            self._lease = None
        except ConnectFailed:
            return False  # nobody can know who leads; time limits are kept again when the store is back
        return self._lease is not None
