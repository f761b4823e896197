"""Routes: which sandbox answers to which session name, and where it listens.

A route is bound when its sandbox is ready and unbound when it ends; between replicas the store carries it. Reads
on the way of a call come from this process's memory and never wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Endpoint, Principal, SandboxId, Scope, SessionName
from ash_router.store.base import Store

__all__ = ["Route", "Routes", "split_tool_name", "visible"]


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
    """The routes this process knows, over a store that all replicas share."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_id: dict[SandboxId, Route] = {}
        self._by_name: dict[tuple[str, Scope, str], Route] = {}
        self._by_owner: dict[str, dict[SandboxId, Route]] = {}

    async def bind(self, route: Route) -> None:
        """Make `route` the way to its sandbox, here at once and in the store for every replica."""
        self._remember(route)
        await self._store.put_route(_to_record(route))

    async def unbind(self, sandbox_id: SandboxId) -> None:
        """Forget the route to a sandbox; idempotent."""
        self._forget(sandbox_id)
        await self._store.drop_route(sandbox_id)

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

    def of(self, principal: Principal, scope: Scope) -> Iterable[Route]:
        """Return the routes that a caller sees, oldest first."""
        owned = self._by_owner.get(principal.subject, {})
        return [route for route in owned.values() if visible(principal, scope, route.owner, route.scope)]

    def __len__(self) -> int:
        return len(self._by_id)

    def _remember(self, route: Route) -> None:
        self._forget(route.sandbox_id)
        self._by_id[route.sandbox_id] = route
        self._by_name[route.owner, route.scope, route.session] = route
        self._by_owner.setdefault(route.owner, {})[route.sandbox_id] = route

    def _forget(self, sandbox_id: SandboxId) -> None:
        route = self._by_id.pop(sandbox_id, None)
        if route is None:
            return
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
