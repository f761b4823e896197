"""A rate limiter of refused spawns: an owner's first are answered at once, more of them at a steady pace.

A refusal costs the hive as much as ten calls. An owner at its limit who asks again at every answer, and not when the
refusal said, would take half of the hive's loop from the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["RefusalPace"]

AT_ONCE = 20
A_SECOND = 10
LONGEST_SECONDS = 2.0
_MOST_OWNERS = 1000


class RefusalPace:
    """Says when a refusal is due: beyond `AT_ONCE` an owner's are `A_SECOND`, none later than `LONGEST_SECONDS`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next: dict[str, float] = {}
        """When an owner's next refusal would be due at the steady pace alone. Past ones are as good as none."""

    def delay(self, owner: str) -> float:
        """Count one more refusal of an owner, and return in how many seconds to answer it."""
        now = self._clock()
        if len(self._next) >= _MOST_OWNERS:
            self._next = {name: due for name, due in self._next.items() if due > now}
        ahead = max(self._next.get(owner, now) - now, 0.0)
        delay = min(max(0.0, ahead - (AT_ONCE - 1) / A_SECOND), LONGEST_SECONDS)
        if delay < LONGEST_SECONDS:  # a queue that grew further would outlast its owner
            self._next[owner] = now + ahead + 1 / A_SECOND
        return delay
