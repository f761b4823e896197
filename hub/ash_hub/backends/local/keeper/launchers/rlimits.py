"""The limits of a process, as close to a plan's as the one that sets them may go."""

from __future__ import annotations

import contextlib
import resource

__all__ = ["limit"]


def limit(name: str, wanted: int) -> None:
    """Set a limit of this process, as close to `wanted` as the one it has lets it."""
    number = getattr(resource, f"RLIMIT_{name}")
    most = resource.getrlimit(number)[1]
    if name == "CORE" and most == 0:
        # 1 byte is a stricter limit than 0 (see `limits.py`), for whoever may raise it.
        with contextlib.suppress(ValueError):
            resource.setrlimit(number, (wanted, wanted))
            return
    value = wanted
    if most != resource.RLIM_INFINITY:
        # NOFILE bounds what all processes of a user have in flight between sockets, too: the keeper can hand a
        # descriptor over as long as no sandbox may have as many there as itself.
        value = min(wanted, most // 2 if name == "NOFILE" else most)
    resource.setrlimit(number, (value, value))
