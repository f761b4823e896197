"""Limits on what goes on at once: one for each sandbox, one for all together, with turns taken fairly.

No sandbox waits for all others: one that has no place gets one even where all are taken.
"""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Capacity", "Share"]


class Capacity:
    """The limit for all sandboxes together.

    Args:
        places: How many. A sandbox that has none gets one even when all are taken.
    """

    def __init__(self, places: int) -> None:
        self._left = places
        self._queue: list[Share] = []

    @property
    def full(self) -> bool:
        return self._left <= 0

    def take(self) -> None:
        self._left -= 1

    def queue(self, share: Share) -> None:
        if share not in self._queue:
            self._queue.append(share)

    def give_back(self) -> None:
        """Hand a place on to a sandbox that waits and may have it; who gets one is the last the next time."""
        self._left += 1
        given: list[Share] = []
        rest: list[Share] = []
        for share in self._queue:
            (given if share.admit() else rest).append(share)
        self._queue = [share for share in (*rest, *given) if share.waiting]


class Share:
    """The limit for one sandbox, within a capacity.

    Args:
        most: Places at once.
    """

    def __init__(self, capacity: Capacity, most: int) -> None:
        self._capacity = capacity
        self._most = most
        self._turns: deque[asyncio.Future[None]] = deque()
        self.taken = 0

    @property
    def waiting(self) -> bool:
        return bool(self._turns)

    async def enter(self) -> None:
        """Take a place as soon as there is one."""
        if not self._turns and self._open():
            self._take()
            return
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        self._capacity.queue(self)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._turns.remove(turn)
            else:
                self.leave()  # it was given the place, but does not take it any more
            raise

    def leave(self) -> None:
        """Give a place back."""
        self.taken -= 1
        self._capacity.give_back()

    def admit(self) -> bool:
        """Give a place to the first that waits, if there is one for this sandbox."""
        for turn in self._turns:
            if not turn.done():
                if not self._open():
                    return False
                self._turns.remove(turn)
                self._take()
                turn.set_result(None)
                return True
        return False

    def _open(self) -> bool:
        return self.taken < self._most and (self.taken == 0 or not self._capacity.full)

    def _take(self) -> None:
        self.taken += 1
        self._capacity.take()
