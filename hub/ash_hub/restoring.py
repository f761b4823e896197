"""What a store that was flushed, restarted or replaced must be told again."""

from __future__ import annotations

from ash_hub.backends.base import Backend, Phase
from ash_hub.names import hold_again
from ash_hub.sandbox import Sandbox
from ash_hub.sandboxes import Sandboxes
from ash_mcp.types import SandboxId, State
from ash_router.routes import Routes
from ash_router.store.base import Store

__all__ = ["Restorer"]


class Restorer:
    """Fills a store from what the hub knows and the backend has."""

    def __init__(self, backend: Backend, sandboxes: Sandboxes, store: Store, routes: Routes) -> None:
        self._backend = backend
        self._sandboxes = sandboxes
        self._store = store
        self._routes = routes

    async def restore(self) -> None:
        """Put back names, keys and routes, and take out routes to what is gone. Several replicas may do so at once.

        Raises:
            AshError: The store or the backend is away; to be tried again.
        """
        # the store first: a route that is bound meanwhile then has its sandbox in the later list
        stored = {SandboxId(record["sandbox_id"]) for record in await self._store.routes()}
        existing = {instance.id for instance in await self._backend.list() if instance.phase is not Phase.ENDED}
        for sandbox in self._sandboxes.registry.living():
            await self._enlist(sandbox, is_there=sandbox.id in existing)
        for sandbox_id in stored - existing:
            await self._routes.unbind(sandbox_id)

    async def _enlist(self, sandbox: Sandbox, *, is_there: bool) -> None:
        await hold_again(self._store, sandbox)
        if is_there and sandbox.life.state is State.READY:
            await self._sandboxes.bind(sandbox)
            if sandbox.life.state is not State.READY:  # it ended meanwhile
                await self._routes.unbind(sandbox.id)
