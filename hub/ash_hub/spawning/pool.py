"""Pools: warm sandboxes of one fingerprint, started but not yet anybody's.

`EmptyPool` is the twin of size 0: it never has one, so that every spawn is a cold start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ash_hub.backends.base import Instance
from ash_hub.spawning.toolsets import Toolset

__all__ = ["EmptyPool", "Pool", "Started"]


@dataclass(frozen=True, slots=True)
class Started:
    """A sandbox that has started, with its tools pinned and nothing of a caller in it."""

    instance: Instance
    toolset: Toolset


class Pool(Protocol):
    """Hands out each warm sandbox once."""

    async def acquire(self, fingerprint: str) -> Started | None:
        """Return a warm sandbox of exactly this fingerprint (see `specs.fingerprint`), or None."""
        ...


class EmptyPool:
    """The pool that is always empty."""

    async def acquire(self, fingerprint: str) -> Started | None:
        del fingerprint
        return None
