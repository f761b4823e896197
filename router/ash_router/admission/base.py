"""Admission: authenticates and authorises a request from its head. All code behind it trusts only its verdict.

`admit` runs in the protocol class before anything else, for relayed and ASGI requests alike. It sees the head and
never the body, and does no I/O but the look-up of a credential. `gate.py` has the one of a hive.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ash_mcp.errors import AshError
from ash_mcp.types import Principal, Scope

__all__ = [
    "ADMITTED_KEY",
    "LOCAL",
    "NOBODY",
    "SESSION_HEADER",
    "Admission",
    "Admitted",
    "Head",
    "Preview",
    "Refusal",
    "SentOn",
]

ADMITTED_KEY: Final = "ash.admitted"
"""The key of the `Admitted` in the ASGI scope. The hive's ASGI app answers 500 where there is none."""

SESSION_HEADER: Final = b"x-session-id"
"""Names a sandbox on the hive's endpoint: by session, id or alias."""

LOCAL: Final = Principal("local")
"""The principal of a request without a credential, on a hive that listens on loopback."""

NOBODY: Final = Principal("", bound_scopes=frozenset())
"""The principal of a request to a path that needs no credential. It owns nothing and may use no scope."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of one request. Header names are lower case."""

    method: str
    target: bytes
    """As sent: path and query, never absolute form."""
    headers: Sequence[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    server: tuple[str, int] | None = None
    """The address and port that the client connected to; None for a Unix socket."""
    connection: object | None = None
    """An object that lives as long as the connection; facts about the peer are cached by its identity."""

    def all(self, name: bytes) -> list[str]:
        return [value.decode("latin-1").strip() for key, value in self.headers if key == name]


@dataclass(frozen=True, slots=True)
class Preview:
    """What a request to a preview's host leads to: a port of its guest's sandbox, and nothing of the hive."""

    port: int
    authority: str
    """As its `Host` says."""
    scheme: str
    """By which the browser sees it."""
    hides_authorization: bool = False
    """Whether the request's `Authorization` holds a token for the hive, and so goes no further."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The verdict on a request that is admitted."""

    principal: Principal
    scope: Scope
    path: str
    """The decoded path, with `/mcp/in/<scope>` reduced to `/mcp`."""
    expand: bool | None = None
    """Whether the request asks for sandboxes' tools in `tools/list`; None: the hive's setting decides."""
    by: str = ""
    """Which credential admitted it, audited: `key:<id>`, `oidc`, `share:<id>`, `ticket:<id>`, `peer`; or none."""
    client: str = ""
    """The client's address and port, for the audit."""
    url: str = ""
    """The hive's URL, without a path, as its caller knows it."""
    max_bytes: int | None = None
    """How long the body may be that a ticket admits; None: as long as the door lets it."""
    preview: Preview | None = None
    """Set for a request to a preview's host: its target is the server's, whatever `path` says."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The verdict on a request that is refused: answered with the error as JSON."""

    error: AshError
    status: int | None = None
    """Of HTTP; None: that of the error's kind."""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class SentOn(Refusal):
    """The verdict on the first visit of a preview: it is sent on to the same address without the secret in it."""


class Admission(Protocol):
    """Decides on requests. `admit` returns the verdict, or an awaitable of it where a credential must be looked up."""

    def admit(self, head: Head) -> Admitted | Refusal | Awaitable[Admitted | Refusal]: ...
