"""The other replicas of the same hive, as the lifecycle needs to know them."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Alone", "Siblings"]


class Siblings(Protocol):
    """Who shares the hive with this replica. `Alone` is the twin of a hive that is one process."""

    @property
    def id(self) -> str:
        """This replica's own name. No other replica that lives has it."""
        ...

    @property
    def possible(self) -> bool:
        """Whether there can be others at all, now or later."""
        ...

    async def lives(self, replica: str) -> bool:
        """Say whether another replica lives. One that was killed counts for some seconds, and all while the store is
        away; this one itself does not.
        """
        ...

    async def leave(self) -> bool:
        """Stop counting as one that lives, and say whether another one still does.

        Of replicas that leave at the same time, at least one is told that there is no other. Where nobody can know,
        because the store is away, the others are taken to live.
        """
        ...


class Alone:
    """No other replica."""

    id = "alone"
    possible = False

    async def lives(self, replica: str) -> bool:
        del replica
        return False

    async def leave(self) -> bool:
        return False
