"""Admission: who makes this request, and may it come in. Everything behind it trusts only its verdict.

`admit` runs in the protocol class before anything else, for relayed and ASGI requests alike. It sees the head and
never the body, and does no I/O but the look-up of a credential. `gate.py` is the one that a hive has.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ash_mcp.errors import AshError
from ash_mcp.types import Principal, Scope

__all__ = ["ADMITTED_KEY", "LOCAL", "NOBODY", "SESSION_HEADER", "Admission", "Admitted", "Head", "Refusal"]

ADMITTED_KEY: Final = "ash.admitted"
"""Where the verdict stands in the ASGI scope. An ASGI app of ours that finds none answers 500."""

SESSION_HEADER: Final = b"x-session-id"
"""Names a sandbox on the hive's endpoint: by session, id or alias."""

LOCAL: Final = Principal("local")
"""Who needs no credential on a loopback hive."""

NOBODY: Final = Principal("", bound_scopes=frozenset())
"""Who asks for a path that is open to all. It owns nothing and may use no scope."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of one request. Header names are lower case."""

    method: str
    target: bytes
    """As sent: path and query, never absolute form."""
    headers: Sequence[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    server: tuple[str, int] | None = None
    """Where on this host the connection came in."""
    connection: object | None = None
    """Stands for the connection as long as it lives, by identity; what is found out about its peer is kept by it."""

    def all(self, name: bytes) -> list[str]:
        return [value.decode("latin-1").strip() for key, value in self.headers if key == name]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may come in."""

    principal: Principal
    scope: Scope
    path: str
    """The decoded path, with `/mcp/in/<scope>` reduced to `/mcp`."""
    expand: bool | None = None
    """Whether this connection wants sandboxes' tools in `tools/list`; None leaves it to the hive."""
    by: str = ""
    """Which credential admitted it, for the audit: `key:<id>`, `oidc`, `peer`, or nothing."""
    client: str = ""
    """Where it came from, for the audit: address and port."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that may not; answered with the error's HTTP status and JSON body."""

    error: AshError
    status: int | None = None
    """None: the status of the error's kind."""
    headers: tuple[tuple[str, str], ...] = ()


class Admission(Protocol):
    """`admit` is synchronous where the verdict is known, and awaitable where a credential must be looked up."""

    def admit(self, head: Head) -> Admitted | Refusal | Awaitable[Admitted | Refusal]: ...
