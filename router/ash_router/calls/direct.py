"""Recognises requests to a sandbox's own endpoint: `/mcp` with `X-Session-ID`, and `/s/<sandbox>/mcp`. Pure.

The path is matched after percent-decoding and as a whole, and never used again: what is asked of the sandbox is the
door's target, so no spelling of a path leads to anything else in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ash_mcp.errors import AshError, ConfigError
from ash_mcp.types import EVERY_SCOPE, Principal, SessionName
from ash_mcp.wire import MCP_PATH
from ash_router.admission.base import SESSION_HEADER, Admitted
from ash_router.admission.request_scope import ENDPOINT_PATH
from ash_router.calls.door import MCP_DOOR, RESUMPTION_DOOR, Door
from ash_router.http.heads import Fields, RequestHead
from ash_router.routes import Route, Routes, visible
from ash_router.sessions.server_requests import find_resumed
from ash_router.sessions.session_map import LegacySession, LegacySessions, UpstreamSession

__all__ = ["SESSION_HEADER", "DirectRequest", "Resumption", "direct_request_of", "name_in", "resumption_of"]

_NAME: Final = re.compile(rb"[A-Za-z0-9-]{1,128}")


@dataclass(frozen=True, slots=True)
class Resumption:
    """A request to continue the stream of a relayed call after a given event (`Last-Event-ID`)."""

    session: LegacySession
    upstream: UpstreamSession
    last_event_id: bytes
    """The id that the sandbox gave the event."""


@dataclass(slots=True, eq=False)
class DirectRequest:
    """A caller's request to a sandbox's own endpoint, with the route to it."""

    principal: Principal
    route: Route
    method: str
    door: Door = MCP_DOOR
    rest: bytes = b""
    """Path and query below the door's target, as they are asked for."""
    resumed: Resumption | None = None
    """Set for a resumption; None if the caller's MCP session is with the sandbox itself."""

    @property
    def is_get(self) -> bool:
        """Whether its method is GET: it opens a stream to listen to and counts as no call."""
        return self.method == "GET"


def name_in(head: RequestHead, path: str) -> str | AshError | None:
    """Return the sandbox name in a request, the error if it names two, or None if it names none.

    Args:
        path: As admitted: percent-decoded once.
    """
    if head.named is None or head.named[0] != path:
        head.named = path, _read_name(path, head.fields)
    return head.named[1]


def _read_name(path: str, fields: Fields) -> str | AshError | None:
    named = None
    if path != MCP_PATH:
        named = ENDPOINT_PATH.fullmatch(path)
        if named is None:
            return None
    if SESSION_HEADER not in fields:
        return None if named is None else named[1]
    value = fields[SESSION_HEADER]
    if value is None or (named is not None and value.decode("latin-1") != named[1]):
        return ConfigError("the request names more than one sandbox; name it once, in X-Session-ID or in the path")
    # a malformed name resolves like one that nobody has
    return value.decode("ascii") if _NAME.fullmatch(value) is not None else ""


def direct_request_of(routes: Routes, admitted: Admitted, name: str, method: str) -> DirectRequest | None:
    """Return the direct request to the caller's sandbox that `name` means; None if there is no such sandbox.

    A session name is one of the request's scope. An id or an alias needs none: it is good in every scope that the
    caller's key is for, since whoever sends one has no reason to know its scope.
    """
    route = routes.named(name)
    if route is not None:
        seen = visible(admitted.principal, EVERY_SCOPE, route.sandbox_id, route.owner, route.scope)
        return DirectRequest(admitted.principal, route, method) if seen else None
    route = routes.resolve(admitted.principal, admitted.scope, SessionName(name))
    return None if route is None else DirectRequest(admitted.principal, route, method)


def resumption_of(sessions: LegacySessions, admitted: Admitted, fields: Fields) -> DirectRequest | None:
    """Return the resumption that a GET on the hive's endpoint asks for; None if it asks for none that is known."""
    last_event_id, session_id = fields.get(b"last-event-id"), fields.get(b"mcp-session-id")
    if last_event_id is None or session_id is None:
        return None
    session = sessions.get(session_id.decode("latin-1"))
    if session is None or session.admitted.principal != admitted.principal:
        return None
    found = find_resumed(session, last_event_id)
    return (
        None
        if found is None
        else DirectRequest(
            admitted.principal, found[0].route, "GET", RESUMPTION_DOOR, resumed=Resumption(session, *found)
        )
    )
