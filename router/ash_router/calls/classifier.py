"""Classifies a message POSTed to `/mcp`: a call to a sandbox, a notice for sandboxes, or the ASGI app's.

A call is recognised by its body; in the stateless era the head must name the same tool. What is not
surely a call to a sandbox of this caller goes to the ASGI app, which explains what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ash_mcp.types import Principal, SessionName, valid_session_name
from ash_router.admission.base import Admitted
from ash_router.calls.exchange import RelayedCall, request_start
from ash_router.http import bodies
from ash_router.http.bodies import HIVE_CALL, Message, ToolCall
from ash_router.http.heads import Fields, RequestHead
from ash_router.routes import Route, Routes, split_tool_name
from ash_router.sessions.server_requests import answer_for_sandbox
from ash_router.sessions.session_map import Era, LegacySession, LegacySessions, UpstreamSession, era_of

__all__ = ["Cancellation", "ClientAnswer", "LevelChange", "MessageClassifier", "RootsChange"]

LOG_LEVELS: Final = frozenset({"debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"})

_CALL_ARGUMENTS: Final = frozenset({"session", "sandbox", "tool", "arguments"})


@dataclass(frozen=True, slots=True)
class Cancellation:
    """A client's `notifications/cancelled` for a relayed call."""

    upstream: UpstreamSession
    message: Message


@dataclass(frozen=True, slots=True)
class ClientAnswer:
    """A client's response to a request of a sandbox."""

    upstream: UpstreamSession
    body: bytes
    """The response with the request id that the sandbox used."""


@dataclass(frozen=True, slots=True)
class RootsChange:
    """A client's `notifications/roots/list_changed`, to be passed on to its sandboxes."""

    session: LegacySession
    message: Message


@dataclass(frozen=True, slots=True)
class LevelChange:
    """A client's `logging/setLevel`, to be passed on to its sandboxes."""

    session: LegacySession
    level: str


Notice = Cancellation | ClientAnswer | LevelChange | RootsChange


@dataclass(frozen=True, slots=True)
class _ResolvedTool:
    """What a tool's name means in calls with one head, while `Routes.changes` equals `changes`."""

    admitted: Admitted
    name: str
    changes: int
    route: Route
    tool: str
    """Its name within the sandbox."""
    start: bytes
    """Of the head of each request to the sandbox."""


class MessageClassifier:
    """Classifies by the routes and sessions that this process knows; no I/O."""

    def __init__(self, routes: Routes, sessions: LegacySessions) -> None:
        self._routes = routes
        self._sessions = sessions

    def classify(self, admitted: Admitted, head: RequestHead, message: Message) -> RelayedCall | Notice | None:
        """Return the call or notice that a message is for sandboxes; None if it is for the ASGI app alone."""
        era = era_of(head.fields.get(b"mcp-protocol-version"))
        if era is Era.STATELESS:
            call = _stateless_call(head, message)
            return None if call is None else self._relayed_call(admitted, head, call, None)
        session = self._session(admitted, head.fields) if era is Era.HANDSHAKE else None
        if session is None:
            return None
        if message.method == "tools/call":
            call = bodies.as_tool_call(message)
            return None if call is None else self._relayed_call(session.admitted, head, call, session)
        return _notice(session, message)

    def may_be_unknown_sandbox(self, admitted: Admitted, head: RequestHead, message: Message) -> bool:
        """Return whether a message names a sandbox that is unknown here and may be known to another process."""
        era = era_of(head.fields.get(b"mcp-protocol-version"))
        session = self._session(admitted, head.fields) if era is Era.HANDSHAKE else None
        call = _stateless_call(head, message) if era is Era.STATELESS else bodies.as_tool_call(message)
        if call is None or (session is None and era is not Era.STATELESS) or admitted.principal.share is not None:
            return False
        if call.name == HIVE_CALL:
            named: Any = _named_session(call.arguments)
        else:
            named = (split_tool_name(call.name) or ("",))[0]
        return self._is_unknown_name(admitted if session is None else session.admitted, named)

    def _is_unknown_name(self, admitted: Admitted, session: Any) -> bool:
        if not isinstance(session, str) or not (valid_session_name(session) or "-" in session):
            return False  # nobody's name: there is nothing to look for
        return self._routes.resolve(admitted.principal, admitted.scope, session) is None

    def _session(self, admitted: Admitted, fields: Fields) -> LegacySession | None:
        session_id = fields.get(b"mcp-session-id")
        return None if session_id is None else self._sessions.of(admitted, session_id.decode("latin-1"))

    def _relayed_call(
        self, admitted: Admitted, head: RequestHead, call: ToolCall, session: LegacySession | None
    ) -> RelayedCall | None:
        is_guest = admitted.principal.share is not None
        is_hive_call = call.name == HIVE_CALL and not is_guest
        found: _ResolvedTool | None = head.resolved
        if (
            found is None
            or found.admitted is not admitted
            or found.name != call.name
            or found.changes != self._routes.changes
            or is_hive_call
            or is_guest
        ):
            found = head.resolved = self._resolve_call(admitted, head, call)
            if found is None:
                return None
        body = bodies.retarget(call, found.tool) if is_hive_call else bodies.rename(call, found.tool)
        if body is None:
            return None
        hold = None
        if session is not None:
            hold = self._sessions.hold(session)
            if hold is None:
                return None
        return RelayedCall(
            principal=admitted.principal,
            route=found.route,
            request_id=call.request_id,
            head=head,
            start=found.start,
            body=body,
            tool=found.tool,
            message=call.message,
            session=session,
            hold=hold,
        )

    def _resolve_call(self, admitted: Admitted, head: RequestHead, call: ToolCall) -> _ResolvedTool | None:
        if admitted.principal.share is not None:
            found = self._resolve_shared_tool(admitted.principal, call)
        elif call.name == HIVE_CALL:
            found = self._resolve_hive_call(admitted, call.arguments)
        else:
            found = self._resolve_tool_name(admitted, call.name)
        if found is None:
            return None
        return _ResolvedTool(admitted, call.name, self._routes.changes, *found, request_start(head, *found))

    def _resolve_shared_tool(self, guest: Principal, call: ToolCall) -> tuple[Route, str] | None:
        if guest.sandbox is None or call.name not in guest.tools or not bodies.has_known_members(call):
            return None
        route = self._routes.get(guest.sandbox)
        return None if route is None else (route, call.name)

    def _resolve_tool_name(self, admitted: Admitted, name: str) -> tuple[Route, str] | None:
        parts = split_tool_name(name)
        return None if parts is None else self._resolve(admitted, *parts)

    def _resolve_hive_call(self, admitted: Admitted, arguments: Mapping[str, Any]) -> tuple[Route, str] | None:
        session = _named_session(arguments)
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


def _stateless_call(head: RequestHead, message: Message) -> ToolCall | None:
    """Return the call in a stateless-era message; None unless head and body name the same tool."""
    if head.fields.get(b"mcp-method") != b"tools/call":
        return None
    call = bodies.as_tool_call(message)
    return call if call is not None and call.name == head.tool else None


def _named_session(arguments: Mapping[str, Any]) -> Any:
    """Return the session that a `call` names; `sandbox` is the same argument. None if they differ."""
    session: Any = arguments.get("session")
    sandbox: Any = arguments.get("sandbox")
    if session is None or sandbox is None:
        return sandbox if session is None else session
    return session if session == sandbox else None


def _notice(session: LegacySession, message: Message) -> Notice | None:
    if message.method is None:
        answer = answer_for_sandbox(session, message)
        return None if answer is None else ClientAnswer(*answer)
    if message.method == "notifications/cancelled" and "id" not in message.fields:
        request_id: Any = message.params.get("requestId")
        if isinstance(request_id, str | int) and not isinstance(request_id, bool):
            upstream = session.calls.get(request_id)
            return None if upstream is None else Cancellation(upstream, message)
    if session.admitted.principal.share is not None:
        return None
    if message.method == "logging/setLevel":
        level: Any = message.params.get("level")
        if isinstance(level, str) and level in LOG_LEVELS:
            return LevelChange(session, level)
    if message.method == "notifications/roots/list_changed":
        return RootsChange(session, message)
    return None
