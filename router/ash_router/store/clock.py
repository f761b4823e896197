"""Clocks that tell the time of day, but go on evenly when somebody sets the machine's clock."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["ServerClock", "even_clock", "lead", "steady"]


def steady() -> float:
    """Return the seconds since this host was started. They count on while it sleeps, and nobody can set them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def lead(wall: Callable[[], float] = time.time, steady: Callable[[], float] = steady) -> float:
    """Return by how much the time of day is ahead of the steady clock now."""
    return wall() - steady()


def even_clock() -> Callable[[], float]:
    """Return a clock that tells the time of day now and goes on evenly.

    A clock that is set forward would otherwise end every sandbox as too old, and one set back would keep them longer
    than was asked for.
    """
    ahead = lead()
    return lambda: ahead + steady()


class ServerClock:
    """The time of a server, told without asking it: by how much it was ahead of the steady clock when it answered."""

    def __init__(self) -> None:
        self._ahead: float | None = None

    def learn(self, told: float, asked_at: float, answered_at: float) -> None:
        """Take over what the server said its time was, at some moment between two of the steady clock.

        What is known stays where it agrees with that, so that a slow answer spoils nothing.
        """
        least, most = told - answered_at, told - asked_at
        known = (least + most) / 2 if self._ahead is None else self._ahead
        self._ahead = min(max(known, least), most)

    def now(self) -> float:
        """Return the server's time, in seconds since the epoch; one answer of it must have come."""
        assert self._ahead is not None
        return self._ahead + steady()
