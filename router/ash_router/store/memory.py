"""The in-process store: one hive, one process, nothing kept beyond it."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ash_mcp.errors import SessionTaken
from ash_mcp.types import SandboxId, Scope, SessionName
from ash_router import _lease
from ash_router.store.base import Lease

__all__ = ["MemoryStore"]

MAX_BEHIND: Final = 1000
"""Messages that a slow reader may fall behind before it loses the oldest."""

_NUMBERED: Final = re.compile(r"sb([1-9][0-9]*)")

Owned = tuple[str, Scope]


@dataclass(slots=True)
class _Names:
    """The session names of one owner and scope."""

    held: dict[SessionName, SandboxId] = field(default_factory=dict[SessionName, SandboxId])
    last_number: int = 0
    chosen_numbers: set[int] = field(default_factory=set[int])
    """Beyond `last_number`, names of the numbered form that callers chose themselves."""


class MemoryStore:
    """A `Store` for the embedded default. All steps are atomic because none of them waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._routes: dict[SandboxId, Mapping[str, Any]] = {}
        self._names: dict[Owned, _Names] = {}
        self._keys: dict[tuple[str, Scope, str], SandboxId] = {}
        self._leases: dict[str, Lease] = {}
        self._calls: dict[SandboxId, float] = {}
        self._readers: dict[str, set[_Reader]] = {}

    async def put_route(self, record: Mapping[str, Any]) -> None:
        sandbox_id = SandboxId(record["sandbox_id"])
        known = self._routes.get(sandbox_id)
        if known is None or known["generation"] <= record["generation"]:
            self._routes[sandbox_id] = dict(record)

    async def drop_route(self, sandbox_id: SandboxId) -> None:
        self._routes.pop(sandbox_id, None)
        self._calls.pop(sandbox_id, None)

    async def routes(self) -> list[Mapping[str, Any]]:
        return list(self._routes.values())

    async def reserve_session(
        self, owner: str, scope: Scope, wanted: SessionName | None, sandbox_id: SandboxId
    ) -> SessionName:
        names = self._names.setdefault((owner, scope), _Names())
        session = wanted if wanted is not None else _next_name(names)
        if names.held.setdefault(session, sandbox_id) != sandbox_id:
            raise SessionTaken(f"session {session} is in use; choose another name, or none to be given one")
        numbered = _NUMBERED.fullmatch(session)
        if numbered is not None and int(numbered[1]) > names.last_number:
            names.chosen_numbers.add(int(numbered[1]))
        return session

    async def release_session(self, owner: str, scope: Scope, session: SessionName, sandbox_id: SandboxId) -> None:
        names = self._names.get((owner, scope))
        if names is not None and names.held.get(session) == sandbox_id:
            del names.held[session]

    async def claim_key(self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId) -> SandboxId:
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

    async def publish(self, channel: str, message: str) -> None:
        for reader in self._readers.get(channel, ()):
            reader.put(message)

    @asynccontextmanager
    async def subscribe(self, channel: str) -> AsyncGenerator[AsyncIterator[str]]:
        reader = _Reader()
        readers = self._readers.setdefault(channel, set())
        readers.add(reader)
        try:
            yield reader
        finally:
            readers.discard(reader)
            if not readers:
                self._readers.pop(channel, None)


def _next_name(names: _Names) -> SessionName:
    names.last_number += 1
    while names.last_number in names.chosen_numbers:
        names.chosen_numbers.discard(names.last_number)
        names.last_number += 1
    return SessionName(f"sb{names.last_number}")


class _Reader:
    """One subscription: an endless iterator over a bounded queue."""

    def __init__(self) -> None:
        self._queue: deque[str] = deque(maxlen=MAX_BEHIND)
        self._more = asyncio.Event()

    def put(self, message: str) -> None:
        self._queue.append(message)
        self._more.set()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while not self._queue:
            self._more.clear()
            await self._more.wait()
        return self._queue.popleft()
