"""A queue of keys to look at: each waits at most once, and one worker at a time holds it.

A key that is added while it is held is looked at again afterwards, so nothing that happens meanwhile is missed.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import Final, Generic, TypeVar

import anyio

from ash_mcp.errors import AshError

__all__ = ["KeyedQueue"]

log = logging.getLogger("ash.hub")

FIRST_RETRY_SECONDS: Final = 0.1
LAST_RETRY_SECONDS: Final = 5.0

Key = TypeVar("Key", bound=Hashable)


class KeyedQueue(Generic[Key]):
    """Hands each key to `turn`, which returns in how many seconds to look again (infinity: not by itself).

    A turn that fails is logged and taken again, each time later; it ends neither the queue nor another key's turn.
    How many turns do something at the same time is for `turn` to bound.
    """

    def __init__(self, turn: Callable[[Key], Awaitable[float]]) -> None:
        self._turn = turn
        self._waiting: dict[Key, None] = {}
        self._held: set[Key] = set()
        self._failed: dict[Key, tuple[int, Exception]] = {}
        """How often in a row the turns of a key failed, and how the last did."""
        self._due: dict[Key, float] = {}
        self._deadlines: list[tuple[float, int, Key]] = []
        self._pushed = 0
        self._wake = anyio.Event()
        self._done = anyio.Event()

    def add(self, key: Key) -> None:
        """Have a key looked at as soon as possible."""
        self._due.pop(key, None)
        self._waiting[key] = None
        self._wake.set()

    async def settle(self, keys: Iterable[Key]) -> bool:
        """Add keys and wait until each was looked at after this call began; False if the last look at one failed."""
        wanted = set(keys)
        for key in wanted:
            self.add(key)
        while (wanted & self._waiting.keys()) or (wanted & self._held):
            await self._done.wait()
        return not wanted & self._failed.keys()

    def failure_of(self, key: Key) -> Exception | None:
        """Return how the last look at a key failed; None if it did not."""
        return self._failed[key][1] if key in self._failed else None

    async def run(self) -> None:
        """Hand out keys until cancelled."""
        async with anyio.create_task_group() as workers:
            while True:
                self._add_due()
                for key in [key for key in self._waiting if key not in self._held]:
                    del self._waiting[key]
                    self._held.add(key)
                    workers.start_soon(self._work, key)
                self._wake = anyio.Event()
                with anyio.move_on_after(self._until_next()):
                    await self._wake.wait()

    async def _work(self, key: Key) -> None:
        try:
            wait = await self._turn(key)
            self._failed.pop(key, None)
        except Exception as error:
            wait = self._retry(key, error)
        finally:
            self._held.discard(key)
            self._wake.set()
            self._done.set()
            self._done = anyio.Event()
        if key not in self._waiting:
            self._look_in(key, wait)

    def _retry(self, key: Key, error: Exception) -> float:
        failed = self._failed[key][0] + 1 if key in self._failed else 1
        self._failed[key] = failed, error
        wait = min(FIRST_RETRY_SECONDS * 2 ** min(failed - 1, 10), LAST_RETRY_SECONDS)
        trace = error if failed == 1 and not isinstance(error, AshError) else None  # an AshError says all in its words
        log.warning("%s: %r; looking again in %.1f s", key, error, wait, exc_info=trace)
        return wait

    def _look_in(self, key: Key, seconds: float) -> None:
        self._due.pop(key, None)
        if seconds < math.inf:
            at = self._due[key] = anyio.current_time() + max(0.0, seconds)
            self._pushed += 1
            heapq.heappush(self._deadlines, (at, self._pushed, key))
            if len(self._deadlines) > 2 * len(self._due) + 64:  # most are of deadlines that were replaced since
                self._deadlines = [entry for entry in self._deadlines if self._due.get(entry[2]) == entry[0]]
                heapq.heapify(self._deadlines)
            self._wake.set()

    def _add_due(self) -> None:
        now = anyio.current_time()
        while self._deadlines and self._deadlines[0][0] <= now:
            at, _, key = heapq.heappop(self._deadlines)
            if self._due.get(key) == at:
                del self._due[key]
                self._waiting[key] = None

    def _until_next(self) -> float:
        return max(0.0, self._deadlines[0][0] - anyio.current_time()) if self._deadlines else math.inf
