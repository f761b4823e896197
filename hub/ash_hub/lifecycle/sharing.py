"""Shares of sandboxes, as their owners make, list and revoke them. A share is kept in its sandbox's record."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ash_hub.lifecycle.controller import Controller
from ash_hub.lifecycle.parts import Parts
from ash_hub.lifecycle.record import Record
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_mcp.errors import ConfigError, ConnectFailed, PermissionDenied, ToolNotFound, Unsupported
from ash_mcp.types import Principal, Scope
from ash_router.admission.shares import NO_SHARES, Share, new_share
from ash_router.calls.ports import port_not_allowed

__all__ = ["MintedShare", "Sharing"]

MAX_TOOLS_BYTES: Final = 8192
"""Of the names of one share's tools, as JSON: a pod's record, with all of its shares, has 256 KiB at most."""


@dataclass(frozen=True, slots=True)
class MintedShare:
    """A new share, with its token, which is stored nowhere."""

    share: Share
    token: str


class Sharing:
    """The shares of one hive's sandboxes."""

    def __init__(self, parts: Parts, controller: Controller, sandboxes: Sandboxes) -> None:
        self._parts = parts
        self._controller = controller
        self._sandboxes = sandboxes

    async def mint(
        self,
        owner: Principal,
        scope: Scope,
        name: str,
        tools: Sequence[str] | None,
        ttl_seconds: float | None,
        ports: Sequence[int] = (),
    ) -> tuple[Sandbox, MintedShare]:
        """Share a sandbox; the share is good when this returns.

        Args:
            tools: By the sandbox's own names; None: all that it lists, or none where ports are named.
            ttl_seconds: None: as long as the sandbox lives.
            ports: Inside the sandbox; some of those that its spawn allowed.

        Raises:
            PermissionDenied: The caller is a guest itself.
            ToolNotFound: It lists no such tool.
            PortNotAllowed: Its spawn did not allow one of the ports.
            CapacityExceeded: It has as many shares as a sandbox may.
        """
        sandbox = self._owned(owner, scope, name)
        named = () if ports and tools is None else _checked(sandbox, tools)
        minted = MintedShare(*new_share(named, self._parts.clock(), ttl_seconds, _allowed(sandbox, ports)))
        most = self._parts.settings.limits.shares_per_sandbox

        def shared(record: Record) -> Record:
            return replace(record, shares=record.shares.plus(minted.share, self._parts.clock(), most))

        await self._controller.change(sandbox, shared)
        await self._controller.settle([sandbox.id])
        return sandbox, minted

    def list(self, owner: Principal, scope: Scope, name: str) -> tuple[Sandbox, Sequence[Share]]:
        """Return the shares of a sandbox that are good now, the oldest first."""
        sandbox = self._owned(owner, scope, name)
        route = self._parts.routes.get(sandbox.id)  # which another replica's change may have reached first
        shares = sandbox.record.shares.later(route.shares if route is not None else NO_SHARES)
        return sandbox, shares.living(self._parts.clock())

    async def revoke(
        self, owner: Principal, scope: Scope, name: str, ids: Collection[str] | None
    ) -> tuple[Sandbox, Sequence[str]]:
        """Revoke shares of a sandbox, and return the sandbox and the ids of those that it had.

        Args:
            ids: None: all of them.

        Raises:
            NotFound: It has no such share, and nothing was revoked.
            ConnectFailed: They are revoked for good, but the store is away, so other replicas may not know yet.
            HiveFault: The same, for a defect of the hive's own.
        """
        sandbox = self._owned(owner, scope, name)
        revoked: Sequence[str] = ()

        def unshared(record: Record) -> Record:
            nonlocal revoked
            revoked = sorted({share.id for share in record.shares.held} if ids is None else set(ids))
            return replace(record, shares=record.shares.minus(revoked, self._parts.clock()))

        await self._controller.change(sandbox, unshared)
        if not await self._controller.settle([sandbox.id]):
            away = ConnectFailed("revoked for good, but the store is away: other replicas follow when it is back")
            raise self._controller.defect_of(sandbox.id) or away
        return sandbox, revoked

    def _owned(self, owner: Principal, scope: Scope, name: str) -> Sandbox:
        if owner.sandbox is not None:
            raise PermissionDenied("only the owner of a sandbox shares it; your key or token is for one sandbox")
        return self._sandboxes.ready(owner, scope, name)


def _checked(sandbox: Sandbox, tools: Sequence[str] | None) -> Sequence[str]:
    listed = [tool.name for tool in sandbox.toolset.tools] if sandbox.toolset is not None else []
    named = listed if tools is None else list(dict.fromkeys(tools))
    unknown = [tool for tool in named if tool not in listed]
    if unknown:
        raise ToolNotFound(
            f"sandbox {sandbox.session} lists no tool {', '.join(map(repr, unknown[:5]))}; write the names as `call` "
            f"takes them: {', '.join(listed[:40])}",
            tool=unknown[0],
        )
    if not named:
        raise ConfigError(f"a share of {sandbox.session} would open nothing; name at least one tool")
    if len(json.dumps(named)) > MAX_TOOLS_BYTES:
        raise ConfigError(f"the tools of a share have at most {MAX_TOOLS_BYTES} bytes of names; name only some")
    return named


def _allowed(sandbox: Sandbox, ports: Sequence[int]) -> Sequence[int]:
    refused = [port for port in ports if port not in sandbox.record.ports]
    if refused:
        raise port_not_allowed(sandbox.session, refused[0], sandbox.record.ports)
    if ports and sandbox.endpoint is not None and not sandbox.endpoint.has_runner:
        raise Unsupported(f"{sandbox.session} is an image that is a server by itself: nothing leads to its ports")
    return list(dict.fromkeys(ports))
