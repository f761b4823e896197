"""The map of the handshake era: which hub session has which sessions on which sandboxes.

The hub's own transport session is the MCP SDK's. What is kept here beside it is what the relay needs to stand in for
its client: who opened it and with what scope, what it said in `initialize`, and where its calls are in flight. An
entry lives as long as the SDK's session does.

Callers know a session as `<replica>.<id of the SDK>`, so that every replica sees from the head of a request whose
session it is in.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import orjson

from ash_mcp.types import SandboxId
from ash_router import _framing
from ash_router.admission import ADMITTED_KEY, Admitted
from ash_router.routes import Route

__all__ = ["HANDSHAKE_VERSIONS", "INITIALIZE_KEY", "Ask", "LegacySession", "LegacySessions", "UpstreamSession"]

ASGIMessage = MutableMapping[str, Any]
ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]

HANDSHAKE_VERSIONS: Final = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
"""The protocol revisions that begin with `initialize`."""

INITIALIZE_KEY: Final = "ash.initialize"
"""Where the protocol class leaves the params of an `initialize` in the ASGI scope."""

MAX_PARAMS_BYTES: Final = 16 * 1024
"""Of a client's `initialize` that are kept; of a longer one only the version is."""

# Tasks outlive the request that made them, under ids that the relay does not know; a sandbox is told that this
# client has none, so that its tools fail at once and don't hang.
_UNROUTED_CAPABILITIES: Final = frozenset({"tasks"})

_ASKABLE: Final = frozenset({"elicitation", "sampling", "roots"})

_NEGOTIATED: Final = re.compile(rb'"protocolVersion"\s*:\s*"(\d{4}-\d\d-\d\d)"')
_SESSION_HEADER: Final = b"mcp-session-id"


@dataclass(slots=True, eq=False)
class UpstreamSession:
    """What one hub session has on one sandbox."""

    route: Route
    id: bytes | None
    """None on a server that keeps no sessions."""
    version: bytes
    """What the sandbox negotiated; it may be older than what the hub did."""
    voices: dict[object, Callable[[bytes], None]] = field(default_factory=dict[object, Callable[[bytes], None]])
    """The open calls by which the client can be told an event of this session, latest last."""
    listening: Callable[[], None] | None = None
    """Ends the hearing of its standalone stream."""

    def stop_listening(self) -> None:
        stop, self.listening = self.listening, None
        if stop is not None:
            stop()

    def headers(self) -> dict[bytes, bytes]:
        """Return the headers that a request in this session carries; no other of the session and the version go."""
        session = {} if self.id is None else {b"mcp-session-id": self.id}
        return {**session, b"mcp-protocol-version": self.version}

    def lines(self) -> bytes:
        """Return `headers` as they stand in a head."""
        return _framing.lines_of(self.headers().items())


@dataclass(frozen=True, slots=True)
class Ask:
    """A sandbox's request to a client, under the id that the sandbox gave it."""

    upstream: UpstreamSession
    request_id: str | int


@dataclass(slots=True, eq=False)
class LegacySession:
    """What is kept of one hub session."""

    id: str
    """As callers know it."""
    admitted: Admitted
    """The verdict on its first request; its scope and expansion hold for all others."""
    params: Mapping[str, Any]
    """Of the client's `initialize`, bounded."""
    version: str
    """What the hub negotiated."""
    log_level: str | None = None
    upstreams: dict[tuple[SandboxId, int], UpstreamSession] = field(
        default_factory=dict[tuple[SandboxId, int], UpstreamSession]
    )
    calls: dict[str | int, UpstreamSession] = field(default_factory=dict[str | int, UpstreamSession])
    """Relayed requests in flight, by the client's id."""
    asks: dict[str, Ask] = field(default_factory=dict[str, Ask])
    """What sandboxes have asked the client and it has not answered, by the hive's id."""

    @property
    def can_be_asked(self) -> bool:
        """Whether the client takes requests from servers."""
        return not _ASKABLE.isdisjoint(self.initialize_params()["capabilities"])

    def forget(self, key: tuple[SandboxId, int]) -> None:
        """Drop the session on a sandbox, and what it has asked."""
        upstream = self.upstreams.pop(key, None)
        if upstream is not None:
            upstream.stop_listening()
            self.asks = {given: ask for given, ask in self.asks.items() if ask.upstream is not upstream}

    def initialize_params(self) -> dict[str, Any]:
        """Return what the relay says for this client when it opens a session on a sandbox."""
        capabilities: Any = self.params.get("capabilities")
        kept = cast("dict[str, Any]", capabilities if isinstance(capabilities, dict) else {})
        info: Any = self.params.get("clientInfo")
        return {
            "protocolVersion": self.version,
            "capabilities": {key: value for key, value in kept.items() if key not in _UNROUTED_CAPABILITIES},
            "clientInfo": info if isinstance(info, dict) else {"name": "ash", "version": "0"},
        }


class LegacySessions:
    """The hub sessions of this process.

    Args:
        hold: Keeps the SDK's own session, which it knows by the SDK's id, from idling out while entered; None means
            that it does not exist any more.
        replica: Whose sessions these are, the first part of their ids for callers; empty where there is but one.
        max_sessions: How many are kept; beyond it the oldest is forgotten, and its calls are left to the ASGI app.
    """

    def __init__(
        self,
        hold: Callable[[str], AbstractContextManager[None] | None],
        *,
        replica: str = "",
        max_sessions: int = 20_000,
    ) -> None:
        self._hold = hold
        self._prefix = f"{replica}." if replica else ""
        self._max = max_sessions
        self._sweep_at = 128
        # by the SDK's ids
        self._sessions: dict[str, LegacySession] = {}
        self._on_closed: Callable[[list[UpstreamSession]], None] = _ignore

    def attach(self, on_closed: Callable[[list[UpstreamSession]], None]) -> None:
        """Have `on_closed` end the upstream sessions of every hub session that ends from now on."""
        self._on_closed = on_closed

    def get(self, session_id: str) -> LegacySession | None:
        """Return a session by the id that callers know it by."""
        sdk_id = self._sdk_id(session_id)
        return None if sdk_id is None else self._sessions.get(sdk_id)

    def admitted(self, sdk_id: str) -> Admitted | None:
        """Return the verdict that a session, which the SDK knows as `sdk_id`, keeps from its first request."""
        session = self._sessions.get(sdk_id)
        return None if session is None else session.admitted

    def hold(self, session: LegacySession) -> AbstractContextManager[None] | None:
        """Return what keeps the SDK's session alive while entered; a session that is gone is forgotten."""
        sdk_id = session.id.removeprefix(self._prefix)
        held = self._hold(sdk_id)
        if held is None:
            self.closed(sdk_id)
        return held

    def _sdk_id(self, session_id: str) -> str | None:
        return session_id.removeprefix(self._prefix) if session_id.startswith(self._prefix) else None

    def opened(self, sdk_id: str, admitted: Admitted, params: Mapping[str, Any]) -> LegacySession:
        """Remember a session that the SDK has just made."""
        asked: Any = params.get("protocolVersion")
        version = asked if asked in HANDSHAKE_VERSIONS else HANDSHAKE_VERSIONS[-1]
        kept: Mapping[str, Any] = params if len(orjson.dumps(params)) <= MAX_PARAMS_BYTES else {}
        self._make_room()
        session = self._sessions[sdk_id] = LegacySession(self._prefix + sdk_id, admitted, kept, version)
        return session

    def closed(self, sdk_id: str) -> None:
        """Forget a session and end what it has on sandboxes; idempotent."""
        session = self._sessions.pop(sdk_id, None)
        if session is not None and session.upstreams:
            self._on_closed(list(session.upstreams.values()))
            session.upstreams.clear()

    def forget_sandbox(self, sandbox_id: SandboxId) -> None:
        """Drop what sessions have on a sandbox that has ended; nothing is said to it."""
        for session in self._sessions.values():
            for key in [key for key in session.upstreams if key[0] == sandbox_id]:
                session.forget(key)

    def __len__(self) -> int:
        return len(self._sessions)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Wrap the hive's MCP endpoint: learn of sessions that open and close, and hide those of other principals.

        This is where ids are translated: `app` sees and says those of the SDK.
        """

        async def watch(scope: ASGIScope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            session_id = _session_id(scope)
            sdk_id = self._sdk_id(session_id) if session_id is not None else None
            session = self._sessions.get(sdk_id) if sdk_id is not None else None
            admitted: Admitted | None = scope.get(ADMITTED_KEY)
            if self._prefix:
                send = _prefixing(self._prefix.encode(), send)
            if session is not None and (admitted is None or admitted.principal != session.admitted.principal):
                # It goes on under a name that nobody has: another's session is not to be told from none at all.
                sdk_id = session = None
            if session_id is not None and session_id != sdk_id:
                scope = {**scope, "headers": _renamed(scope["headers"], sdk_id)}
            if session is None and INITIALIZE_KEY in scope and admitted is not None:
                await app(scope, receive, _Opening(self, admitted, scope[INITIALIZE_KEY], send).send)
            elif session is not None and sdk_id is not None and scope["method"] == "DELETE":
                await app(scope, receive, _closing(self, sdk_id, send))
            else:
                await app(scope, receive, send)

        return watch

    def _make_room(self) -> None:
        if len(self._sessions) >= min(self._sweep_at, self._max):
            for sdk_id in [known for known in self._sessions if self._hold(known) is None]:
                self.closed(sdk_id)
            self._sweep_at = max(128, 2 * len(self._sessions))
        while len(self._sessions) >= self._max:
            self.closed(next(iter(self._sessions)))


class _Opening:
    """Watches the answer to an `initialize`."""

    def __init__(self, sessions: LegacySessions, admitted: Admitted, params: Mapping[str, Any], send: Send) -> None:
        self._sessions = sessions
        self._admitted = admitted
        self._params = params
        self._send = send
        self._session: LegacySession | None = None
        self._seen = b""

    async def send(self, message: ASGIMessage) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            sdk_id = _header(message.get("headers", ()), _SESSION_HEADER)
            if sdk_id is not None:
                self._session = self._sessions.opened(sdk_id, self._admitted, self._params)
        elif self._session is not None and message["type"] == "http.response.body":
            self._seen = (self._seen + message.get("body", b""))[: 64 * 1024]
            if (found := _NEGOTIATED.search(self._seen)) is not None:
                self._session.version = found[1].decode()
        await self._send(message)


def _closing(sessions: LegacySessions, sdk_id: str, send: Send) -> Send:
    async def watch(message: ASGIMessage) -> None:
        if message["type"] == "http.response.start" and message["status"] < 300:
            sessions.closed(sdk_id)
        await send(message)

    return watch


def _prefixing(prefix: bytes, send: Send) -> Send:
    async def name(message: ASGIMessage) -> None:
        if message["type"] == "http.response.start":
            headers = [
                (key, prefix + value if key.lower() == _SESSION_HEADER else value)
                for key, value in message.get("headers", ())
            ]
            message = {**message, "headers": headers}
        await send(message)

    return name


def _session_id(scope: ASGIScope) -> str | None:
    return _header(scope["headers"], _SESSION_HEADER)


def _header(headers: Any, name: bytes) -> str | None:
    for key, value in headers:
        if key.lower() == name:
            return value.decode("latin-1")
    return None


def _ignore(_: list[UpstreamSession]) -> None:
    return None


def _renamed(headers: Any, sdk_id: str | None) -> list[tuple[bytes, bytes]]:
    name = (sdk_id or secrets.token_hex(16)).encode("latin-1")
    return [(key, name if key.lower() == _SESSION_HEADER else value) for key, value in headers]
