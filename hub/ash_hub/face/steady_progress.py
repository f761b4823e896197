"""Progress of a call to a tool of the hive, told again while nothing new happens: some hosts give up on silence."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import anyio

__all__ = ["SteadyProgress"]

QUIET_SECONDS: Final = 9.0
_STEP: Final = 1e-6
"""Per second: progress must grow with each report, and leave room for the next step."""

Report = Callable[[float, float | None, str | None], Awaitable[None]]


class SteadyProgress:
    """Reports what it is called with, and the same again, a little further, every `quiet_seconds`.

    Args:
        report: Tells the caller; does nothing where it has not asked for progress.
    """

    def __init__(self, report: Report, quiet_seconds: float = QUIET_SECONDS) -> None:
        self._report = report
        self._quiet_seconds = quiet_seconds
        self._done = 0.0
        self._message = "working"

    async def __call__(self, done: float, message: str) -> None:
        self._done, self._message = done, message
        await self._report(done, 1.0, message)

    @asynccontextmanager
    async def repeated(self) -> AsyncGenerator[None]:
        """Go on reporting while the context is open, which nothing may raise out of."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._repeat)
            yield
            group.cancel_scope.cancel()

    async def _repeat(self) -> None:
        began = anyio.current_time()
        while True:
            await anyio.sleep(self._quiet_seconds)
            seconds = anyio.current_time() - began
            await self._report(self._done + seconds * _STEP, 1.0, f"{self._message}, after {seconds:.0f} s")
