"""The in-process store: one hive, one process, nothing kept beyond it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ash_mcp.types import RunId, SandboxId, Scope, SessionName
from ash_router.store._reader import Reader
from ash_router.store.base import (
    CHOSEN_NUMBERS,
    ENDED_RUN_SECONDS,
    ENDED_RUNS,
    IDLE_SCOPE_SECONDS,
    IDLE_SCOPES,
    LAYOUT,
    MAX_REPLICAS,
    NO_PLACE_LIMITS,
    ROUTE_NEWS,
    TAKEN_TICKETS,
    Place,
    PlaceLimits,
    RouteChanges,
    Run,
    RunLease,
    RunLimits,
    RunState,
    Shelf,
    run_not_open,
    run_taken,
    session_taken,
    tickets_full,
)
from ash_router.store.clock import even_clock

__all__ = ["MemoryStore"]

CHANGES_REMEMBERED: Final = 1000
"""Routes that changed last; a reader that knows only an older version gets all routes."""

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


@dataclass(slots=True)
class _Ticket:
    until: float
    text: str
    taken_by: str | None = None


class MemoryStore:
    """A `Store` for the embedded default. All steps are atomic because none of them waits."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or even_clock()
        self._routes: dict[SandboxId, Mapping[str, Any]] = {}
        self._version = 0
        self._changed: dict[SandboxId, int] = {}
        self._names: dict[Owned, _Names] = {}
        self._idle: dict[Owned, float] = {}
        """Since when nobody holds a name there; the longest first."""
        self._places: dict[SandboxId, Place] = {}
        self._counts: Counter[str] = Counter()
        self._starting: dict[SandboxId, str] = {}
        """Owners of the sandboxes with a place that had no route yet."""
        self._starts: Counter[str] = Counter()
        self._keys: dict[tuple[str, Scope, str], SandboxId] = {}
        self._open_runs: dict[RunId, tuple[Run, float]] = {}
        """With when the lease of each is over."""
        self._ended_runs: dict[RunId, tuple[Run, RunState, float]] = {}
        """With when each ended; the first to end first."""
        self._calls: dict[SandboxId, float] = {}
        self._shelves: dict[str, dict[str, tuple[float, str]]] = {}
        """By name of shelf and text: until when, and the text; the oldest first."""
        self._tickets: dict[SandboxId, dict[str, _Ticket]] = {}
        self._replicas: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self._readers: dict[str, set[Reader]] = {}

    async def put_route(self, record: Mapping[str, Any]) -> None:
        sandbox_id = SandboxId(record["sandbox_id"])
        self._started(sandbox_id)
        known = self._routes.get(sandbox_id, {})
        if known != record and _share_version(record) >= _share_version(known):
            self._routes[sandbox_id] = dict(record)
            await self._note_change(sandbox_id)

    async def drop_route(self, sandbox_id: SandboxId, alias: str | None = None) -> None:
        del alias
        self._calls.pop(sandbox_id, None)
        self._tickets.pop(sandbox_id, None)
        if self._routes.pop(sandbox_id, None) is not None:
            await self._note_change(sandbox_id)

    async def note_starting(self, alias: str) -> None:
        del alias  # a gateway of the seed's reads Redis only

    async def restore_aliases(self, aliases: Mapping[SandboxId, str]) -> None:
        del aliases

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
        most: PlaceLimits = NO_PLACE_LIMITS,
        restoring: bool = False,
        run: RunId | None = None,
    ) -> SessionName:
        if run is not None and run not in self._open_runs:
            raise run_not_open(run)
        names = self._names.get((owner, scope)) or _Names()
        if wanted is not None and names.held.get(wanted, sandbox_id) != sandbox_id:
            raise session_taken(wanted, names.held[wanted])
        if not restoring and (full := self._full(owner, sandbox_id, most)) is not None:
            raise most.reached(full)
        session = wanted or names.of.get(sandbox_id) or _next_name(names)
        names.held[session] = sandbox_id
        self._names[owner, scope] = names
        self._idle.pop((owner, scope), None)
        if sandbox_id not in self._places:
            self._places[sandbox_id] = Place(owner, scope, session)
            self._counts[owner] += 1
            if not restoring:
                self._starting[sandbox_id] = owner
                self._starts[owner] += 1
        numbered = _NUMBERED.fullmatch(session)
        if numbered is not None and int(numbered[1]) > names.last_number:
            names.chosen_numbers.add(int(numbered[1]))
            _bound_chosen(names)
        names.of[sandbox_id] = session
        return session

    def _full(self, owner: str, sandbox_id: SandboxId, most: PlaceLimits) -> str | None:
        if sandbox_id in self._places:
            return None
        if most.owner is not None and self._counts[owner] >= most.owner:
            return "owner"
        if most.starting is not None and self._starts[owner] >= most.starting:
            return "starting"
        return "hive" if most.hive is not None and len(self._places) >= most.hive else None

    async def release_session(self, owner: str, scope: Scope, session: SessionName, sandbox_id: SandboxId) -> None:
        names = self._names.get((owner, scope))
        if names is not None and names.held.get(session) == sandbox_id:
            del names.held[session]
            if names.of.get(sandbox_id) == session:
                del names.of[sandbox_id]
            self._started(sandbox_id)
            if (place := self._places.pop(sandbox_id, None)) is not None:
                self._counts[place.owner] -= 1
                if not self._counts[place.owner]:
                    del self._counts[place.owner]
            if not names.held and not names.last_number and not names.chosen_numbers:
                del self._names[owner, scope]
            elif not names.held:
                self._idle[owner, scope] = self._clock()
                self._forget_idle()

    def _forget_idle(self) -> None:
        over = self._clock() - IDLE_SCOPE_SECONDS
        while (longest := next(iter(self._idle), None)) is not None:
            if len(self._idle) <= IDLE_SCOPES and self._idle[longest] > over:
                return
            del self._idle[longest], self._names[longest]

    def _started(self, sandbox_id: SandboxId) -> None:
        owner = self._starting.pop(sandbox_id, None)
        if owner is not None:
            self._starts[owner] -= 1
            if not self._starts[owner]:
                del self._starts[owner]

    async def places(self) -> Mapping[SandboxId, Place]:
        return dict(self._places)

    async def claim_key(
        self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId, *, restoring: bool = False
    ) -> SandboxId:
        return self._keys.setdefault((owner, scope, key), sandbox_id)

    async def release_key(self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId) -> None:
        if self._keys.get((owner, scope, key)) == sandbox_id:
            del self._keys[owner, scope, key]

    async def open_run(self, run: Run, *, most: RunLimits, quiet_seconds: float) -> RunLease:
        self._end_overdue_runs(quiet_seconds)
        if (holder := self._run_named(run)) is not None:
            if run.key is None or holder.key != run.key:
                raise run_taken(holder, self._lease(holder.id).left_seconds)
            run = holder
        else:
            self._require_room(run, most)
        self._renew(run)
        return self._lease(run.id)

    async def renew_run(
        self, run_id: RunId, lost: Run | None = None, *, most: RunLimits | None = None, restoring: bool = False
    ) -> RunLease | None:
        self._forget_ended_runs()
        if run_id in self._ended_runs:
            return self._lease(run_id)
        if run_id in self._open_runs:
            if not restoring:
                self._renew(self._open_runs[run_id][0])
            return self._lease(run_id)
        if lost is None:
            return None
        if most is not None:
            self._require_room(lost, most)
        self._renew(lost)
        return self._lease(run_id)

    async def judge_runs(self, run_ids: Sequence[RunId], *, quiet_seconds: float) -> Mapping[RunId, RunLease]:
        self._end_overdue_runs(quiet_seconds)
        known = self._open_runs.keys() | self._ended_runs.keys()
        leases = {run_id: self._lease(run_id) for run_id in run_ids if run_id in known}
        return {
            run_id: replace(lease, left_seconds=max(lease.left_seconds, lease.run.lease_seconds - quiet_seconds))
            if lease.state is RunState.OPEN
            else lease
            for run_id, lease in leases.items()
        }

    async def end_run(self, run_id: RunId) -> None:
        self._end_run(run_id, RunState.DESTROYED)

    async def runs(self) -> list[RunLease]:
        return [self._lease(run_id) for run_id in self._open_runs]

    def _lease(self, run_id: RunId) -> RunLease:
        if run_id in self._ended_runs:
            run, state, _ = self._ended_runs[run_id]
            return RunLease(run, state)
        run, over_at = self._open_runs[run_id]
        return RunLease(run, RunState.OPEN, max(0.0, over_at - self._clock()))

    def _run_named(self, run: Run) -> Run | None:
        wanted = (run.owner, run.scope, run.name)
        runs = (it for it, _ in self._open_runs.values())
        return next((it for it in runs if (it.owner, it.scope, it.name) == wanted), None)

    def _require_room(self, run: Run, most: RunLimits) -> None:
        if sum(it.owner == run.owner for it, _ in self._open_runs.values()) >= most.owner:
            raise most.reached("owner")
        if len(self._open_runs) >= most.hive:
            raise most.reached("hive")

    def _renew(self, run: Run) -> None:
        self._open_runs[run.id] = (run, self._clock() + run.lease_seconds)

    def _end_overdue_runs(self, quiet_seconds: float) -> None:
        now = self._clock()
        for run, over_at in list(self._open_runs.values()):
            if over_at <= now and quiet_seconds >= run.lease_seconds:
                self._end_run(run.id, RunState.OVER)
        self._forget_ended_runs()

    def _end_run(self, run_id: RunId, state: RunState) -> None:
        if (found := self._open_runs.pop(run_id, None)) is not None:
            self._ended_runs[run_id] = (found[0], state, self._clock())
            self._forget_ended_runs()

    def _forget_ended_runs(self) -> None:
        over = self._clock() - ENDED_RUN_SECONDS
        while (first := next(iter(self._ended_runs), None)) is not None:
            if len(self._ended_runs) <= ENDED_RUNS and self._ended_runs[first][2] > over:
                return
            del self._ended_runs[first]

    async def touch(self, calls: Mapping[SandboxId, float]) -> None:
        for sandbox_id, at in calls.items():
            if sandbox_id not in self._routes:
                continue
            self._calls[sandbox_id] = max(at, self._calls.get(sandbox_id, at))

    async def last_calls(self) -> Mapping[SandboxId, float]:
        return dict(self._calls)

    async def keep(self, shelf: Shelf, name: str, text: str) -> None:
        kept = self._on(shelf)
        if name in kept or _size(text) > shelf.most_bytes:
            return
        kept[name] = (self._clock() + shelf.seconds, text)
        size = sum(_size(text) for _, text in kept.values())
        while len(kept) > shelf.most or size > shelf.most_bytes:
            _, oldest = kept.pop(next(iter(kept)))
            size -= _size(oldest)

    async def kept(self, shelf: Shelf, name: str | None = None) -> Mapping[str, str]:
        return {of: text for of, (_, text) in self._on(shelf).items() if name in (None, of)}

    def _on(self, shelf: Shelf) -> dict[str, tuple[float, str]]:
        now, kept = self._clock(), self._shelves.setdefault(shelf.name, {})
        for name in [name for name, (until, _) in kept.items() if until <= now]:
            del kept[name]
        return kept

    async def put_ticket(
        self, sandbox_id: SandboxId, digest: str, text: str, *, ttl_seconds: float, most: int
    ) -> None:
        held = self._tickets_of(sandbox_id)
        if sum(ticket.taken_by is None for ticket in held.values()) >= most:
            raise tickets_full(most)
        self._tickets[sandbox_id] = held | {digest: _Ticket(self._clock() + ttl_seconds, text)}

    async def take_ticket(self, sandbox_id: SandboxId, digest: str, by: str) -> str | None:
        ticket = self._tickets_of(sandbox_id).get(digest)
        if ticket is None or ticket.taken_by not in (None, by):
            return None
        ticket.taken_by = by
        return ticket.text

    def _tickets_of(self, sandbox_id: SandboxId) -> dict[str, _Ticket]:
        """Return the tickets of a sandbox whose time is not over; of those that are taken the last ones."""
        now, held = self._clock(), self._tickets.pop(sandbox_id, {})
        held = {digest: ticket for digest, ticket in held.items() if ticket.until > now}
        taken = [digest for digest, ticket in held.items() if ticket.taken_by is not None]
        for digest in taken[:-TAKEN_TICKETS]:
            del held[digest]
        if held:
            self._tickets[sandbox_id] = held
        return held

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

    def now(self) -> float:
        return self._clock()

    def unready(self) -> str | None:
        return None

    def layout(self) -> str:
        return LAYOUT

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


def _bound_chosen(names: _Names) -> None:
    if len(names.chosen_numbers) > CHOSEN_NUMBERS:
        lower = sorted(names.chosen_numbers)[: CHOSEN_NUMBERS // 2]
        names.chosen_numbers.difference_update(lower)
        names.last_number = lower[-1]


def _size(text: str) -> int:
    return len(text.encode())


def _share_version(record: Mapping[str, Any]) -> int:
    return int(record.get("shares", {}).get("version", 0))
