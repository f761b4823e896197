"""One watch of the backend for the whole hive, shared by whoever waits for an instance."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import anyio

from ash_hub.backends.base import Backend, Instance, Phase
from ash_mcp.errors import AshError, StartFailed
from ash_mcp.types import SandboxId

__all__ = ["InstanceWatch"]

log = logging.getLogger("ash.hub")

NEWS_SECONDS: Final = 0.5
"""How long the news of a death may lag behind a broken connection."""


class InstanceWatch:
    """Tells of instances: what `run` is given is the lifecycle's, `while_alive` is a start's."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._starting: dict[SandboxId, tuple[anyio.CancelScope, list[str]]] = {}

    async def run(
        self,
        on_seen: Callable[[Instance], Awaitable[object]],
        on_ended: Callable[[Instance], Awaitable[None]],
        on_lost: Callable[[], Awaitable[None]],
    ) -> None:
        """Follow the backend until cancelled. `on_lost` is asked to compare everything anew."""
        async for event in self._backend.watch():
            try:
                if event.lost or event.instance is None:
                    await on_lost()
                elif event.instance.phase is Phase.ENDED:
                    await on_ended(event.instance)
                else:
                    await on_seen(event.instance)
            except AshError as error:  # the store is away, say; what was missed is found by the next comparison
                log.warning("an event of the backend could not be followed: %s", error)
            if event.instance is not None and event.instance.phase is Phase.ENDED:
                self._interrupt(event.instance)

    @asynccontextmanager
    async def while_alive(self, sandbox_id: SandboxId) -> AsyncGenerator[None]:
        """Run the body while the instance lives.

        Raises:
            StartFailed: It ended; the message is the backend's.
        """
        said: list[str] = []
        with anyio.CancelScope() as scope:
            self._starting[sandbox_id] = (scope, said)
            try:
                found = await self._backend.get(sandbox_id)
                if found is None or found.phase is Phase.ENDED:
                    raise StartFailed((found.exit_message if found else None) or "its process ended at once")
                try:
                    yield
                except AshError:
                    # what it looks like from outside comes before the news of its death: wait for the better reason
                    await anyio.sleep(NEWS_SECONDS)
                    raise
            finally:
                del self._starting[sandbox_id]
        if said:
            raise StartFailed(said[0])

    def _interrupt(self, instance: Instance) -> None:
        waiting = self._starting.get(instance.id)
        if waiting is not None:
            scope, said = waiting
            said.append(instance.exit_message or "its process ended")
            scope.cancel()
