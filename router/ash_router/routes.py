"""The route table: from a session name or sandbox id to the sandbox's endpoint.

A route is bound when its sandbox is ready, and unbound when it ends. The store carries routes between replicas. Calls
read this process's copy and never wait; only an unknown name is looked up in the store. While the store is away, calls
on known routes go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypeVar

import anyio

from ash_mcp.errors import ConnectFailed
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Endpoint, Principal, SandboxId, Scope, SessionName
from ash_router.admission.share_tokens import SharedSandbox
from ash_router.admission.shares import NO_SHARES, Shares
from ash_router.store.base import ROUTE_NEWS, RouteChanges, Store

__all__ = ["Route", "Routes", "resolve_name", "split_tool_name", "visible"]

BACKSTOP_SECONDS: Final = 5.0
"""How often the store is read although it published no change."""
RETRY_SECONDS: Final = 0.5
REFILL_SECONDS: Final = 15.0
"""How long known routes are kept that a flushed store lacks: the time that hives have to put them back."""
log = logging.getLogger("ash.routes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where the calls of one ready sandbox go."""

    sandbox_id: SandboxId
    owner: str
    """The subject of the principal that owns it."""
    scope: Scope
    session: SessionName
    endpoint: Endpoint
    tool_names: Mapping[str, str] = field(default_factory=dict[str, str])
    """Listed tool name (without the session) -> the sandbox's own name, only for those that were shortened or
    cleaned; any other name goes through as it is."""
    alias: str | None = None
    """One more global name of the sandbox, as unguessable as its id: the uuid that the seed's REST gave it."""
    shares: Shares = NO_SHARES
    """Its shares. A route with an earlier version of them never takes the place of one with a later."""
    ports: tuple[int, ...] = ()
    """The ports inside the sandbox that its spawn allowed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "endpoint", self.endpoint.of(self.sandbox_id))

    @property
    def id(self) -> SandboxId:
        return self.sandbox_id

    @property
    def names(self) -> frozenset[str]:
        """What a request may call the sandbox whose caller sees no other."""
        return frozenset({self.sandbox_id, self.session, *([self.alias] if self.alias is not None else [])})


class Owned(Protocol):
    """What `resolve_name` finds by name: routes and sandboxes have these properties."""

    @property
    def id(self) -> SandboxId: ...
    @property
    def owner(self) -> str: ...
    @property
    def scope(self) -> Scope: ...
    @property
    def session(self) -> SessionName: ...


T = TypeVar("T", bound=Owned)


def split_tool_name(name: str) -> tuple[str, str] | None:
    """Split `<session>_<tool>`; None when the name has not that shape. A session name holds no underscore."""
    session, underscore, tool = name.partition("_")
    return (session, tool) if underscore and session and tool else None


class Routes:
    """This process's copy of the routes, kept equal to the store that all replicas share.

    Args:
        forgotten: Called with each sandbox whose route another replica unbound.
    """

    def __init__(
        self,
        store: Store,
        *,
        forgotten: Callable[[SandboxId], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._forgotten = forgotten
        self._clock = clock
        self._version: str | None = None
        self._refilled_at: float | None = None
        """When routes that a flushed store lacks are dropped; None if it was not flushed."""
        self._looking = anyio.Lock()
        self._looks = 0
        """How many reads of the store have begun."""
        self._looked = 0
        """The number of the last read that ended, and why it failed."""
        self._look_failed: ConnectFailed | None = None
        self._own_steps: dict[SandboxId, int] = {}
        """Sandboxes whose routes this process is writing to the store now, with the number of such writes."""
        self._own_since_look: set[SandboxId] = set()
        self._by_id: dict[SandboxId, Route] = {}
        self._by_alias: dict[str, Route] = {}
        self._by_share: dict[str, Route] = {}
        self._by_name: dict[tuple[str, Scope, str], Route] = {}
        self._by_owner: dict[str, dict[SandboxId, Route]] = {}
        self.changes = 0
        """Counts changes: a cached result of `resolve` is good while this is equal."""

    async def bind(self, route: Route) -> None:
        """Make `route` the way to its sandbox, here at once and in the store for every replica.

        Raises:
            ConnectFailed: The store is away, and no route was bound.
        """
        known = self._by_id.get(route.sandbox_id)
        self._remember(route)
        route = self._by_id[route.sandbox_id]
        with self._own(route.sandbox_id):
            try:
                await self._store.put_route(_to_record(route))
            except BaseException:
                if known is None:
                    self._forget(route.sandbox_id)
                    with anyio.CancelScope(shield=True):  # the failed write may have reached the store
                        await self._store.drop_route(route.sandbox_id)
                raise

    async def unbind(self, sandbox_id: SandboxId, alias: str | None = None) -> None:
        """Forget the route to a sandbox; idempotent.

        Args:
            alias: As with `Store.drop_route`.
        """
        self._forget(sandbox_id)
        with self._own(sandbox_id):
            await self._store.drop_route(sandbox_id, alias)

    @contextmanager
    def _own(self, sandbox_id: SandboxId) -> Generator[None]:
        """Mark a write of this process, so that a read of the store that began before it does not undo it."""
        self._own_steps[sandbox_id] = self._own_steps.get(sandbox_id, 0) + 1
        try:
            yield
        finally:
            self._own_since_look.add(sandbox_id)
            self._own_steps[sandbox_id] -= 1
            if not self._own_steps[sandbox_id]:
                del self._own_steps[sandbox_id]

    def get(self, sandbox_id: SandboxId) -> Route | None:
        return self._by_id.get(sandbox_id)

    def named(self, name: str) -> Route | None:
        """Return the route of the sandbox with that id or alias, whosever it is."""
        return self._by_id.get(SandboxId(name)) or self._by_alias.get(name)

    async def holder(self, alias: str) -> SandboxId | None:
        """Return the sandbox with that alias, as far as this process or the store knows of one."""
        if alias not in self._by_alias:
            with suppress(ConnectFailed):
                await self.catch_up()
        route = self._by_alias.get(alias)
        return None if route is None else route.id

    def shared(self, share_id: str) -> SharedSandbox | None:
        """Return the share of that id with its sandbox, as far as this process knows."""
        route = self._by_share.get(share_id)
        share = next((it for it in route.shares.held if it.id == share_id), None) if route is not None else None
        return None if route is None or share is None else SharedSandbox(share, route.id, route.names)

    async def learn_shares(self) -> None:
        """Learn of the shares that other processes made until now.

        Raises:
            ConnectFailed: The store is away, or was emptied a moment ago and may lack some; retryable.
        """
        await self.catch_up()
        if self._refilled_at is not None:
            raise ConnectFailed("the hive is being told of its sandboxes again; try again in a moment")

    def resolve(self, principal: Principal, scope: Scope, name: str) -> Route | None:
        """Return the route that `name` means to this caller, by `resolve_name`; None for several as for none."""
        found = resolve_name(
            principal, scope, name, by_name=self._by_name, by_id=self._by_id, named=self.named, owned_by=self._owned_by
        )
        return found[0] if len(found) == 1 else None

    def _owned_by(self, owner: str) -> Iterable[Route]:
        return self._by_owner.get(owner, {}).values()

    async def find(self, principal: Principal, scope: Scope, name: str) -> Route | None:
        """Like `resolve`, but ask the store before saying that there is none: another replica may just have bound it.

        Raises:
            ConnectFailed: It is not known here and the store is away; retryable.
        """
        route = self.resolve(principal, scope, name)
        if route is None:
            await self.catch_up()
            route = self.resolve(principal, scope, name)
        return route

    async def run(self) -> None:
        """Follow what other replicas bind and unbind, until cancelled."""
        stale = anyio.Event()

        async def listen() -> None:
            async with self._store.subscribe(ROUTE_NEWS) as news:
                stale.set()
                async for _ in news:
                    stale.set()

        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            while True:
                stale = anyio.Event()
                bound = BACKSTOP_SECONDS
                try:
                    await self.catch_up()
                except ConnectFailed as exc:
                    log.debug("going on with the routes known here", extra={"why": exc.message})
                    bound = RETRY_SECONDS
                with anyio.move_on_after(bound):
                    await stale.wait()

    async def catch_up(self) -> None:
        """Apply what has changed in the store until now; concurrent callers share one read.

        Raises:
            ConnectFailed: The store is away.
        """
        came = self._looks
        async with self._looking:
            if self._looked <= came:  # else a read that began after this call has ended already
                self._looks += 1
                self._look_failed = await self._look()
                self._looked = self._looks  # not reached by a cancelled read, which must not count
            if self._look_failed is not None:
                raise ConnectFailed(self._look_failed.message) from self._look_failed

    async def _look(self) -> ConnectFailed | None:
        try:
            since = self._version
            if self._refilled_at is not None and self._clock() >= self._refilled_at:
                since = self._version = self._refilled_at = None
            self._own_since_look = set(self._own_steps)
            self._apply(await self._store.route_changes(since))
        except ConnectFailed as error:
            return error
        return None

    def _apply(self, changes: RouteChanges) -> None:
        ours = self._own_since_look
        seen: set[SandboxId] = set(changes.unbound)
        for record in changes.bound:
            route = _from_record(record)
            seen.add(route.sandbox_id)
            if route.sandbox_id not in ours:
                self._remember(route)
        gone = set(changes.unbound)
        if changes.refilling:
            self._refilled_at = self._clock() + REFILL_SECONDS
        elif changes.complete and self._refilled_at is None:
            gone |= self._by_id.keys() - seen
        for sandbox_id in gone - ours:
            self._leave(sandbox_id)
        if not seen & ours:  # else this read saw our own writes half done: the same changes are read again
            self._version = changes.version

    def _leave(self, sandbox_id: SandboxId) -> None:
        if sandbox_id in self._by_id:
            self._forget(sandbox_id)
            if self._forgotten is not None:
                self._forgotten(sandbox_id)

    def of(self, principal: Principal, scope: Scope) -> Iterable[Route]:
        """Return the routes that a caller may see, oldest first."""
        if principal.sandbox is not None:
            route = self._by_id.get(principal.sandbox)
            return [] if route is None else [route]
        owned = self._by_owner.get(principal.subject, {})
        return [route for route in owned.values() if _sees(principal, scope, route)]

    def ids(self) -> set[SandboxId]:
        """Return the ids of all sandboxes that have a known route."""
        return set(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def _remember(self, route: Route) -> None:
        known = self._by_id.get(route.sandbox_id)
        if known is not None:
            route = replace(route, shares=known.shares.later(route.shares))
        if known == route:
            return
        self._forget(route.sandbox_id)
        self.changes += 1
        self._by_id[route.sandbox_id] = route
        self._by_name[route.owner, route.scope, route.session] = route
        self._by_owner.setdefault(route.owner, {})[route.sandbox_id] = route
        if route.alias is not None:
            self._by_alias[route.alias] = route
        self._by_share.update((share.id, route) for share in route.shares.held)

    def _forget(self, sandbox_id: SandboxId) -> None:
        route = self._by_id.pop(sandbox_id, None)
        if route is None:
            return
        self.changes += 1
        key = (route.owner, route.scope, route.session)
        if self._by_name.get(key) is route:
            del self._by_name[key]
        if route.alias is not None:
            self._by_alias.pop(route.alias, None)
        for share in route.shares.held:
            self._by_share.pop(share.id, None)
        owned = self._by_owner[route.owner]
        del owned[sandbox_id]
        if not owned:
            del self._by_owner[route.owner]


def visible(principal: Principal, scope: Scope, sandbox_id: SandboxId, owner: str, owned_scope: Scope) -> bool:
    """Return whether a caller who asks in `scope` may see a sandbox of `owner` in `owned_scope`.

    A principal bound to one sandbox sees it from any scope, and no other.
    """
    if principal.sandbox is not None:
        return sandbox_id == principal.sandbox
    if owner != principal.subject:
        return False
    if principal.bound_scopes is not None and owned_scope not in principal.bound_scopes:
        return False
    return scope in (EVERY_SCOPE, owned_scope)


def _sees(principal: Principal, scope: Scope, route: Route) -> bool:
    return visible(principal, scope, route.sandbox_id, route.owner, route.scope)


def resolve_name(
    principal: Principal,
    scope: Scope,
    name: str,
    *,
    by_name: Mapping[tuple[str, Scope, str], T],
    by_id: Mapping[SandboxId, T],
    named: Callable[[str], T | None],
    owned_by: Callable[[str], Iterable[T]],
) -> list[T]:
    """Return what `name`, a session name, an id or an alias, means to a caller: several only under `*`.

    There can be several only in scope `*`, unless one of the default scope has the name: that one wins.

    Args:
        by_name: By owner, scope and session name.
        named: Returns what has an id or alias.
        owned_by: Returns everything that an owner has, in any scope; what the caller may not see is skipped.
    """

    def sees(thing: T) -> bool:
        return visible(principal, scope, thing.id, thing.owner, thing.scope)

    # An id or an alias is nobody's session name, so the order of these does not matter, but for the time it takes.
    found = by_name.get((principal.subject, DEFAULT_SCOPE if scope == EVERY_SCOPE else scope, name))
    if found is not None and sees(found):
        return [found]
    found = named(name)
    if found is not None:
        return [found] if sees(found) else []
    if principal.sandbox is not None:
        only = by_id.get(principal.sandbox)
        return [only] if only is not None and only.session == name else []
    if scope != EVERY_SCOPE:
        return []
    return [thing for thing in owned_by(principal.subject) if thing.session == name and sees(thing)]


def _to_record(route: Route) -> dict[str, object]:
    shape: dict[str, object] = {
        "sandbox_id": route.sandbox_id,
        "owner": route.owner,
        "scope": route.scope,
        "session": route.session,
        "endpoint": _endpoint_record(route.endpoint),
        "tool_names": dict(route.tool_names),
    }
    if route.alias is not None:
        shape["alias"] = route.alias
    if route.ports:
        shape["ports"] = list(route.ports)
    return {**shape, "shares": route.shares.to_json()} if route.shares.version else shape


def _endpoint_record(endpoint: Endpoint) -> dict[str, object]:
    shape: dict[str, object] = {"unix": endpoint.unix, "host": endpoint.host, "port": endpoint.port}
    if endpoint.server_path is not None:
        shape["server_path"] = endpoint.server_path
    return shape if endpoint.proves else {**shape, "proves": False}


def _from_record(record: Mapping[str, Any]) -> Route:
    return Route(
        sandbox_id=SandboxId(record["sandbox_id"]),
        owner=record["owner"],
        scope=Scope(record["scope"]),
        session=SessionName(record["session"]),
        endpoint=Endpoint(**record["endpoint"]),
        tool_names=record["tool_names"],
        alias=record.get("alias"),
        shares=Shares.from_json(record["shares"]) if "shares" in record else NO_SHARES,
        ports=tuple(record.get("ports", ())),
    )
