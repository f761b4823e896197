"""The other replicas of the same hive, as the lifecycle needs to know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from ash_mcp.errors import AshError
from ash_mcp.types import SandboxId
from ash_router.replicas.membership import Replicas

__all__ = ["SEES_BACKEND", "Alone", "Replicated", "Siblings"]

MAKING: Final = "making"
"""What a replica says of the sandboxes that it is making, by the name of that among its details."""
SEES_BACKEND: Final = "sees_backend"
"""The same of whether the news of its backend is fresh."""


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

    async def is_other_alive(self, replica: str) -> bool:
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

    async def is_being_made(self, sandbox_id: SandboxId) -> bool:
        """Return whether a living replica, this one or another, is making a sandbox; True where that is unknown."""
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

    async def is_other_alive(self, replica: str) -> bool:
        del replica
        return False

    async def begin(self, sandbox_id: SandboxId) -> None:
        del sandbox_id  # whoever could ask is this process

    def settle(self, sandbox_id: SandboxId) -> None:
        del sandbox_id

    async def is_being_made(self, sandbox_id: SandboxId) -> bool:
        del sandbox_id
        return True

    async def leave(self) -> bool:
        return False


class Replicated:
    """The other replicas that announce themselves in the store."""

    possible = True

    def __init__(self, replicas: Replicas, *, sees_backend: Callable[[], bool] = lambda: True) -> None:
        self._replicas = replicas
        self._sees_backend = sees_backend
        self._making: set[SandboxId] = set()
        self._dead: set[str] = set()
        """Replicas that did not live when they were asked for: an id does not come again."""
        self.id = replicas.id
        replicas.details = self._details

    def _details(self) -> Mapping[str, Any]:
        return {MAKING: sorted(self._making), SEES_BACKEND: self._sees_backend()}

    async def is_other_alive(self, replica: str) -> bool:
        if replica == self.id:
            return False
        if replica in self._replicas.others():
            return True
        if replica in self._dead:
            return False
        if self._replicas.is_cut_off:  # every turn would wait for the store in vain
            return True
        try:
            await self._replicas.look()
        except AshError:
            return True
        if replica in self._replicas.others() or not self._replicas.can_judge():
            return True
        self._dead.add(replica)
        return False

    async def begin(self, sandbox_id: SandboxId) -> None:
        self._making.add(sandbox_id)
        await self._replicas.announce()

    def settle(self, sandbox_id: SandboxId) -> None:
        self._making.discard(sandbox_id)

    async def is_being_made(self, sandbox_id: SandboxId) -> bool:
        if sandbox_id in self._making:
            return True
        if self._replicas.is_cut_off:
            return True
        try:
            await self._replicas.look()
        except AshError:
            return True
        is_made = any(sandbox_id in said.get(MAKING, ()) for said in self._replicas.others().values())
        return is_made or not self._replicas.can_judge()

    async def leave(self) -> bool:
        try:
            return await self._replicas.leave()
        except AshError:
            return True
