"""Handshake-era sessions as the SDK's session manager holds them. The only file that knows its private parts.

The manager counts only its own requests when it decides that a session is idle; calls that the relay serves must
hold a session too.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import cast

from mcp.server.streamable_http import StreamableHTTPServerTransport
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

__all__ = ["SdkSessions"]


class SdkSessions:
    """Looks into a session manager."""

    def __init__(self, manager: StreamableHTTPSessionManager) -> None:
        self._manager = manager

    def alive(self, session_id: str) -> bool:
        return session_id in self._transports()

    def hold(self, session_id: str) -> AbstractContextManager[None] | None:
        """Return a context in which the session does not become idle; None if there is no such session."""
        transport = self._transports().get(session_id)
        return _held(transport) if transport is not None else None

    def _transports(self) -> Mapping[str, StreamableHTTPServerTransport]:
        return cast(
            "Mapping[str, StreamableHTTPServerTransport]",
            self._manager._server_instances,  # pyright: ignore[reportPrivateUsage]
        )


@contextmanager
def _held(transport: StreamableHTTPServerTransport) -> Generator[None]:
    scope, idle_timeout = transport.idle_scope, transport._idle_timeout  # pyright: ignore[reportPrivateUsage]
    if scope is None or idle_timeout is None:
        yield
        return
    transport._requests_in_flight += 1  # pyright: ignore[reportPrivateUsage]
    scope.deadline = math.inf
    try:
        yield
    finally:
        transport._requests_in_flight -= 1  # pyright: ignore[reportPrivateUsage]
        if not transport._requests_in_flight:  # pyright: ignore[reportPrivateUsage]
            # the loop's clock and not anyio's: the relay lets go in callbacks, where anyio may know of no task
            scope.deadline = asyncio.get_running_loop().time() + idle_timeout
