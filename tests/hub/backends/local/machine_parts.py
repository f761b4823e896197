"""Whether tests can have machines on this host, with users of their own, and snapshots of them."""

from __future__ import annotations

import os

import pytest

from ash_hub.backends.local.ordinary_host import find_ordinary
from tests.hub.backends.local import known_host
from tests.hub.backends.local.local_parts import SYSTEMS

__all__ = ["USERS_OF_THEIR_OWN", "needs_machines", "needs_snapshots", "needs_users"]


def _no_machines() -> tuple[str | None, bool]:
    """Return why tests can have no machines here, and whether sandboxes have users of their own."""
    if os.geteuid() == 0:
        problem = known_host.machine_problem()
        return problem, problem is None
    if SYSTEMS not in os.environ:
        return f"an ordinary user's tests make a copy of the system only where {SYSTEMS} says", False
    found = find_ordinary(known_host.facts(), 200)
    return (found, False) if isinstance(found, str) else (None, found.lacks is None)


_PROBLEM, USERS_OF_THEIR_OWN = _no_machines()
needs_machines = pytest.mark.skipif(_PROBLEM is not None, reason=f"this host can have no machines: {_PROBLEM}")
_NO_SNAPSHOTS = known_host.machine_problem() or known_host.snapshot_problem()
needs_snapshots = pytest.mark.skipif(
    _NO_SNAPSHOTS is not None, reason=f"this host can have no snapshots: {_NO_SNAPSHOTS}"
)
needs_users = pytest.mark.skipif(not USERS_OF_THEIR_OWN, reason="sandboxes have one user here")
