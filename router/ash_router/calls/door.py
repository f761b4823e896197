"""Doors: what of a request passes to a server, and what of the server's answer to the caller. Data; no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ash_mcp.wire import MCP_PATH
from ash_router.http import framing
from ash_router.http.framing import ResponseHead
from ash_router.http.heads import RequestHead

__all__ = ["CALL_HEADERS", "MCP_DOOR", "RESUMPTION_DOOR", "Door", "HeaderPolicy"]


@dataclass(frozen=True, slots=True)
class HeaderPolicy:
    """Which headers pass, by their names in lower case."""

    request: frozenset[bytes]
    """Those of the caller's request. `Mcp-Param-…` passes as well."""
    response: frozenset[bytes]
    """Those of the server's answer."""
    is_denylist: bool = False
    """Whether the names are those that do not pass. All others pass then, but for framing, headers of one connection,
    and `ash-…`."""

    def request_lines(self, head: RequestHead) -> bytes:
        """Return the header lines of a request that pass."""
        if self.is_denylist:
            return framing.passed_lines(head.headers, but=self.request)
        return head.lines(self.request)

    def response_lines(self, head: ResponseHead) -> bytes:
        """Return the status line and the header lines of an answer that pass."""
        if self.is_denylist:
            return framing.status_line(head.status) + framing.passed_lines(head.headers, but=self.response)
        return head.lines(self.response)


@dataclass(frozen=True, slots=True)
class Door:
    """One kind of endpoint that callers reach directly."""

    target: bytes
    """The path that the server is asked for; a request's `DirectRequest.rest` is appended."""
    methods: frozenset[str] | None
    """None: all."""
    headers: HeaderPolicy

    def takes(self, method: str) -> bool:
        """Return whether requests with this method pass."""
        return self.methods is None or method in self.methods


CALL_HEADERS: Final = HeaderPolicy(framing.TO_CALL, framing.FROM_CALL)
"""Of a relayed call."""

MCP_DOOR: Final = Door(
    MCP_PATH.encode(), frozenset({"GET", "POST", "DELETE"}), HeaderPolicy(framing.TO_ENDPOINT, framing.FROM_ENDPOINT)
)
"""A sandbox's own MCP endpoint."""

_OF_SESSION: Final = frozenset(
    {b"last-event-id", b"mcp-method", b"mcp-name", b"mcp-protocol-version", b"mcp-session-id"}
)
RESUMPTION_DOOR: Final = Door(
    MCP_DOOR.target, frozenset({"GET"}), HeaderPolicy(framing.TO_ENDPOINT - _OF_SESSION, framing.FROM_CALL)
)
"""The stream of a relayed call, continued; the headers of its session are the hive's to set."""
