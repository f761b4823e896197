"""Recognises requests to a door of one sandbox: `/s/<sandbox>/…`, and `/mcp` with `X-Session-ID`. Pure.

What is asked of the sandbox is the door's target, and below it what `door_paths.py` has found to be canonical. So no
spelling of a path leads to anything else in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final

from ash_mcp.errors import AshError, ConfigError
from ash_mcp.types import EVERY_SCOPE, Principal, SessionName
from ash_mcp.wire import MCP_PATH
from ash_router.admission.base import SESSION_HEADER, Admitted
from ash_router.admission.door_paths import DoorKind, DoorPath, read_door_path
from ash_router.calls.door import DOORS, MCP_DOOR, RESUMPTION_DOOR, Door
from ash_router.http.heads import Fields, RequestHead
from ash_router.routes import Route, Routes, visible
from ash_router.sessions.server_requests import find_resumed
from ash_router.sessions.session_map import LegacySession, LegacySessions, UpstreamSession

__all__ = ["SESSION_HEADER", "DirectRequest", "Resumption", "direct_request_of", "door_in", "resumption_of"]

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
    max_bytes: int | None = None
    """How long its body may be; None: as the door has it."""
    resumed: Resumption | None = None
    """Set for a resumption; None if the caller's MCP session is with the sandbox itself."""
    port: int | None = None
    """The port inside the sandbox that it is for; None: it is for the sandbox's runner."""
    authority: str = ""
    """What the server gets as `Host`; empty: the endpoint's own."""
    start: bytes = b""
    """How the head that is sent starts; set by the first of equal requests on one connection."""
    listens: bool = field(init=False)
    """Whether it opens an MCP stream that only listens, and so counts as no call."""

    def __post_init__(self) -> None:
        self.listens = self.method == "GET" and self.door.is_mcp


def door_in(head: RequestHead, path: str) -> DoorPath | AshError | None:
    """Return the door that a request asks for, the error if it names two sandboxes, or None if it names none.

    Args:
        path: As admitted: percent-decoded once.
    """
    if head.named is None or head.named[0] != path:
        head.named = path, _read_door(head, path)
    return head.named[1]


def _read_door(head: RequestHead, path: str) -> DoorPath | AshError | None:
    door: DoorPath | str | None = DoorPath(DoorKind.MCP, "")
    if path != MCP_PATH:
        door = read_door_path(head.target.partition(b"?")[0], path)
        if isinstance(door, str):
            return ConfigError(door)
        if door is None or door.kind not in DOORS:
            return None
    if SESSION_HEADER not in head.fields:
        return None if path == MCP_PATH else door
    value = head.fields[SESSION_HEADER]
    if value is None or (path != MCP_PATH and value.decode("latin-1") != door.name):
        return ConfigError("the request names more than one sandbox; name it once, in X-Session-ID or in the path")
    # a malformed name resolves like one that nobody has
    return replace(door, name=value.decode("ascii") if _NAME.fullmatch(value) is not None else "")


def direct_request_of(
    routes: Routes, admitted: Admitted, asked: DoorPath, method: str, query: bytes = b""
) -> DirectRequest | None:
    """Return the request at a door to the caller's sandbox that `asked` names; None if there is no such sandbox.

    A session name is one of the request's scope. An id or an alias needs none: it is good in every scope that the
    caller's key is for, since whoever sends one has no reason to know its scope.

    Args:
        query: With its question mark; it goes to the sandbox, but for that of its MCP endpoint.
    """
    principal, name = admitted.principal, asked.name
    route = routes.named(name)
    if route is None:
        route = routes.resolve(principal, admitted.scope, SessionName(name))
    elif not visible(principal, EVERY_SCOPE, route.sandbox_id, route.owner, route.scope):
        route = None
    if route is None:
        return None
    rest = b"" if asked.kind is DoorKind.MCP else asked.rest + query
    return DirectRequest(principal, route, method, DOORS[asked.kind], rest, admitted.max_bytes)


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
