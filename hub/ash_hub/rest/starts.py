"""Spawns that may go on after their request was answered. They belong to the hive, and end with it at the latest."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskGroup, TaskStatus

from ash_hub.lifecycle.sandbox import Sandbox
from ash_mcp.errors import AshError, CapacityExceeded, HiveFault, StartFailed

__all__ = ["Start", "Starts"]

log = logging.getLogger("ash.hub")


class Start:
    """One spawn that has begun."""

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.outcome: Sandbox | AshError = HiveFault("the start was interrupted")
        """Once it is done."""
        self._scope = anyio.CancelScope()

    def cancel(self) -> None:
        """Leave nothing of it; whoever asked for it is gone."""
        self._scope.cancel()

    async def run(self, spawn: Callable[[], Awaitable[Sandbox]]) -> None:
        try:
            with self._scope:
                self.outcome = await spawn()
        except AshError as error:
            self.outcome = error
        except Exception:
            log.exception("a spawn failed in the hive itself")
            self.outcome = HiveFault("the hive itself failed; its log has the details")
        finally:
            self.done.set()


class Starts:
    """Runs them, at most `most` at once: as many as the hive may have sandboxes, since each takes a place first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._group: TaskGroup | None = None

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Take spawns until cancelled; those that have not ended by then end with it."""
        async with anyio.create_task_group() as group:
            self._group = group
            task_status.started()
            try:
                await anyio.sleep_forever()
            finally:
                self._group = None

    def begin(self, spawn: Callable[[], Awaitable[Sandbox]]) -> Start:
        """Begin a spawn.

        Raises:
            CapacityExceeded: As many as possible have begun and are not done.
            StartFailed: The hive is stopping.
        """
        if self._group is None:
            raise StartFailed("the hive is stopping", step="admit")
        if self._count >= self._most:
            words = f"{self._most} sandboxes are starting already"
            raise CapacityExceeded(words, limit="hive", retry_after_seconds=1.0)
        start = Start()
        self._count += 1
        self._group.start_soon(self._counted, start, spawn)
        return start

    async def _counted(self, start: Start, spawn: Callable[[], Awaitable[Sandbox]]) -> None:
        try:
            await start.run(spawn)
        finally:
            self._count -= 1
