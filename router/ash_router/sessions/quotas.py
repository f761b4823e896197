"""The quotas of open requests to the hive's own endpoint, counted by principal.

The relay limits calls and streams to sandboxes, `session_gate.py` limits handshake-era sessions. Neither limits how
many requests to the hive itself are open at once; this does. A request that only listens counts as a stream, with
those to sandboxes; any other counts here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from ash_mcp.errors import AshError, CapacityExceeded
from ash_mcp.types import Principal
from ash_mcp.wire import http_status
from ash_router.admission.base import ADMITTED_KEY, Admitted
from ash_router.bounds.limits import RelayLimits
from ash_router.bounds.streams import OpenStreams
from ash_router.http import responses
from ash_router.sessions.guest_streams import serve_while

__all__ = ["OpenRequestQuotas"]

MAX_OPEN: Final = 2048
"""Requests of one principal that do not only listen; as many as streams."""
_RETRY_SECONDS: Final = 1.0
_LISTEN: Final = (b"mcp-method", b"subscriptions/listen")
"""The header of a stateless-era listen request; the MCP SDK refuses one whose header and body differ."""

ASGIMessage = MutableMapping[str, Any]
ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]


class OpenRequestQuotas:
    """ASGI middleware before the hive's MCP endpoint: refuses a request of a principal that has too many open.

    Args:
        streams: The open streams of the process, those to sandboxes among them.
        limits: How many streams a principal may have open.
        max_open: How many other requests a principal may have open.
        is_good: Whether the share of a guest is still good.
    """

    def __init__(
        self,
        app: ASGIApp,
        streams: OpenStreams,
        limits: RelayLimits,
        *,
        max_open: int = MAX_OPEN,
        is_good: Callable[[Principal], bool] = lambda _: True,
    ) -> None:
        self._app = app
        self._streams = streams
        self._limits = limits
        self._max_open = max_open
        self._is_good = is_good
        self._open: dict[str, int] = {}

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        admitted: Admitted = scope[ADMITTED_KEY]
        if scope["method"] == "GET" or _LISTEN in scope["headers"]:
            await self._listen(admitted.principal, scope, receive, send)
        else:
            await self._serve(admitted.principal.subject, scope, receive, send)

    async def _listen(self, principal: Principal, scope: ASGIScope, receive: Receive, send: Send) -> None:
        owner, stream = principal.subject, _HiveStream()
        limit = self._limits.streams_of(principal)
        if not self._streams.begin(owner, stream, limit.most):
            await _refuse(limit.reached("streams"), send)
            return
        if not self._streams.begin_guests(principal.guests, self._limits.max_streams_per_owner):
            self._streams.end(owner, stream)
            await _refuse(self._limits.guests_exceeded("streams"), send)
            return
        try:
            if principal.share is None:
                await self._app(scope, receive, send)
            else:
                await serve_while(lambda: self._is_good(principal), self._app, scope, receive, send)
        finally:
            self._streams.end(owner, stream)
            self._streams.end_guests(principal.guests)

    async def _serve(self, owner: str, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if self._open.get(owner, 0) >= self._max_open:
            await _refuse(_too_many(self._max_open), send)
            return
        self._open[owner] = self._open.get(owner, 0) + 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]


class _HiveStream:
    """An `OpenStream` of the hive itself."""

    def fail(self, error: AshError) -> None:
        """Do nothing: the server has ended its requests before the data plane closes."""


def _too_many(max_open: int) -> CapacityExceeded:
    return CapacityExceeded(
        f"you have {max_open} requests to the hive open already, as many as one owner may here; end one of them",
        limit="owner",
        retry_after_seconds=_RETRY_SECONDS,
    )


async def _refuse(error: CapacityExceeded, send: Send) -> None:
    body = responses.json_refusal(error)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *responses.retry_after(error),
    ]
    await send({"type": "http.response.start", "status": http_status(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
