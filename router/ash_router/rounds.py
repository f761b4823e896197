"""Looking after what must not take too long, all at once and some times a second, instead of a timer for each."""

from __future__ import annotations

import asyncio
from typing import Protocol

__all__ = ["Rounds", "Watched"]


class Watched(Protocol):
    def look(self, now: float) -> None:
        """Do what has become due by `now`, the loop's time."""
        ...


class Rounds:
    """Looks after whatever is entered until it leaves.

    Args:
        every_seconds: Between two rounds: so late may be noticed what is due.
    """

    def __init__(self, every_seconds: float) -> None:
        self._every = every_seconds
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, watched: Watched) -> None:
        self._watched.add(watched)
        if self._timer is None:
            self._arm()

    def leave(self, watched: Watched) -> None:
        """Idempotent."""
        self._watched.discard(watched)

    def close(self) -> None:
        """End the rounds."""
        self._watched.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._every, self._go)

    def _go(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for watched in list(self._watched):
            if watched in self._watched:  # an earlier one's end may have been its end too
                watched.look(now)
        if self._watched and self._timer is None:
            self._arm()
