"""What one principal may hold of a hive's own endpoint, so that there is always some of it for the others.

Calls to sandboxes and streams of theirs are bounded by the relay. This bounds what goes past it: requests to the
hive itself that are open at once, and sessions of the handshake era, of which the SDK keeps a number for all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import orjson

from ash_mcp.errors import AshError, CapacityExceeded
from ash_mcp.wire import failure_to_json, http_status
from ash_router.admission import ADMITTED_KEY, Admitted
from ash_router.sessions import INITIALIZE_KEY

__all__ = ["Shares"]

MAX_OPEN: Final = 2048
"""Requests of one principal; as many as streams on its sandboxes' own endpoints."""
MAX_SESSIONS: Final = 5000
"""Of one principal; half of what the SDK keeps, so that one who opens too many leaves the others theirs."""
_RETRY_SECONDS: Final = 1.0
_SESSION_HEADER: Final = b"mcp-session-id"

ASGIMessage = MutableMapping[str, Any]
ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]


class Shares:
    """Wraps the hive's MCP endpoint.

    Args:
        alive: Whether a session of the handshake era still exists.
    """

    def __init__(
        self,
        app: ASGIApp,
        alive: Callable[[str], bool],
        *,
        max_open: int = MAX_OPEN,
        max_sessions: int = MAX_SESSIONS,
    ) -> None:
        self._app = app
        self._alive = alive
        self._max_open = max_open
        self._max_sessions = max_sessions
        self._open: dict[str, int] = {}
        self._sessions: dict[str, set[str]] = {}

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        admitted: Admitted = scope[ADMITTED_KEY]
        owner = admitted.principal.subject
        opens = INITIALIZE_KEY in scope
        refusal = self._refusal(owner, opens=opens)
        if refusal is not None:
            await _refuse(refusal, send)
            return
        self._open[owner] = self._open.get(owner, 0) + 1
        try:
            await self._app(scope, receive, self._noting(owner, send) if opens else send)
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]

    def _refusal(self, owner: str, *, opens: bool) -> AshError | None:
        if self._open.get(owner, 0) >= self._max_open:
            return CapacityExceeded(
                f"you have {self._max_open} requests to the hive open already; end one of them",
                retry_after_seconds=_RETRY_SECONDS,
            )
        if opens and self._living(owner) >= self._max_sessions:
            return CapacityExceeded(
                f"you have {self._max_sessions} MCP sessions already; end those that you no longer use with DELETE, "
                "or wait until they are idle for too long",
                retry_after_seconds=_RETRY_SECONDS,
            )
        return None

    def _living(self, owner: str) -> int:
        """Count an owner's sessions, and forget those that have ended."""
        living = {session_id for session_id in self._sessions.pop(owner, ()) if self._alive(session_id)}
        if living:
            self._sessions[owner] = living
        return len(living)

    def _noting(self, owner: str, send: Send) -> Send:
        async def note(message: ASGIMessage) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                for name, value in message.get("headers", ()):
                    if name.lower() == _SESSION_HEADER:
                        self._sessions.setdefault(owner, set()).add(value.decode("latin-1"))
            await send(message)

        return note


async def _refuse(error: AshError, send: Send) -> None:
    body = orjson.dumps({"error": failure_to_json(error)}, default=str)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % _RETRY_SECONDS),
    ]
    await send({"type": "http.response.start", "status": http_status(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
