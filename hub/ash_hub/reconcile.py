"""The reconciler: makes what the hub believes agree with what the backend has.

It takes over what an earlier hub left and what other replicas made, removes what was never finished, notices what
vanished, and leaves alone what is starting and what this hive did not make.
"""

from __future__ import annotations

import logging
from typing import Final

import anyio

from ash_hub.backends.base import Backend, Instance, Phase
from ash_hub.mirror import ending_of
from ash_hub.sandbox import Sandbox
from ash_hub.sandboxes import Sandboxes
from ash_hub.siblings import Alone, Siblings
from ash_mcp.errors import AshError, ConnectFailed
from ash_mcp.types import SandboxId, State
from ash_router.routes import Routes

__all__ = ["Reconciler"]

log = logging.getLogger("ash.hub")

CATCH_UP_SECONDS: Final = 0.5


class Reconciler:
    """Compares the backend and the routes with the registry."""

    def __init__(
        self, backend: Backend, sandboxes: Sandboxes, routes: Routes, siblings: Siblings | None = None
    ) -> None:
        self._backend = backend
        self._sandboxes = sandboxes
        self._routes = routes
        self._siblings = siblings or Alone()
        self._suspects: set[tuple[SandboxId, str]] = set()
        """What looked wrong at the last sweep; what still does at the next is put right."""

    async def run_once(self) -> None:
        """Compare and repair everything once: at the start of a hive, and when events may have been missed."""
        registry, mirror = self._sandboxes.registry, self._sandboxes.mirror
        expected = [sandbox for sandbox in registry.living() if self._should_exist(sandbox)]
        instances = {instance.id: instance for instance in await self._backend.list()}
        for instance in instances.values():
            if instance.phase is not Phase.ENDED:
                if not await mirror.seen(instance):
                    await self._remove(instance)
            elif (known := registry.by_id(instance.id)) is not None and not known.life.state.ended:
                await mirror.ended(instance)
            elif not await self._siblings.lives(str(instance.record.get("maker"))):
                await self._remove(instance)
        for sandbox in expected:
            if sandbox.id not in instances and not sandbox.life.state.ended:
                await mirror.missing(sandbox)

    def _should_exist(self, sandbox: Sandbox) -> bool:
        """Say whether the backend must have a sandbox: not yet while it is being made here."""
        return sandbox.life.state is State.READY or sandbox.maker != self._siblings.id

    async def _remove(self, instance: Instance) -> None:
        log.info("removing what an earlier hive left unfinished", extra={"sandbox": instance.id})
        await self._sandboxes.mirror.remove(instance)

    # -- replicas

    async def catch_up(self) -> None:
        """Learn what other replicas made and ended until now: one question to the store, more where it differs."""
        if not self._siblings.possible:
            return
        with anyio.move_on_after(CATCH_UP_SECONDS) as bound:
            try:
                await self._routes.catch_up()
            except ConnectFailed:
                return
        # where the store does not answer, what is known here is the best that there is
        if bound.cancelled_caught or self._routes.ids() == self._ready():
            return
        try:
            await self.run_once()
        except AshError as error:
            log.warning("the backend could not be compared with what is known: %s", error)

    def _ready(self) -> set[SandboxId]:
        living = self._sandboxes.registry.living()
        return {sandbox.id for sandbox in living if sandbox.life.state is State.READY}

    async def sweep(self) -> None:
        """Put right what a replica that was killed has left: half-made, half-ended, without a way to it.

        Work of one replica. Whatever another may just be doing is looked at twice.
        """
        if not self._siblings.possible:
            return
        await self.run_once()
        found = await self._found()
        for sandbox_id, what in found & self._suspects:
            await self._put_right(sandbox_id, what)
        self._suspects = found

    async def _found(self) -> set[tuple[SandboxId, str]]:
        try:
            await self._routes.catch_up()
        except ConnectFailed:
            return set()
        instances = {i.id: i for i in await self._backend.list() if i.phase is not Phase.ENDED}
        ready, routed = self._ready(), self._routes.ids()
        ended = {sandbox.id for sandbox in self._sandboxes.registry.all() if sandbox.life.state.ended}
        ending = {sandbox_id for sandbox_id, instance in instances.items() if ending_of(instance) is not None}
        return (
            {(sandbox_id, "half ended") for sandbox_id in ending | (ended & instances.keys())}
            | {(sandbox_id, "no route") for sandbox_id in (ready & instances.keys()) - routed}
            | {(sandbox_id, "no sandbox") for sandbox_id in routed - instances.keys() - ready}
        )

    async def _put_right(self, sandbox_id: SandboxId, what: str) -> None:
        log.warning("putting right what a replica left", extra={"sandbox": sandbox_id, "found": what})
        sandbox = self._sandboxes.registry.by_id(sandbox_id)
        if what == "no sandbox":
            await self._routes.unbind(sandbox_id)
        elif what == "half ended":
            await self._backend.delete(sandbox_id, grace_seconds=0.0)
        elif sandbox is not None and sandbox.life.state is State.READY:
            await self._sandboxes.bind(sandbox)
