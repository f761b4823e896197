"""Routes: which sandbox answers to which session name, and where it listens.

A route is bound when its sandbox is ready and unbound when it ends; between replicas the store carries it. Reads
on the way of a call come from this process's memory and never wait; only a name that it does not know is looked up
in the store. While the store is away calls on known routes go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import anyio

from ash_mcp.errors import ConnectFailed
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Endpoint, Principal, SandboxId, Scope, SessionName
from ash_router.store.base import ROUTE_NEWS, RouteChanges, Store

__all__ = ["Route", "Routes", "split_tool_name", "visible"]

BACKSTOP_SECONDS: Final = 5.0
"""How often the store is asked although it gave no news."""
RETRY_SECONDS: Final = 0.5
REFILL_SECONDS: Final = 15.0
"""How long routes that a flushed store lacks are believed: so long may the hive take to put them back."""
log = logging.getLogger("ash.routes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where the calls of one ready sandbox go."""

    sandbox_id: SandboxId
    generation: int
    owner: str
    """The subject of the principal that owns it."""
    scope: Scope
    session: SessionName
    endpoint: Endpoint
    tool_names: Mapping[str, str] = field(default_factory=dict[str, str])
    """Listed tool name (without the session) -> the sandbox's own name, only for those that were shortened or
    cleaned; any other name goes through as it is."""


def split_tool_name(name: str) -> tuple[str, str] | None:
    """Split `<session>_<tool>`; None when the name has not that shape. A session name holds no underscore."""
    session, underscore, tool = name.partition("_")
    return (session, tool) if underscore and session and tool else None


class Routes:
    """The routes this process knows, over a store that all replicas share.

    Args:
        forgotten: Told of a sandbox whose route another replica unbound.
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
        """When a store that was flushed is believed again on what it lacks."""
        self._looking = anyio.Lock()
        self._looks = 0
        """Looks at the store that were begun."""
        self._looked = 0
        """The last of them that ended, and why it failed."""
        self._look_failed: ConnectFailed | None = None
        self._own_steps: dict[SandboxId, int] = {}
        """Routes that this process is binding or unbinding right now, and how many times at once."""
        self._own_since_look: set[SandboxId] = set()
        self._by_id: dict[SandboxId, Route] = {}
        self._by_name: dict[tuple[str, Scope, str], Route] = {}
        self._by_owner: dict[str, dict[SandboxId, Route]] = {}
        self.changes = 0
        """Grows with each change: what was looked up before holds as long as it is the same."""

    async def bind(self, route: Route) -> None:
        """Make `route` the way to its sandbox, here at once and in the store for every replica.

        Raises:
            ConnectFailed: The store is away, and no route was bound.
        """
        known = self._by_id.get(route.sandbox_id)
        if known is None or known.generation <= route.generation:
            self._remember(route)
        with self._own(route.sandbox_id):
            try:
                await self._store.put_route(_to_record(route))
            except BaseException:
                if known is None:
                    self._forget(route.sandbox_id)
                    with anyio.CancelScope(shield=True):  # it may be there although nobody was told so
                        await self._store.drop_route(route.sandbox_id)
                raise

    async def unbind(self, sandbox_id: SandboxId) -> None:
        """Forget the route to a sandbox; idempotent."""
        self._forget(sandbox_id)
        with self._own(sandbox_id):
            await self._store.drop_route(sandbox_id)

    @contextmanager
    def _own(self, sandbox_id: SandboxId) -> Generator[None]:
        """Guard a step of ours from what a look at the store found before it."""
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

    def resolve(self, principal: Principal, scope: Scope, name: str) -> Route | None:
        """Return the route that `name` (a session name or a sandbox id) means to this caller, or None.

        Under `*` a name of the default scope wins; elsewhere it must be the name of one sandbox only.
        """
        route = self._by_id.get(SandboxId(name))
        if route is not None:
            return route if visible(principal, scope, route.owner, route.scope) else None
        if scope != EVERY_SCOPE:
            return self._by_name.get((principal.subject, scope, name))
        found = self._by_name.get((principal.subject, DEFAULT_SCOPE, name))
        if found is not None and visible(principal, scope, found.owner, found.scope):
            return found
        named = [r for r in self.of(principal, scope) if r.session == name]
        return named[0] if len(named) == 1 else None

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
        """Take over what changed in the store until now; callers at the same time share one look.

        Raises:
            ConnectFailed: The store is away.
        """
        came = self._looks
        async with self._looking:
            if self._looked <= came:  # else one ended that began after this caller came
                self._looks += 1
                self._look_failed = await self._look()
                self._looked = self._looks  # a look whose caller left counts for nobody
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
            known = self._by_id.get(route.sandbox_id)
            if route.sandbox_id not in ours and (known is None or known.generation <= route.generation):
                self._remember(route)
        gone = set(changes.unbound)
        if changes.refilling:
            self._refilled_at = self._clock() + REFILL_SECONDS
        elif changes.complete and self._refilled_at is None:
            gone |= self._by_id.keys() - seen
        for sandbox_id in gone - ours:
            self._leave(sandbox_id)
        if not seen & ours:  # else it is looked at again: what was found of ours may not be ours
            self._version = changes.version

    def _leave(self, sandbox_id: SandboxId) -> None:
        if sandbox_id in self._by_id:
            self._forget(sandbox_id)
            if self._forgotten is not None:
                self._forgotten(sandbox_id)

    def of(self, principal: Principal, scope: Scope) -> Iterable[Route]:
        """Return the routes that a caller sees, oldest first."""
        owned = self._by_owner.get(principal.subject, {})
        return [route for route in owned.values() if visible(principal, scope, route.owner, route.scope)]

    def ids(self) -> set[SandboxId]:
        """Return the sandboxes to which a route is known."""
        return set(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def _remember(self, route: Route) -> None:
        if self._by_id.get(route.sandbox_id) == route:
            return
        self._forget(route.sandbox_id)
        self.changes += 1
        self._by_id[route.sandbox_id] = route
        self._by_name[route.owner, route.scope, route.session] = route
        self._by_owner.setdefault(route.owner, {})[route.sandbox_id] = route

    def _forget(self, sandbox_id: SandboxId) -> None:
        route = self._by_id.pop(sandbox_id, None)
        if route is None:
            return
        self.changes += 1
        key = (route.owner, route.scope, route.session)
        if self._by_name.get(key) is route:
            del self._by_name[key]
        owned = self._by_owner[route.owner]
        del owned[sandbox_id]
        if not owned:
            del self._by_owner[route.owner]


def visible(principal: Principal, scope: Scope, owner: str, owned_scope: Scope) -> bool:
    """Say whether a caller who looks at `scope` sees what `owner` has in `owned_scope`."""
    if owner != principal.subject:
        return False
    if principal.bound_scopes is not None and owned_scope not in principal.bound_scopes:
        return False
    return scope in (EVERY_SCOPE, owned_scope)


def _to_record(route: Route) -> dict[str, object]:
    return {
        "sandbox_id": route.sandbox_id,
        "generation": route.generation,
        "owner": route.owner,
        "scope": route.scope,
        "session": route.session,
        "endpoint": {"unix": route.endpoint.unix, "host": route.endpoint.host, "port": route.endpoint.port},
        "tool_names": dict(route.tool_names),
    }


def _from_record(record: Mapping[str, Any]) -> Route:
    return Route(
        sandbox_id=SandboxId(record["sandbox_id"]),
        generation=record["generation"],
        owner=record["owner"],
        scope=Scope(record["scope"]),
        session=SessionName(record["session"]),
        endpoint=Endpoint(**record["endpoint"]),
        tool_names=record["tool_names"],
    )
