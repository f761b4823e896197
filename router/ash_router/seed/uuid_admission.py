"""Admission where the uuid is the capability: whoever sends one may call the server that its hash in Redis names."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final

from ash_mcp.errors import AshError, ConfigError, ConnectFailed, SandboxNotFound
from ash_mcp.types import DEFAULT_SCOPE, Endpoint, Principal
from ash_router.admission.base import NOBODY, SESSION_HEADER, Admitted, Head, Refusal
from ash_router.admission.gate import HEALTH_PATH, READY_PATH
from ash_router.store.base import SeedRoutes

__all__ = ["UuidAdmission", "UuidAdmitted"]

OPEN_PATHS: Final = frozenset({HEALTH_PATH, READY_PATH})


@dataclass(frozen=True, slots=True, kw_only=True)
class UuidAdmitted(Admitted):
    """A request that may go to one server, and nowhere else."""

    endpoint: Endpoint


class UuidAdmission:
    """The `Admission` of a router for the seed's routes, which asks them anew for each request."""

    def __init__(self, routes: SeedRoutes) -> None:
        self._routes = routes

    def admit(self, head: Head) -> Admitted | Refusal | Awaitable[Admitted | Refusal]:
        path = head.target.partition(b"?")[0].decode("ascii")
        if path in OPEN_PATHS:
            return Admitted(NOBODY, DEFAULT_SCOPE, path)
        uuid = "".join(head.all(SESSION_HEADER))  # one, or none
        if not uuid:
            return Refusal(ConfigError("missing session header"), 400)
        return self._by_uuid(uuid, path)

    async def _by_uuid(self, uuid: str, path: str) -> Admitted | Refusal:
        try:
            endpoint = await self._routes.find(uuid)
        except AshError:
            return Refusal(ConnectFailed("route lookup error"), 502)
        if endpoint is None:
            return Refusal(SandboxNotFound("route not found"), 404)
        return UuidAdmitted(Principal(uuid), DEFAULT_SCOPE, path, endpoint=endpoint, by="uuid")
