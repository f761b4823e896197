"""The lease of a network policy: until when an egress proxy acts on it without a newer answer of the hive."""

from __future__ import annotations

import asyncio

__all__ = ["Lease"]


class Lease:
    """Holds for nothing until it is first renewed. Times are those of the event loop."""

    def __init__(self) -> None:
        self._until = float("-inf")
        self._renewed = asyncio.Event()

    def renew(self, until: float) -> None:
        """Let pass what comes before `until`, also what waits already."""
        self._until = max(self._until, until)
        renewed, self._renewed = self._renewed, asyncio.Event()
        renewed.set()

    async def held(self) -> None:
        """Return as soon as it holds."""
        now = asyncio.get_running_loop().time
        while now() >= self._until:
            await self._renewed.wait()
