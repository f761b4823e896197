"""One consumer's subscription: an endless iterator over a bounded queue, with `LOST` in place of lost messages."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from ash_router.store.base import LOST

__all__ = ["Reader"]

MAX_BEHIND: Final = 1000
"""Messages that a slow reader may fall behind before it loses the oldest."""


class Reader:
    """Yields what is put, in order; `LOST` first where older messages are missing."""

    def __init__(self) -> None:
        self._queue: deque[str] = deque(maxlen=MAX_BEHIND)
        self._has_lost = False
        self._more = asyncio.Event()

    def put(self, message: str) -> None:
        self._has_lost |= len(self._queue) == MAX_BEHIND
        self._queue.append(message)
        self._more.set()

    def lose(self) -> None:
        """Note that messages before the next one may be missing."""
        self._has_lost = True
        self._more.set()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while not self._queue and not self._has_lost:
            self._more.clear()
            await self._more.wait()
        if self._has_lost:
            self._has_lost = False
            return LOST
        return self._queue.popleft()
