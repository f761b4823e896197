"""Path, scope and expansion of a request, read from its head and narrowed to its principal's rights."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, unquote

from ash_mcp import errors
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Scope, valid_scope
from ash_mcp.wire import HEADER_SCOPE, MCP_PATH
from ash_router.admission.base import Admitted, Head, Refusal
from ash_router.admission.credential_verdict import Known
from ash_router.admission.door_paths import DoorKind, DoorPath, read_door_path

__all__ = ["RequestScope", "address_of", "read_request_scope"]


@dataclass(frozen=True, slots=True)
class RequestScope:
    """The path, scope and expansion that a request asks for, before its principal is known."""

    path: str
    """Decoded, with `/mcp/in/<scope>` reduced to `/mcp`."""
    scope: Scope | None
    """None if the request names none."""
    expand: bool | None
    door: DoorPath | None = None
    """The door to one sandbox that the path leads to."""

    def verdict_for(self, known: Known, client: tuple[str, int] | None, url: str = "") -> Admitted | Refusal:
        """Return the verdict on this request with a valid credential: a refusal if that is not for the scope.

        Args:
            client: The client's address and port, if known.
            url: The hive's, as `Admitted.url`.
        """
        bound = known.principal.bound_scopes
        scope = DEFAULT_SCOPE if self.scope is None else self.scope
        if bound is not None and scope not in bound:
            if self.scope is not None:
                return Refusal(errors.PermissionDenied(f"your key is not for scope {scope!r}"))
            if len(bound) != 1:
                words = f"name one of the scopes that your key is for: {', '.join(sorted(bound)) or 'it has none'}"
                return Refusal(errors.PermissionDenied(words))
            (only,) = bound
            scope = Scope(only)
        return Admitted(known.principal, scope, self.path, self.expand, known.by, address_of(client), url)


def address_of(client: tuple[str, int] | None) -> str:
    """Return a client's address and port as the audit writes them."""
    return f"{client[0]}:{client[1]}" if client is not None else ""


def read_request_scope(head: Head) -> RequestScope | Refusal:
    """Return what a request's path, query and headers ask for, or the refusal of a malformed or contradicting one."""
    raw_path, _, raw_query = head.target.partition(b"?")
    path = unquote(raw_path.decode("latin-1"))
    door = read_door_path(raw_path, path)
    if isinstance(door, str):
        return Refusal(errors.ConfigError(door))
    if door is not None and door.kind is not DoorKind.MCP:
        raw_query = b""  # it is the sandbox's, whatever it says of a scope
    try:
        query = parse_qs(raw_query.decode("latin-1"), keep_blank_values=True, max_num_fields=64)
    except ValueError:
        return Refusal(errors.ConfigError("the query has more than 64 fields; it knows scope and expand"))
    asked = [*query.get("scope", ()), *head.all(HEADER_SCOPE.encode())]
    inside = f"{MCP_PATH}/in/"
    if path.startswith(inside):
        asked.append(path.removeprefix(inside).rstrip("/"))
        path = MCP_PATH
    if len(set(asked)) > 1:
        return Refusal(errors.ConfigError(f"the request names several scopes: {sorted(set(asked))}; name one"))
    scope = Scope(asked[0]) if asked else None
    if scope is not None and scope not in (DEFAULT_SCOPE, EVERY_SCOPE) and not valid_scope(scope):
        return Refusal(errors.ConfigError(f"{scope!r} cannot be a scope: letters, digits and ._- only, at most 64"))
    expand = query.get("expand", [None])[-1]
    if expand not in (None, "none", "all"):
        return Refusal(errors.ConfigError(f"expand={expand!r} is unknown; use expand=none or expand=all"))
    if path == f"{MCP_PATH}/":
        path = MCP_PATH
    return RequestScope(path, scope, None if expand is None else expand == "all", door)
