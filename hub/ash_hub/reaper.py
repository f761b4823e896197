"""The reaper: ends what is over its time. Exactly one runs per hive, by a lease in the store."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final

import anyio

from ash_hub.reconcile import Reconciler
from ash_hub.sandboxes import Sandboxes
from ash_mcp.errors import AshError, ConnectFailed, LeaseHeld, LeaseLost
from ash_router.ledger import Ledger
from ash_router.store.base import Lease, Store

__all__ = ["Reaper"]

LEASE: Final = "reaper"
TICK_SECONDS: Final = 1.0
LEASE_SECONDS: Final = 10.0
SWEEP_TICKS: Final = 5
log = logging.getLogger("ash.hub")


class Reaper:
    """Looks once a second; while another replica holds the lease it only reports its own calls to the store."""

    def __init__(
        self, sandboxes: Sandboxes, reconciler: Reconciler, ledger: Ledger, store: Store, holder: str
    ) -> None:
        self._sandboxes = sandboxes
        self._reconciler = reconciler
        self._ticks = 0
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
        await self._sandboxes.report_calls()
        await self._sandboxes.forget()
        if self._sandboxes.unready() is None and await self._leads():  # else another may take the lease
            await self._learn()
            await self._sandboxes.expire()
            await self._sweep()

    async def _learn(self) -> None:
        """Hear of the calls that went through other replicas."""
        with suppress(ConnectFailed):
            self._ledger.learn(await self._store.last_calls())

    async def _sweep(self) -> None:
        """Now and then look for what a replica that was killed has left."""
        self._ticks += 1
        if self._ticks % SWEEP_TICKS == 0:
            try:
                await self._reconciler.sweep()
            except AshError as error:
                log.warning("what replicas may have left could not be looked for: %s", error)

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
