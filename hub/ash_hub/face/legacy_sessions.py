"""The MCP SDK's manager of handshake-era sessions, with an end callback and holds. Only this file uses its internals.

The manager counts only requests that it serves when it decides that a session is idle. Calls that the relay serves
keep the session alive by a hold.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http import GET_STREAM_KEY, StreamableHTTPServerTransport
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from starlette.types import Receive, Scope, Send

__all__ = ["SdkSessions"]


class _Manager(StreamableHTTPSessionManager):
    """Calls `on_ended` for each session that ends, for whatever reason, and begins streams that it cannot continue."""

    on_ended: Callable[[str], None]

    async def handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            # The relay has continued every stream that can be. Without stored events the SDK would answer 500.
            scope = {**scope, "headers": [header for header in scope["headers"] if header[0] != b"last-event-id"]}
        await super().handle_request(scope, receive, send)

    async def _discard_session(self, session_id: str, transport: StreamableHTTPServerTransport) -> None:
        self.on_ended(session_id)
        await super()._discard_session(session_id, transport)


class SdkSessions:
    """The session manager, and access to its sessions.

    Args:
        on_ended: Called with the id of each session that ends; perhaps more than once, or for one that never was.
    """

    def __init__(self, server: Server[Any], on_ended: Callable[[str], None]) -> None:
        # Admission has checked Host and Origin, more exactly than the SDK does, and the gate counts sessions.
        unguarded = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        self.manager = _Manager(server, security_settings=unguarded, max_sessions=None)
        self.manager.on_ended = on_ended

    def alive(self, session_id: str) -> bool:
        return session_id in self._transports()

    def listens(self, session_id: str) -> bool:
        """Say whether the session's client has its standalone stream open."""
        transport = self._transports().get(session_id)
        return transport is not None and GET_STREAM_KEY in transport._request_streams  # pyright: ignore[reportPrivateUsage]

    def hold(self, session_id: str) -> AbstractContextManager[None] | None:
        """Return a context in which the session does not become idle; None if there is no such session."""
        transport = self._transports().get(session_id)
        return _Hold(transport) if transport is not None else None

    async def end(self, session_id: str) -> None:
        """End a session; idempotent."""
        transport = self._transports().get(session_id)
        if transport is not None:
            await self.manager._discard_session(session_id, transport)  # pyright: ignore[reportPrivateUsage]

    def _transports(self) -> Mapping[str, StreamableHTTPServerTransport]:
        return cast(
            "Mapping[str, StreamableHTTPServerTransport]",
            self.manager._server_instances,  # pyright: ignore[reportPrivateUsage]
        )


class _Hold:
    """Counts as a request of the session while entered, once. A class, as each call of the era has one."""

    __slots__ = ("_idle_seconds", "_scope", "_transport")

    def __init__(self, transport: StreamableHTTPServerTransport) -> None:
        self._transport = transport
        self._scope, self._idle_seconds = transport.idle_scope, transport._idle_timeout  # pyright: ignore[reportPrivateUsage]

    def __enter__(self) -> None:
        transport, scope = self._transport, self._scope
        if scope is not None and self._idle_seconds is not None:
            transport._requests_in_flight += 1  # pyright: ignore[reportPrivateUsage]
            scope.deadline = math.inf

    def __exit__(self, *_: object) -> None:
        transport, scope, idle_seconds = self._transport, self._scope, self._idle_seconds
        if scope is None or idle_seconds is None:
            return
        transport._requests_in_flight -= 1  # pyright: ignore[reportPrivateUsage]
        if not transport._requests_in_flight:  # pyright: ignore[reportPrivateUsage]
            # the loop's clock, not anyio's: the relay ends holds in callbacks, outside of any task
            scope.deadline = asyncio.get_running_loop().time() + idle_seconds
