"""One timer that checks all deadlines, a few times a second."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

__all__ = ["TimeoutSweeper", "Watched"]

log = logging.getLogger(__name__)


class Watched(Protocol):
    def check_timeout(self, now: float) -> None:
        """Act on a deadline that has passed by `now`, the loop's time."""
        ...


class TimeoutSweeper:
    """Calls `check_timeout` of everything it watches, on one timer that runs only while it watches something.

    Args:
        every_seconds: Between two sweeps; a deadline may be noticed this much late.
    """

    def __init__(self, every_seconds: float) -> None:
        self._every = every_seconds
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, watched: Watched) -> None:
        self._watched.add(watched)
        if self._timer is None:
            self._arm()

    def unwatch(self, watched: Watched) -> None:
        """Idempotent."""
        self._watched.discard(watched)

    def close(self) -> None:
        """Stop watching anything."""
        self._watched.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self, watched: Watched, now: float) -> None:
        try:
            watched.check_timeout(now)
        except Exception:
            self._watched.discard(watched)
            log.exception("a deadline failed in the hive itself")

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._every, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for watched in list(self._watched):
            if watched in self._watched:  # the check of an earlier one may have ended it
                self._check(watched, now)
        if self._watched and self._timer is None:
            self._arm()
