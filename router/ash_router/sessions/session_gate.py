"""ASGI middleware before the MCP SDK: who may open a handshake-era session, and who owns each one.

Ownership follows the SDK's answer, not the look of a request: a session id in an answer belongs to the principal of
the request. A request in a session passes only if its principal owns the session. Without a session only what the
relay read as `initialize` passes.

Session ids are translated here: callers know signed ones (`session_ids.py`), the SDK its own. A session of a replica
that is gone is reopened: opened again in this replica's SDK, under the id that the caller knows, by an `initialize`
with the params that the id carries.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

from ash_mcp.errors import CapacityExceeded
from ash_mcp.types import Principal
from ash_mcp.wire import MCP_PATH, http_status
from ash_router.admission.base import ADMITTED_KEY, Admitted
from ash_router.bounds.effective_limits import effective_limit, guests_exceeded
from ash_router.http import responses
from ash_router.sessions.session_ids import SessionIds
from ash_router.sessions.session_map import Era, LegacySession, LegacySessions, era_of

__all__ = ["INITIALIZE_KEY", "MAX_SESSIONS", "MAX_SESSIONS_PER_PRINCIPAL", "NO_SESSION", "SessionGate"]

INITIALIZE_KEY: Final = "ash.initialize"
"""The key in the ASGI scope under which the relay puts the params of an `initialize`."""

MAX_SESSIONS: Final = 10_000
"""Of all principals together: each keeps a task and some 40 KiB."""
MAX_SESSIONS_PER_PRINCIPAL: Final = 5_000
"""At the limit, more are refused."""
NO_SESSION: Final = b'{"jsonrpc":"2.0","id":null,"error":{"code":-32600,"message":"Session not found"}}'
"""The body of a 404 for an unknown session, as the MCP SDK writes it."""

_MISSING_SESSION: Final = (
    b'{"jsonrpc":"2.0","id":null,"error":{"code":-32600,"message":"Missing session ID: begin with initialize, '
    b'or name a stateless revision in MCP-Protocol-Version"}}'
)
_METHODS: Final = frozenset({"GET", "POST", "DELETE"})
_RETRY_SECONDS: Final = 1.0
_NEGOTIATED_VERSION: Final = re.compile(rb'"protocolVersion"\s*:\s*"(\d{4}-\d\d-\d\d)"')
_MAX_SEEN_BYTES: Final = 64 * 1024
"""How much of the answer to `initialize` is searched for the version."""
_SESSION_HEADER: Final = b"mcp-session-id"
_LIST_CHANGED: Final = b'event: message\ndata: {"jsonrpc":"2.0","method":"notifications/tools/list_changed"}\n\n'

ASGIMessage = MutableMapping[str, Any]
ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]


class SessionGate:
    """The middleware.

    Args:
        app: The ASGI app of the MCP SDK.
        end_in_sdk: Ends a session in the SDK, by the SDK's id.
        ids: Checks and reads the ids of other replicas' sessions; with None no session is reopened.
        max_sessions: Of all principals. At the limit, the principal with most loses its least recently used session
            to one that has fewer, also with one more; any other is refused.
        max_sessions_per_principal: Of one principal; more are refused.
    """

    def __init__(
        self,
        sessions: LegacySessions,
        app: ASGIApp,
        end_in_sdk: Callable[[str], Awaitable[None]],
        *,
        ids: SessionIds | None = None,
        max_sessions: int = MAX_SESSIONS,
        max_sessions_per_principal: int = MAX_SESSIONS_PER_PRINCIPAL,
    ) -> None:
        self._sessions = sessions
        self._app = app
        self._end_in_sdk = end_in_sdk
        self._ids = ids
        self._reopening: dict[str, asyncio.Lock] = {}
        self._max_sessions = max_sessions
        self._max_sessions_per_principal = max_sessions_per_principal
        self._opening: Counter[str] = Counter()
        """The number of requests under way that may open a session, by owner."""
        self._guests_opening: Counter[str] = Counter()
        """The same of guests, by `Principal.guests`."""

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        admitted: Admitted = scope[ADMITTED_KEY]
        era = era_of(_header(scope["headers"], b"mcp-protocol-version"))
        named = _header(scope["headers"], _SESSION_HEADER)
        if era is Era.STATELESS:
            await self._app(_with_session_header(scope, None), receive, send)  # that era has no sessions
        elif named is not None:
            session = self._sessions.of(admitted, named.decode("latin-1"))
            if session is None:
                await _answer(send, 404, NO_SESSION)
            else:
                await self._continue(session, scope, receive, send)
        elif era is Era.HANDSHAKE and INITIALIZE_KEY not in scope:
            await _answer(send, 400 if scope["method"] in _METHODS else 405, _MISSING_SESSION)
        else:  # an `initialize`, or a protocol version that the SDK refuses
            await self._open(admitted, scope, receive, send)

    async def _continue(self, session: LegacySession, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Give the SDK a request in a session, under the SDK's id; a DELETE that succeeds also removes it here."""
        sdk_id = session.sdk_id
        self._sessions.mark_used(session)
        send = _replacing_session_id(session.id.encode("latin-1"), send)
        if scope["method"] == "DELETE":
            send = _removing(self._sessions, sdk_id, send)
        elif scope["method"] == "GET" and session.has_unannounced_change:
            send = _announcing_change(session, send)
        await self._app(_with_session_header(scope, sdk_id.encode("latin-1")), receive, send)

    async def reopen(self, admitted: Admitted, session_id: str) -> bool:
        """Open a session of a replica that is gone, here and under the same id.

        Requests of that session which come at the same time wait for the same opening.

        The router's README lists what is lost.

        Returns:
            False if no replica of this hive gave that id to this caller, or there is no room for one more session.
        """
        params = None if self._ids is None else self._ids.read(session_id, admitted.principal.subject)
        if params is None:
            return False
        async with self._reopening.setdefault(session_id, asyncio.Lock()):
            try:
                if self._sessions.of(admitted, session_id) is None:
                    initialize = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
                    scope = {**_own_request(admitted), INITIALIZE_KEY: params}
                    await self._open(admitted, scope, _body(initialize), _ignore, session_id)
                    session = self._sessions.of(admitted, session_id)
                    if session is not None:
                        initialized = {"jsonrpc": "2.0", "method": "notifications/initialized"}
                        await self._continue(session, _own_request(admitted), _body(initialized), _ignore)
            finally:
                self._reopening.pop(session_id, None)
        return self._sessions.of(admitted, session_id) is not None

    async def _open(
        self, admitted: Admitted, scope: ASGIScope, receive: Receive, send: Send, session_id: str | None = None
    ) -> None:
        """Give the SDK a request that may open a session, and own what it opens.

        Args:
            session_id: The id of the session that is reopened; None for a new one.
        """
        room = self._room_for(admitted.principal)
        if isinstance(room, CapacityExceeded):
            body = responses.json_refusal(room)
            await _answer(send, http_status(room), body, (b"retry-after", b"%d" % _RETRY_SECONDS))
            return
        self._hold_place(admitted.principal, 1)
        opening = _Opening(self, admitted, scope.get(INITIALIZE_KEY, {}), send, session_id)
        try:
            if room is not None:
                self._sessions.remove(room)
                await self._end_in_sdk(room)
            await self._app(scope, receive, opening.send)
        finally:
            opening.settle()
            if opening.session is not None and not opening.is_open:
                # the answer never reached the caller, or initialize failed
                await self._end_in_sdk(opening.session.sdk_id)
                self._sessions.remove(opening.session.sdk_id)

    def _room_for(self, principal: Principal) -> CapacityExceeded | str | None:
        """Return None if there is room for one more session, the SDK's id of one that must end first, or a refusal."""
        owner = principal.subject
        held = self._sessions.count(owner) + self._opening[owner]
        by_share = principal.share is not None
        limit = effective_limit(self._max_sessions_per_principal, principal.limits.sessions, by_share=by_share)
        if held >= limit.most:
            return limit.reached("sessions")
        guests = principal.guests
        together = self._sessions.count_guests(guests) + self._guests_opening[guests] if guests is not None else 0
        if together >= self._max_sessions_per_principal:
            return guests_exceeded(self._max_sessions_per_principal, "sessions")
        if len(self._sessions) + sum(self._opening.values()) < self._max_sessions:
            return None
        surplus = self._sessions.surplus(held + 1)
        if surplus is None:
            words = "the hive has as many MCP sessions as it can, and you your share of them"
            return CapacityExceeded(words, retry_after_seconds=_RETRY_SECONDS)
        return surplus

    def add(self, sdk_id: str, admitted: Admitted, params: Any, session_id: str | None) -> LegacySession:
        return self._sessions.add(sdk_id, admitted, params, session_id)

    def release_place(self, principal: Principal) -> None:
        """Count one request less that may open a session."""
        self._hold_place(principal, -1)

    def _hold_place(self, principal: Principal, change: int) -> None:
        for counted, key in ((self._opening, principal.subject), (self._guests_opening, principal.guests)):
            if key is not None:
                counted[key] += change
                if not counted[key]:
                    del counted[key]


class _Opening:
    """Watches the answer to a request that may open a session."""

    def __init__(self, gate: SessionGate, admitted: Admitted, params: Any, send: Send, session_id: str | None) -> None:
        self._gate = gate
        self._admitted = admitted
        self._params = params
        self._session_id = session_id
        self._send = send
        self._settled = False
        self._seen = b""
        self.session: LegacySession | None = None
        self.is_open = False
        """Whether the answer to `initialize` was passed on to the caller."""

    def settle(self) -> None:
        """Release the place that was reserved while it was unknown whether a session opens; idempotent."""
        if not self._settled:
            self._settled = True
            self._gate.release_place(self._admitted.principal)

    async def send(self, message: ASGIMessage) -> None:
        if message["type"] == "http.response.start":
            sdk_id = _header(message.get("headers", ()), _SESSION_HEADER)
            if sdk_id is not None and message["status"] < 400:
                sdk_name = sdk_id.decode("latin-1")
                self.session = self._gate.add(sdk_name, self._admitted, self._params, self._session_id)
                message = _with_session(message, self.session.id.encode("latin-1"))
            self.settle()
        elif self.session is not None and not self.is_open:
            self._seen = (self._seen + message.get("body", b""))[:_MAX_SEEN_BYTES]
            found = _NEGOTIATED_VERSION.search(self._seen)
            if found is not None:
                self.session.version, self.is_open = found[1].decode(), True
        await self._send(message)


def _removing(sessions: LegacySessions, sdk_id: str, send: Send) -> Send:
    """Return a `send` that removes the session when the SDK has ended it."""

    async def watch(message: ASGIMessage) -> None:
        if message["type"] == "http.response.start" and message["status"] < 300:
            sessions.remove(sdk_id)
        await send(message)

    return watch


def _announcing_change(session: LegacySession, send: Send) -> Send:
    """Return a `send` that begins the stream of a reopened session with the news that its tools may have changed."""

    async def tell(message: ASGIMessage) -> None:
        await send(message)
        if session.has_unannounced_change and message["type"] == "http.response.start" and message["status"] == 200:
            session.has_unannounced_change = False
            await send({"type": "http.response.body", "body": _LIST_CHANGED, "more_body": True})

    return tell


def _replacing_session_id(session_id: bytes, send: Send) -> Send:
    """Return a `send` that puts the caller's session id in place of the SDK's."""

    async def name(message: ASGIMessage) -> None:
        await send(_with_session(message, session_id) if message["type"] == "http.response.start" else message)

    return name


def _with_session(message: ASGIMessage, session_id: bytes) -> ASGIMessage:
    """Return the start of an answer with its session header, if it has one, set to `session_id`."""
    headers = [
        (key, session_id if key.lower() == _SESSION_HEADER else value) for key, value in message.get("headers", ())
    ]
    return {**message, "headers": headers}


def _own_request(admitted: Admitted) -> ASGIScope:
    """Return the ASGI scope of a message to the SDK that no caller sent."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": MCP_PATH,
        "raw_path": MCP_PATH.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"hub"),
            (b"content-type", b"application/json"),
            (b"accept", b"application/json, text/event-stream"),
        ],
        "client": None,
        "server": None,
        ADMITTED_KEY: admitted,
    }


def _body(message: Mapping[str, Any]) -> Receive:
    """Return a `receive` that gives one message as the whole body, and then waits: its caller never leaves."""
    waiting = [{"type": "http.request", "body": json.dumps(message).encode(), "more_body": False}]

    async def receive() -> ASGIMessage:
        if waiting:
            return waiting.pop()
        return await asyncio.get_running_loop().create_future()

    return receive


async def _ignore(message: ASGIMessage) -> None:
    del message


def _header(headers: Any, name: bytes) -> bytes | None:
    for key, value in headers:
        if key.lower() == name:
            return value
    return None


def _with_session_header(scope: ASGIScope, sdk_id: bytes | None) -> ASGIScope:
    """Return the ASGI scope with the session header set to the SDK's id, or removed for None."""
    others = [header for header in scope["headers"] if header[0] != _SESSION_HEADER]
    if sdk_id is None and len(others) == len(scope["headers"]):
        return scope
    return {**scope, "headers": others if sdk_id is None else [*others, (_SESSION_HEADER, sdk_id)]}


async def _answer(send: Send, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
