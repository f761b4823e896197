"""News of instances for the starts that wait for them, from the one watch of the backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import anyio

from ash_hub.backends.base import Exit, Instance, Phase
from ash_mcp.errors import AshError, StartFailed
from ash_mcp.types import Cause, SandboxId

__all__ = ["InstanceWatch", "WatchedStart"]

NEWS_SECONDS: Final = 0.5
"""How long the news of a death may lag behind a broken connection."""


@dataclass(slots=True, eq=False)
class WatchedStart:
    """What a start knows of its instance. The start is broken off when the instance ends."""

    scope: anyio.CancelScope
    instance: Instance | None = None
    news: anyio.Event = field(default_factory=anyio.Event)
    exit: Exit | None = None
    """Set when it ended."""

    def tell(self, instance: Instance) -> None:
        """Take note of the instance as it is now."""
        self.instance = instance
        if instance.phase is Phase.ENDED:
            self.exit = instance.exit or Exit("its process ended", Cause.HOST)
            self.scope.cancel()
        self.news.set()

    async def running(self, timeout_seconds: float, told: Callable[[str], Awaitable[None]]) -> Instance:
        """Wait until the instance runs and return it.

        Args:
            told: Is told what it waits for meanwhile, where the backend says that.

        Raises:
            StartFailed: It did not run in time. Where it waited for its host, the message says for what.
        """
        said = None
        with anyio.move_on_after(timeout_seconds):
            while True:
                self.news = anyio.Event()
                if self.instance is not None:
                    if self.instance.endpoint is not None:
                        return self.instance
                    if self.instance.waits_for not in (None, said):
                        said = self.instance.waits_for
                        await told(said)
                        continue
                await self.news.wait()
        late, waits = f"it did not run within {timeout_seconds:g} s", self.instance and self.instance.waits_for
        raise StartFailed(f"{late}: {waits}", cause=Cause.HOST.value) if waits else StartFailed(late)


class InstanceWatch:
    """Hands the backend's news to the starts."""

    def __init__(self) -> None:
        self._starts: dict[SandboxId, WatchedStart] = {}

    def tell(self, instance: Instance) -> None:
        """Hand on what the backend said of an instance."""
        if (start := self._starts.get(instance.id)) is not None:
            start.tell(instance)

    @asynccontextmanager
    async def start_of(self, sandbox_id: SandboxId) -> AsyncGenerator[WatchedStart]:
        """Follow an instance from before it is created, and run the body while it lives.

        Raises:
            StartFailed: It ended; the message is the backend's.
        """
        scope = anyio.CancelScope()
        start = self._starts[sandbox_id] = WatchedStart(scope)
        with scope:
            try:
                try:
                    yield start
                except (AshError, TimeoutError):
                    if start.instance is not None:  # news of its death may come later
                        await anyio.sleep(NEWS_SECONDS)
                    raise
            finally:
                del self._starts[sandbox_id]
        if scope.cancelled_caught and start.exit is not None:
            raise StartFailed(start.exit.message, cause=start.exit.cause_of_start.value)
