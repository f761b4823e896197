"""Turns to start a sandbox: some at once, given to owners in rotation, so that no owner's queue delays another's.

Pure but for the events that waiters hold; nothing here knows what a start is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio

from ash_mcp.errors import CapacityExceeded
from ash_router.bounds.effective_limits import EffectiveLimit

__all__ = ["StartTurns"]

RETRY_AFTER_SECONDS = 5.0


class StartTurns:
    """A limiter that several owners share fairly.

    Args:
        at_once: Turns given at once.
        waiting: Waiters of the whole hive. Beyond it, an owner with no more than an equal part of them may still wait.
    """

    def __init__(self, *, at_once: int, waiting: int) -> None:
        self._free = at_once
        self._waiting = waiting
        self._queues: dict[str, deque[anyio.Event]] = {}
        """Of each owner with waiters. The owners are in the order in which they are served: who comes, and whose turn
        begins or ends, is last."""
        self._running: Counter[str] = Counter()

    @asynccontextmanager
    async def turn(self, owner: str, share: EffectiveLimit | None = None) -> AsyncGenerator[None]:
        """Wait for a turn and hold it while the context is open.

        Args:
            share: How many of the owner's may wait; None leaves that to the bound of all.

        Raises:
            CapacityExceeded: Too many wait already; it says whose limit that is.
        """
        await self._take(owner, share)
        try:
            yield
        finally:
            self._end(owner)

    async def _take(self, owner: str, share: EffectiveLimit | None) -> None:
        if self._free and not self._queues:
            self._begin(owner)
            return
        if share is not None and len(self._queues.get(owner, ())) >= share.most:
            raise share.reached("waiting")
        self._refuse_when_full(owner)
        given = anyio.Event()
        self._queues.setdefault(owner, deque()).append(given)
        try:
            await given.wait()
        except BaseException:
            if given.is_set():  # cancelled at the moment it got its turn
                self._end(owner)
            else:
                self._leave(owner, given)
            raise

    def _refuse_when_full(self, owner: str) -> None:
        total = sum(len(queue) for queue in self._queues.values())
        if total < self._waiting:
            return
        own = len(self._queues.get(owner, ()))
        if own and own >= self._waiting // len(self._queues):
            raise CapacityExceeded(
                f"{own} of your spawns wait for a start already, your share of what this hive lets wait "
                f"({self._waiting}, ASH_HUB_LIMITS__WAITING)",
                limit="owner",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        if not self._waiting:
            raise CapacityExceeded(
                "all starts of this hive are taken and it lets none wait (ASH_HUB_LIMITS__WAITING)",
                limit="hive",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )

    def _begin(self, owner: str) -> None:
        self._free -= 1
        self._running[owner] += 1
        self._make_last(owner)

    def _end(self, owner: str) -> None:
        self._free += 1
        self._running[owner] -= 1
        if not self._running[owner]:
            del self._running[owner]
        self._make_last(owner)
        self._give()

    def _make_last(self, owner: str) -> None:
        if owner in self._queues:
            self._queues[owner] = self._queues.pop(owner)

    def _give(self) -> None:
        """Give free turns to waiters: to the owner with the fewest, and of equals to the first."""
        while self._free and self._queues:
            owner = min(self._queues, key=lambda name: self._running[name])
            given = self._queues[owner].popleft()
            if not self._queues[owner]:
                del self._queues[owner]
            self._begin(owner)
            given.set()

    def _leave(self, owner: str, given: anyio.Event) -> None:
        queue = self._queues[owner]
        queue.remove(given)
        if not queue:
            del self._queues[owner]
