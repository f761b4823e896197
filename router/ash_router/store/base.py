"""The store: who holds what now. It can be lost at any time and rebuilt from the backend.

It is *not* the truth about which sandboxes exist; that is the backend's. Every step that two replicas could take at
once is one atomic call here, so that no caller reads first and writes later. `memory.py` is the in-process twin for
one hive; `ash_router.testing.check_store` is the suite that every implementation passes.

Every step may be taken again after a failure, whether or not it was done the first time. A store that others share
can be away. What takes or asks for something then raises `ConnectFailed` after a bounded wait, retryable. What only
gives back or tells (`drop_route`, `release…`, `touch`, `publish`) does not fail: it is done when the store is back,
so that no end of a sandbox has to wait for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ash_mcp.types import SandboxId, Scope, SessionName

__all__ = ["LOST", "MAX_REPLICAS", "ROUTE_NEWS", "Lease", "RouteChanges", "Store"]

LOST: Final = ""
"""What a subscription yields in place of messages that it may have missed: look at everything again."""

MAX_REPLICAS: Final = 1000
"""Announced replicas that are kept; of more, those that end first are dropped."""

ROUTE_NEWS: Final = "routes"
"""The channel on which `put_route` and `drop_route` name the sandbox whose route changed, in the same step."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A time-bounded hold of a name."""

    name: str
    holder: str
    token: int
    """Fencing token: larger than that of any earlier grant of the same name."""
    expires_at: float
    """Seconds on the store's own clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteChanges:
    """What happened to the routes since a version that the asker knows."""

    version: str
    """Opaque; to be handed in the next time."""
    bound: Sequence[Mapping[str, Any]]
    unbound: Sequence[SandboxId] = ()
    complete: bool = False
    """Whether `bound` is all that there is, so that any other route is gone."""
    refilling: bool = False
    """With `complete`: the store has lost what it held, so that a route which it lacks may be as good as ever."""


class Store(Protocol):
    """Routes, session names, idempotency keys, leases, last calls and events, shared by the replicas of one hive."""

    async def put_route(self, record: Mapping[str, Any]) -> None:
        """Store a route under its `sandbox_id`, unless one of a later `generation` is there."""
        ...

    async def drop_route(self, sandbox_id: SandboxId) -> None:
        """Remove a route, and with it when its sandbox was last called; idempotent."""
        ...

    async def routes(self) -> list[Mapping[str, Any]]:
        """Return every stored route, in the order in which they were first put."""
        ...

    async def route_changes(self, since: str | None) -> RouteChanges:
        """Return how the routes differ from what they were at version `since`; all of them for None."""
        ...

    async def reserve_session(
        self,
        owner: str,
        scope: Scope,
        wanted: SessionName | None,
        sandbox_id: SandboxId,
        *,
        restoring: bool = False,
    ) -> SessionName:
        """Give a session name to a sandbox, in one step.

        Args:
            wanted: The caller's choice; None takes the next of `sb1`, `sb2`, … that nobody holds. A number is not
                given again while the hive lives, so that a name in a model's memory never means another sandbox.
                A sandbox that holds a name already gets that one again.
            restoring: The sandbox held it already when the store lost it. No other name is given before all may be
                back: that fails as if the store were away.

        Raises:
            SessionTaken: `wanted` belongs to another sandbox of this owner and scope; `data["holder"]` says which.
        """
        ...

    async def release_session(self, owner: str, scope: Scope, session: SessionName, sandbox_id: SandboxId) -> None:
        """Let a name go if `sandbox_id` holds it; idempotent."""
        ...

    async def claim_key(
        self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId, *, restoring: bool = False
    ) -> SandboxId:
        """Bind an idempotency key to a sandbox and return the sandbox that it is bound to, the first one to come.

        Args:
            restoring: As with `reserve_session`.
        """
        ...

    async def release_key(self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId) -> None:
        """Unbind a key if `sandbox_id` holds it; idempotent."""
        ...

    async def grant(self, name: str, holder: str, ttl_seconds: float) -> Lease:
        """Take a lease that nobody holds, or that `holder` holds already (same token, later expiry).

        Raises:
            LeaseHeld: Somebody else holds it; `data["holder"]` says who.
        """
        ...

    async def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        """Push the expiry of a lease.

        Raises:
            LeaseLost: It expired, or was granted to another since.
        """
        ...

    async def release(self, lease: Lease) -> None:
        """Give a lease back; no-op if it is no longer ours."""
        ...

    async def touch(self, calls: Mapping[SandboxId, float]) -> None:
        """Record when sandboxes were last called, in seconds since the epoch; never backwards."""
        ...

    async def last_calls(self) -> Mapping[SandboxId, float]:
        """Return when each touched sandbox was last called."""
        ...

    async def announce_replica(self, replica: str, record: Mapping[str, Any], ttl_seconds: float) -> None:
        """Say that a replica of the hive lives for so long from now, and what it says of itself.

        An emptied store knows of none; each says so again before its time is over, and what is over is removed.
        """
        ...

    async def withdraw_replica(self, replica: str) -> None:
        """Take back that a replica lives; idempotent."""
        ...

    async def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what each replica that lives, by the store's clock, says of itself."""
        ...

    async def publish(self, channel: str, message: str) -> None:
        """Send a message to whoever subscribes to the channel now, on every replica."""
        ...

    def subscribe(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        """Receive what is published from the moment the context is entered.

        A reader that falls 1,000 messages behind loses the oldest, and a connection can break; every message must
        therefore be a hint to look again and never the only carrier of a fact. Where some may be missing the reader
        gets `LOST`, before those that came after.
        """
        ...

    def unready(self) -> str | None:
        """Say why the store cannot be used now, or None."""
        ...

    def warnings(self) -> Sequence[str]:
        """Return what an operator must know of how the store is set up, a sentence each."""
        ...

    def on_flushed(self, restore: Callable[[], Awaitable[None]]) -> None:
        """Have `restore` called when the store lost what it held, or may have; again while it raises `AshError`.

        It puts back what is true and drops what is not; several replicas do so at once.
        """
        ...
