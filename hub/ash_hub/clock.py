"""Clocks that tell the time of day, but go on evenly when somebody sets the machine's clock."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["even_clock", "lead", "steady"]


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
