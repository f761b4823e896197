"""Pools: warm sandboxes of one recipe, ready but not yet anybody's.

A `Blank` has started, its tools are pinned, and nothing of a caller is in it. `EmptyPool` is the twin of size 0:
it never has one, so that every spawn is a cold start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ash_hub.backends.base import Instance
from ash_hub.tools import Toolset

__all__ = ["Blank", "EmptyPool", "Pool"]


@dataclass(frozen=True, slots=True)
class Blank:
    """A started sandbox that nobody has claimed."""

    instance: Instance
    toolset: Toolset


class Pool(Protocol):
    """`acquire` is atomic: a blank goes to one caller. `release` takes back one that was never claimed."""

    async def acquire(self, recipe: str) -> Blank | None: ...

    async def release(self, recipe: str, blank: Blank) -> None: ...


class EmptyPool:
    """The pool that is always empty."""

    async def acquire(self, recipe: str) -> Blank | None:
        del recipe
        return None

    async def release(self, recipe: str, blank: Blank) -> None:
        raise AssertionError(f"nothing of {recipe} was acquired, so {blank.instance.id} cannot come back")
