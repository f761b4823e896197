"""The reconciler: makes what the hub believes agree with what the backend has.

It takes over what an earlier hub left, removes what that hub never finished, notices what vanished, and leaves alone
what is starting and what this hive did not make.
"""

from __future__ import annotations

import logging

from ash_hub.backends.base import Backend, Phase
from ash_hub.sandboxes import Sandboxes
from ash_mcp.types import State

__all__ = ["Reconciler"]

log = logging.getLogger("ash.hub")


class Reconciler:
    """Compares the backend with the registry."""

    def __init__(self, backend: Backend, sandboxes: Sandboxes) -> None:
        self._backend = backend
        self._sandboxes = sandboxes

    async def run_once(self) -> None:
        """Compare and repair everything once: at the start of a hive, and when events may have been missed."""
        registry = self._sandboxes.registry
        instances = {instance.id: instance for instance in await self._backend.list()}
        for instance in instances.values():
            known = registry.by_id(instance.id)
            if known is not None:
                if instance.phase is Phase.ENDED:
                    await self._sandboxes.died(instance)
            elif instance.phase is Phase.ENDED or not await self._sandboxes.adopt(instance):
                log.info("removing what an earlier hive left unfinished", extra={"sandbox": instance.id})
                await self._backend.delete(instance.id, grace_seconds=0.0)
        for sandbox in registry.living():
            if sandbox.life.state is State.READY and sandbox.id not in instances:
                await self._sandboxes.lost(sandbox)
