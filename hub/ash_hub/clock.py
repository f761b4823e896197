"""The hive's clock: tells the time of day, but goes on evenly when somebody sets the machine's clock."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["even_clock"]


def even_clock(
    wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic
) -> Callable[[], float]:
    """Return a clock that agrees with `wall` now and keeps the pace of `steady` from then on.

    A clock that is set forward would otherwise end every sandbox as too old, and one set back would keep them longer
    than was asked for.
    """
    ahead = wall() - steady()
    return lambda: ahead + steady()
