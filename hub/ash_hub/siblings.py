"""The other replicas of the same hive, as the lifecycle needs to know them."""

from __future__ import annotations

from typing import Protocol

from ash_mcp.types import SandboxId

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

    async def begin(self, sandbox_id: SandboxId) -> None:
        """Let the others know that this replica makes a sandbox, before it takes a name for it.

        Raises:
            ConnectFailed: They cannot be told now; retryable.
        """
        ...

    def settle(self, sandbox_id: SandboxId) -> None:
        """Take that back: it exists now, or it never will."""
        ...

    async def make(self, sandbox_id: SandboxId) -> bool:
        """Say whether any replica that lives, this one too, is making a sandbox; taken to be so where nobody can know."""
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

    async def begin(self, sandbox_id: SandboxId) -> None:
        del sandbox_id  # whoever could ask is this process

    def settle(self, sandbox_id: SandboxId) -> None:
        del sandbox_id

    async def make(self, sandbox_id: SandboxId) -> bool:
        del sandbox_id
        return True

    async def leave(self) -> bool:
        return False
