"""Admission: who makes this request, and may it come in. Everything behind it trusts only its verdict.

`admit` runs in the protocol class before anything else, for relayed and ASGI requests alike. It sees the head and
never the body, and does no I/O but the look-up of a credential.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import parse_qs, unquote

from ash_mcp import errors
from ash_mcp.errors import AshError
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Principal, Scope, valid_scope
from ash_mcp.wire import HEADER_SCOPE, MCP_PATH

__all__ = ["Admission", "Admitted", "Head", "LoopbackAdmission", "Refusal"]

ADMITTED_KEY: Final = "ash.admitted"
"""Where the verdict stands in the ASGI scope. An ASGI app of ours that finds none answers 500."""

LOCAL: Final = Principal("local")


@dataclass(frozen=True, slots=True)
class Head:
    """The head of one request. Header names are lower case."""

    method: str
    target: bytes
    """As sent: path and query, never absolute form."""
    headers: Sequence[tuple[bytes, bytes]]
    client: tuple[str, int] | None

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


class LoopbackAdmission:
    """Admits as `local` whatever reaches a loopback address by an honest name.

    Args:
        port: Where the hive listens; part of the accepted `Host` and `Origin`.
        hosts: Further host names (without port) that a `Host` may name.
        origins: Further origins, exact, that a browser page may have.
    """

    def __init__(self, *, port: int, hosts: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        self._port = port
        self._hosts = frozenset({"127.0.0.1", "localhost", "[::1]", *(host.lower() for host in hosts)})
        own = {f"http://{host}:{port}" for host in ("127.0.0.1", "localhost", "[::1]")}
        self._origins = frozenset({*own, *origins})

    def admit(self, head: Head) -> Admitted | Refusal:
        refusal = self._check_host(head) or self._check_origin(head)
        return refusal if refusal is not None else _narrow(head, LOCAL)

    def _check_host(self, head: Head) -> Refusal | None:
        named = head.all(b"host")
        if len(named) != 1:
            return Refusal(errors.ConfigError("send exactly one Host header"), status=400)
        name, colon, port = named[0].lower().rpartition(":")
        if not colon or port.endswith("]"):
            name, port = named[0].lower(), "80"
        if not port.isdecimal() or (name not in self._hosts and not _is_loopback(name)):
            return Refusal(
                errors.PermissionDenied(
                    f"this hive answers only to its own names, not to {named[0]!r}; "
                    "connect to 127.0.0.1, or add the name to ASH_HUB_ALLOWED_HOSTS"
                ),
                status=421,
            )
        return None

    def _check_origin(self, head: Head) -> Refusal | None:
        for origin in head.all(b"origin"):
            if origin not in self._origins:
                return Refusal(
                    errors.PermissionDenied(
                        f"pages of origin {origin!r} may not call this hive; add it to ASH_HUB_ALLOWED_ORIGINS"
                    )
                )
        return None


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _narrow(head: Head, principal: Principal) -> Admitted | Refusal:
    """Find the scope and the expansion that a request asks for, and check them against the principal."""
    raw_path, _, raw_query = head.target.partition(b"?")
    path = unquote(raw_path.decode("latin-1"))
    query = parse_qs(raw_query.decode("latin-1"), keep_blank_values=True, max_num_fields=64)
    asked = [*query.get("scope", ()), *head.all(HEADER_SCOPE.encode())]
    inside = f"{MCP_PATH}/in/"
    if path.startswith(inside):
        asked.append(path.removeprefix(inside).rstrip("/"))
        path = MCP_PATH
    if len(set(asked)) > 1:
        return Refusal(errors.ConfigError(f"the request names several scopes: {sorted(set(asked))}; name one"))
    scope = Scope(asked[0]) if asked else DEFAULT_SCOPE
    if scope not in (DEFAULT_SCOPE, EVERY_SCOPE) and not valid_scope(scope):
        return Refusal(errors.ConfigError(f"{scope!r} cannot be a scope: letters, digits and ._- only, at most 64"))
    if principal.bound_scopes is not None and scope not in principal.bound_scopes:
        if len(principal.bound_scopes) != 1 or asked:
            return Refusal(errors.PermissionDenied(f"your key is not for scope {scope!r}"))
        (only,) = principal.bound_scopes
        scope = Scope(only)
    expand = query.get("expand", [None])[-1]
    if expand not in (None, "none", "all"):
        return Refusal(errors.ConfigError(f"expand={expand!r} is unknown; use expand=none or expand=all"))
    if path == f"{MCP_PATH}/":
        path = MCP_PATH
    return Admitted(principal, scope, path, None if expand is None else expand == "all")
