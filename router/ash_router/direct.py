"""Which request goes to a sandbox's own endpoint: `/mcp` with `X-Session-ID`, and `/s/<sandbox>/mcp`. Pure.

The path is matched after percent-decoding and as a whole, and never used again: what is asked of the sandbox is
always `/mcp`, so no spelling of a path leads to anything else in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ash_mcp.errors import AshError, ConfigError
from ash_mcp.types import EVERY_SCOPE, SandboxId, SessionName
from ash_mcp.wire import MCP_PATH
from ash_router.admission import Admitted
from ash_router.asking import resumed
from ash_router.heads import Fields, RequestHead
from ash_router.routes import Route, Routes, visible
from ash_router.sessions import LegacySession, LegacySessions, UpstreamSession

__all__ = ["METHODS", "SESSION_HEADER", "Door", "Resumption", "door_of", "name_in", "resumption_of"]

SESSION_HEADER: Final = b"x-session-id"
METHODS: Final = frozenset({"GET", "POST", "DELETE"})

_PATH: Final = re.compile(r"/s/([A-Za-z0-9-]{1,64})/mcp/?")
_NAME: Final = re.compile(rb"[A-Za-z0-9-]{1,64}")


@dataclass(frozen=True, slots=True)
class Resumption:
    """A stream of a relayed call that its client wants to hear on, from an event that it has seen."""

    session: LegacySession
    upstream: UpstreamSession
    last_event_id: bytes
    """As the sandbox gave it."""


@dataclass(slots=True, eq=False)
class Door:
    """A request that a caller makes to one of its sandboxes directly."""

    route: Route
    method: str
    resumed: Resumption | None = None
    """None: the caller's session is with the sandbox itself."""

    @property
    def is_stream(self) -> bool:
        """Whether it only listens, and so is no call."""
        return self.method == "GET"


def name_in(head: RequestHead, path: str) -> str | AshError | None:
    """Return which sandbox a request names, why it may not, or None where it names none.

    Args:
        path: As admitted: percent-decoded once.
    """
    if head.named is None or head.named[0] != path:
        head.named = path, _read_name(path, head.fields)
    return head.named[1]


def _read_name(path: str, fields: Fields) -> str | AshError | None:
    named = None
    if path != MCP_PATH:
        named = _PATH.fullmatch(path)
        if named is None:
            return None
    if SESSION_HEADER not in fields:
        return None if named is None else named[1]
    value = fields[SESSION_HEADER]
    if value is None or (named is not None and value.decode("latin-1") != named[1]):
        return ConfigError("the request names more than one sandbox; name it once, in X-Session-ID or in the path")
    # a value that is no name at all is one that nobody has
    return value.decode("ascii") if _NAME.fullmatch(value) is not None else ""


def door_of(routes: Routes, admitted: Admitted, name: str, method: str) -> Door | None:
    """Return the way to the sandbox of this caller that `name` means, or None.

    A session name is one of the request's scope. An id needs none: it is good in every scope that the caller's key is
    for, since whoever sends one has no reason to know its scope.
    """
    route = routes.get(SandboxId(name))
    if route is not None:
        return Door(route, method) if visible(admitted.principal, EVERY_SCOPE, route.owner, route.scope) else None
    route = routes.resolve(admitted.principal, admitted.scope, SessionName(name))
    return None if route is None else Door(route, method)


def resumption_of(sessions: LegacySessions, admitted: Admitted, fields: Fields) -> Door | None:
    """Return the way to the sandbox whose stream a GET on the hive's endpoint wants to hear on, or None."""
    last_event_id, session_id = fields.get(b"last-event-id"), fields.get(b"mcp-session-id")
    if last_event_id is None or session_id is None:
        return None
    session = sessions.get(session_id.decode("latin-1"))
    if session is None or session.admitted.principal != admitted.principal:
        return None
    found = resumed(session, last_event_id)
    return None if found is None else Door(found[0].route, "GET", Resumption(session, *found))
