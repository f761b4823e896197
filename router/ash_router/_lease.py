"""Leases: who holds a name, until when, and with which fencing token. Pure; time is an argument.

    free ──grant──▶ held ──renew──▶ held
      ▲               │ release, or its expiry passes
      └───────────────┘

A lease is over at the moment of its expiry, not after it. Tokens of one name only grow, also across a time in which
nobody held it; so whoever guards a resource can refuse a holder that slept through its own expiry.
"""

from __future__ import annotations

from dataclasses import replace

from ash_mcp.errors import LeaseHeld, LeaseLost
from ash_router.store.base import Lease

__all__ = ["grant", "held_by", "renew"]


def grant(last: Lease | None, name: str, holder: str, ttl_seconds: float, now: float) -> Lease:
    """Return the lease that `holder` gets.

    Args:
        last: The latest lease of this name, also one that was released or has expired; None if there never was one.

    Raises:
        LeaseHeld: Somebody else's lease is not over yet.
    """
    expiry = now + ttl_seconds
    if last is None:
        return Lease(name, holder, 1, expiry)
    if last.expires_at <= now:
        return Lease(name, holder, last.token + 1, expiry)
    if last.holder != holder:
        raise LeaseHeld(f"{last.holder} holds {name} for now", holder=last.holder)
    return replace(last, expires_at=max(last.expires_at, expiry))


def renew(last: Lease | None, lease: Lease, ttl_seconds: float, now: float) -> Lease:
    """Return `lease` with its expiry pushed, never pulled.

    Raises:
        LeaseLost: It is over, or another was granted since.
    """
    if last is None or not held_by(last, lease, now):
        raise LeaseLost(f"{lease.holder} no longer holds {lease.name}")
    return replace(last, expires_at=max(last.expires_at, now + ttl_seconds))


def held_by(last: Lease | None, lease: Lease, now: float) -> bool:
    """Say whether the latest lease of a name is still this one and not over."""
    return last is not None and (last.token, last.holder) == (lease.token, lease.holder) and last.expires_at > now
