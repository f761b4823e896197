"""A rate limiter of refused spawns: an owner's first are answered at once, more of them at a steady pace.

A refusal costs the hive as much as ten calls. An owner at its limit who tries again at once, and not when the refusal
said, would take half of the hive's loop from the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["RefusalPace"]

BURST = 20
PER_SECOND = 10
MAX_DELAY_SECONDS = 2.0
_MAX_OWNERS = 1000


class RefusalPace:
    """Delays refusals: after a burst of `BURST`, an owner gets `PER_SECOND`; no delay exceeds `MAX_DELAY_SECONDS`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next: dict[str, float] = {}
        """When an owner's next refusal would be due at the steady pace alone; one in the past means no backlog."""

    def delay(self, owner: str) -> float:
        """Count one more refusal of an owner, and return in how many seconds to answer it."""
        now = self._clock()
        if len(self._next) >= _MAX_OWNERS:
            self._next = {name: due for name, due in self._next.items() if due > now}
        ahead = max(self._next.get(owner, now) - now, 0.0)
        delay = min(max(0.0, ahead - (BURST - 1) / PER_SECOND), MAX_DELAY_SECONDS)
        if delay < MAX_DELAY_SECONDS:  # a queue that grew further would outlast its owner
            self._next[owner] = now + ahead + 1 / PER_SECOND
        return delay
