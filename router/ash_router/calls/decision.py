"""Which request is a call to a sandbox: decided from its head where that is possible, from its body where not.

Whatever is not surely a call to a sandbox that this caller has is left to the ASGI app, which knows better what is
wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ash_mcp.types import SessionName, valid_session_name
from ash_mcp.wire import MODERN_VERSION
from ash_router import bodies
from ash_router.admission import Admitted
from ash_router.asking import answer_to
from ash_router.bodies import HIVE_CALL, Message, ToolCall
from ash_router.exchange import RelayedCall
from ash_router.heads import Fields, RequestHead
from ash_router.routes import Route, Routes, split_tool_name
from ash_router.sessions import HANDSHAKE_VERSIONS, LegacySession, LegacySessions, UpstreamSession

__all__ = ["Calls", "Cancellation", "ClientAnswer", "LevelChange", "RootsChange"]

LOG_LEVELS: Final = frozenset({"debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"})

_DECIDING: Final = (b"mcp-protocol-version", b"mcp-method", b"mcp-name", b"mcp-session-id")
_HANDSHAKE: Final = frozenset(version.encode() for version in HANDSHAKE_VERSIONS)
_MODERN: Final = MODERN_VERSION.encode()
_CALL_ARGUMENTS: Final = frozenset({"session", "tool", "arguments"})


@dataclass(frozen=True, slots=True)
class Cancellation:
    """A client's word that it no longer waits for a relayed call."""

    upstream: UpstreamSession
    message: Message


@dataclass(frozen=True, slots=True)
class ClientAnswer:
    """A client's answer to what a sandbox asked it."""

    upstream: UpstreamSession
    body: bytes
    """As the sandbox will get it."""


@dataclass(frozen=True, slots=True)
class RootsChange:
    """A client's word that its roots are others now, which sandboxes must hear of too."""

    session: LegacySession
    message: Message


@dataclass(frozen=True, slots=True)
class LevelChange:
    """A client's wish for a log level, which sandboxes must hear of too."""

    session: LegacySession
    level: str


Notice = Cancellation | ClientAnswer | LevelChange | RootsChange


class Calls:
    """Decides by the routes and sessions of this process; no I/O."""

    def __init__(self, routes: Routes, sessions: LegacySessions) -> None:
        self._routes = routes
        self._sessions = sessions

    def needs_body(self, admitted: Admitted, head: RequestHead) -> bool:
        """Say whether a POST to the hive's endpoint may be for a sandbox, so that its body must be read."""
        fields = head.fields
        for deciding in _DECIDING:
            if fields.get(deciding, b"") is None:
                return False  # it came twice
        version = fields.get(b"mcp-protocol-version")
        if version is None or version in _HANDSHAKE:
            return True
        if version != _MODERN or fields.get(b"mcp-method") != b"tools/call":
            return False
        name = head.tool
        return name == HIVE_CALL or (name is not None and self._named(admitted, name) is not None)

    def decide(self, admitted: Admitted, head: RequestHead, message: Message) -> RelayedCall | Notice | None:
        """Say what a message, whose head passed `needs_body`, means to sandboxes; None: nothing."""
        fields = head.fields
        if fields.get(b"mcp-protocol-version") == _MODERN:
            call = bodies.as_tool_call(message)
            if call is None or call.name != head.tool:
                return None
            return self._relayed(admitted, head, call, None)
        session = self._session(admitted, fields)
        if session is None:
            return None
        if message.method == "tools/call":
            call = bodies.as_tool_call(message)
            return None if call is None else self._relayed(session.admitted, head, call, session)
        return _notice(session, message)

    def misses(self, admitted: Admitted, head: RequestHead, message: Message | None = None) -> bool:
        """Say whether a request that is no call to a sandbox known here may be one to a sandbox that is not.

        Args:
            message: Its body; None where its head said enough for `needs_body` to pass it by.
        """
        fields = head.fields
        is_modern = fields.get(b"mcp-protocol-version") == _MODERN
        if message is None:
            name = head.tool if is_modern and fields.get(b"mcp-method") == b"tools/call" else None
            return name is not None and self._is_unknown(admitted, (split_tool_name(name) or ("",))[0])
        call = bodies.as_tool_call(message)
        session = None if is_modern else self._session(admitted, fields)
        if call is None or (call.name != head.tool if is_modern else session is None):
            return False
        if call.name == HIVE_CALL:
            named: Any = call.arguments.get("session")
        else:
            named = (split_tool_name(call.name) or ("",))[0]
        return self._is_unknown(admitted if session is None else session.admitted, named)

    def _is_unknown(self, admitted: Admitted, session: Any) -> bool:
        if not isinstance(session, str) or not (valid_session_name(session) or session.startswith("sbx-")):
            return False  # nobody's name: there is nothing to look for
        return self._routes.resolve(admitted.principal, admitted.scope, session) is None

    def _session(self, admitted: Admitted, fields: Fields) -> LegacySession | None:
        session_id = fields.get(b"mcp-session-id")
        session = self._sessions.get(session_id.decode("latin-1")) if session_id is not None else None
        return session if session is not None and session.admitted.principal == admitted.principal else None

    def _relayed(
        self, admitted: Admitted, head: RequestHead, call: ToolCall, session: LegacySession | None
    ) -> RelayedCall | None:
        if call.name == HIVE_CALL:
            found = self._called(admitted, call.arguments)
        else:
            found = self._named(admitted, call.name)
        if found is None:
            return None
        route, tool = found
        body = bodies.retarget(call, tool) if call.name == HIVE_CALL else bodies.rename(call, tool)
        if body is None:
            return None
        hold = None
        if session is not None:
            hold = self._sessions.hold(session)
            if hold is None:
                return None
        return RelayedCall(
            route=route,
            request_id=call.request_id,
            head=head,
            body=body,
            tool=tool,
            session=session,
            hold=hold,
        )

    def _named(self, admitted: Admitted, name: str) -> tuple[Route, str] | None:
        parts = split_tool_name(name)
        return None if parts is None else self._resolve(admitted, *parts)

    def _called(self, admitted: Admitted, arguments: Mapping[str, Any]) -> tuple[Route, str] | None:
        session: Any = arguments.get("session")
        tool: Any = arguments.get("tool")
        inner: Any = arguments.get("arguments")
        if (
            not (isinstance(session, str) and isinstance(tool, str) and tool)
            or not arguments.keys() <= _CALL_ARGUMENTS
        ):
            return None
        return self._resolve(admitted, session, tool) if inner is None or isinstance(inner, dict) else None

    def _resolve(self, admitted: Admitted, session: str, tool: str) -> tuple[Route, str] | None:
        route = self._routes.resolve(admitted.principal, admitted.scope, SessionName(session))
        return None if route is None else (route, route.tool_names.get(tool, tool))


def _notice(session: LegacySession, message: Message) -> Notice | None:
    if message.method is None:
        answer = answer_to(session, message)
        return None if answer is None else ClientAnswer(*answer)
    if message.method == "notifications/roots/list_changed":
        return RootsChange(session, message)
    if message.method == "notifications/cancelled" and "id" not in message.fields:
        request_id: Any = message.params.get("requestId")
        if isinstance(request_id, str | int) and not isinstance(request_id, bool):
            upstream = session.calls.get(request_id)
            return None if upstream is None else Cancellation(upstream, message)
    if message.method == "logging/setLevel":
        level: Any = message.params.get("level")
        if isinstance(level, str) and level in LOG_LEVELS:
            return LevelChange(session, level)
    return None
