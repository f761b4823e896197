"""The quota of open requests to the hive's own endpoint, counted by principal.

The relay limits calls and streams to sandboxes, `session_gate.py` limits handshake-era sessions. Neither limits how
many requests to the hive itself are open at once; this does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from ash_mcp.errors import CapacityExceeded
from ash_mcp.wire import http_status
from ash_router.admission.base import ADMITTED_KEY, Admitted
from ash_router.http import responses

__all__ = ["OpenRequestQuotas"]

MAX_OPEN: Final = 2048
"""Requests of one principal; as many as streams on its sandboxes' own endpoints."""
_RETRY_SECONDS: Final = 1.0

ASGIMessage = MutableMapping[str, Any]
ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]


class OpenRequestQuotas:
    """ASGI middleware before the hive's MCP endpoint: refuses a request of a principal that has `max_open` open."""

    def __init__(self, app: ASGIApp, *, max_open: int = MAX_OPEN) -> None:
        self._app = app
        self._max_open = max_open
        self._open: dict[str, int] = {}

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        admitted: Admitted = scope[ADMITTED_KEY]
        owner = admitted.principal.subject
        if self._open.get(owner, 0) >= self._max_open:
            await _refuse(self._max_open, send)
            return
        self._open[owner] = self._open.get(owner, 0) + 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]


async def _refuse(max_open: int, send: Send) -> None:
    error = CapacityExceeded(
        f"you have {max_open} requests to the hive open already, as many as one owner may here; end one of them",
        limit="owner",
        retry_after_seconds=_RETRY_SECONDS,
    )
    body = responses.json_refusal(error)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % _RETRY_SECONDS),
    ]
    await send({"type": "http.response.start", "status": http_status(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
