"""The in-process store: one hive, one process, nothing kept beyond it."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ash_mcp.errors import SessionTaken
from ash_mcp.types import SandboxId, Scope, SessionName
from ash_router import _lease
from ash_router.store._reader import Reader
from ash_router.store.base import MAX_REPLICAS, ROUTE_NEWS, Lease, RouteChanges

__all__ = ["MemoryStore"]

CHANGES_REMEMBERED: Final = 1000
"""Routes that changed last; who knows only an older version is told all routes."""

_NUMBERED: Final = re.compile(r"sb([1-9][0-9]*)")

Owned = tuple[str, Scope]


@dataclass(slots=True)
class _Names:
    """The session names of one owner and scope."""

    held: dict[SessionName, SandboxId] = field(default_factory=dict[SessionName, SandboxId])
    of: dict[SandboxId, SessionName] = field(default_factory=dict[SandboxId, SessionName])
    last_number: int = 0
    chosen_numbers: set[int] = field(default_factory=set[int])
    """Beyond `last_number`, names of the numbered form that callers chose themselves."""


class MemoryStore:
    """A `Store` for the embedded default. All steps are atomic because none of them waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._routes: dict[SandboxId, Mapping[str, Any]] = {}
        self._version = 0
        self._changed: dict[SandboxId, int] = {}
        self._names: dict[Owned, _Names] = {}
        self._keys: dict[tuple[str, Scope, str], SandboxId] = {}
        self._leases: dict[str, Lease] = {}
        self._calls: dict[SandboxId, float] = {}
        self._replicas: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self._readers: dict[str, set[Reader]] = {}

    async def put_route(self, record: Mapping[str, Any]) -> None:
        sandbox_id = SandboxId(record["sandbox_id"])
        known = self._routes.get(sandbox_id)
        if known is None or (known["generation"] <= record["generation"] and known != record):
            self._routes[sandbox_id] = dict(record)
            await self._note_change(sandbox_id)

    async def drop_route(self, sandbox_id: SandboxId) -> None:
        self._calls.pop(sandbox_id, None)
        if self._routes.pop(sandbox_id, None) is not None:
            await self._note_change(sandbox_id)

    async def routes(self) -> list[Mapping[str, Any]]:
        return list(self._routes.values())

    async def route_changes(self, since: str | None) -> RouteChanges:
        version, known = str(self._version), int(since or 0)
        is_trimmed = len(self._changed) == CHANGES_REMEMBERED
        if since is None or (is_trimmed and known < next(iter(self._changed.values())) - 1):
            return RouteChanges(version=version, bound=await self.routes(), complete=True)
        changed = [sandbox_id for sandbox_id in self._changed if self._changed[sandbox_id] > known]
        return RouteChanges(
            version=version,
            bound=[self._routes[sandbox_id] for sandbox_id in changed if sandbox_id in self._routes],
            unbound=[sandbox_id for sandbox_id in changed if sandbox_id not in self._routes],
        )

    async def _note_change(self, sandbox_id: SandboxId) -> None:
        self._version += 1
        self._changed.pop(sandbox_id, None)
        self._changed[sandbox_id] = self._version
        if len(self._changed) > CHANGES_REMEMBERED:
            del self._changed[next(iter(self._changed))]
        await self.publish(ROUTE_NEWS, sandbox_id)

    async def reserve_session(
        self,
        owner: str,
        scope: Scope,
        wanted: SessionName | None,
        sandbox_id: SandboxId,
        *,
        restoring: bool = False,
    ) -> SessionName:
        names = self._names.setdefault((owner, scope), _Names())
        session = wanted or names.of.get(sandbox_id) or _next_name(names)
        holder = names.held.setdefault(session, sandbox_id)
        if holder != sandbox_id:
            raise SessionTaken(
                f"session {session} is in use; choose another name, or none to be given one", holder=holder
            )
        numbered = _NUMBERED.fullmatch(session)
        if numbered is not None and int(numbered[1]) > names.last_number:
            names.chosen_numbers.add(int(numbered[1]))
        names.of[sandbox_id] = session
        return session

    async def release_session(self, owner: str, scope: Scope, session: SessionName, sandbox_id: SandboxId) -> None:
        names = self._names.get((owner, scope))
        if names is not None and names.held.get(session) == sandbox_id:
            del names.held[session]
            if names.of.get(sandbox_id) == session:
                del names.of[sandbox_id]

    async def claim_key(
        self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId, *, restoring: bool = False
    ) -> SandboxId:
        return self._keys.setdefault((owner, scope, key), sandbox_id)

    async def release_key(self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId) -> None:
        if self._keys.get((owner, scope, key)) == sandbox_id:
            del self._keys[owner, scope, key]

    async def grant(self, name: str, holder: str, ttl_seconds: float) -> Lease:
        lease = _lease.grant(self._leases.get(name), name, holder, ttl_seconds, self._clock())
        self._leases[name] = lease
        return lease

    async def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        renewed = _lease.renew(self._leases.get(lease.name), lease, ttl_seconds, self._clock())
        self._leases[lease.name] = renewed
        return renewed

    async def release(self, lease: Lease) -> None:
        now = self._clock()
        last = self._leases.get(lease.name)
        if last is not None and _lease.held_by(last, lease, now):
            # Its token stays known, so that the next one is larger.
            self._leases[lease.name] = replace(last, expires_at=now)

    async def touch(self, calls: Mapping[SandboxId, float]) -> None:
        for sandbox_id, at in calls.items():
            self._calls[sandbox_id] = max(at, self._calls.get(sandbox_id, at))

    async def last_calls(self) -> Mapping[SandboxId, float]:
        return dict(self._calls)

    async def announce_replica(self, replica: str, record: Mapping[str, Any], ttl_seconds: float) -> None:
        self._replicas[replica] = (self._clock() + ttl_seconds, dict(record))
        self._drop_dead()
        while len(self._replicas) > MAX_REPLICAS:
            del self._replicas[min(self._replicas, key=lambda name: self._replicas[name][0])]

    async def withdraw_replica(self, replica: str) -> None:
        self._replicas.pop(replica, None)

    async def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        self._drop_dead()
        return {name: record for name, (_, record) in self._replicas.items()}

    def _drop_dead(self) -> None:
        now = self._clock()
        self._replicas = {name: kept for name, kept in self._replicas.items() if kept[0] > now}

    async def publish(self, channel: str, message: str) -> None:
        for reader in self._readers.get(channel, ()):
            reader.put(message)

    @asynccontextmanager
    async def subscribe(self, channel: str) -> AsyncGenerator[AsyncIterator[str]]:
        reader = Reader()
        readers = self._readers.setdefault(channel, set())
        readers.add(reader)
        try:
            yield reader
        finally:
            readers.discard(reader)
            if not readers:
                self._readers.pop(channel, None)

    def unready(self) -> str | None:
        return None

    def warnings(self) -> Sequence[str]:
        return ()

    def on_flushed(self, restore: Callable[[], Awaitable[None]]) -> None:
        """Never calls `restore`: what this process forgets, it forgets with everything else."""


def _next_name(names: _Names) -> SessionName:
    names.last_number += 1
    while names.last_number in names.chosen_numbers:
        names.chosen_numbers.discard(names.last_number)
        names.last_number += 1
    return SessionName(f"sb{names.last_number}")
