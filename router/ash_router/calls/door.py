"""Doors: what of a request passes to a server, and what of the server's answer to the caller. Data; no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ash_mcp.errors import AshError, PermissionDenied
from ash_mcp.wire import FILES_PATH, MCP_PATH, TERMINAL_PATH
from ash_router.admission.door_paths import DoorKind
from ash_router.http import framing, websocket
from ash_router.http.framing import ResponseHead
from ash_router.http.heads import Fields, RequestHead

__all__ = [
    "CALL_HEADERS",
    "DOORS",
    "FILES_DOOR",
    "MCP_DOOR",
    "OF_ORIGIN",
    "PORTS_DOOR",
    "RESUMPTION_DOOR",
    "SANDBOXED_LINES",
    "TERMINAL_DOOR",
    "TO_INNER_SERVER",
    "Door",
    "HeaderPolicy",
    "browser_refusal",
]


@dataclass(frozen=True, slots=True)
class HeaderPolicy:
    """Which headers pass, by their names in lower case."""

    request: frozenset[bytes]
    """Those of the caller's request. `Mcp-Param-…` passes as well."""
    response: frozenset[bytes]
    """Those of the server's answer."""
    is_denylist: bool = False
    """Whether the names are those that do not pass. All others pass then, but for framing, headers of one connection,
    and `ash-…`."""

    def request_lines(self, head: RequestHead) -> bytes:
        """Return the header lines of a request that pass."""
        if self.is_denylist:
            return framing.passed_lines(head.headers, but=self.request)
        return head.lines(self.request)

    def response_lines(self, head: ResponseHead) -> bytes:
        """Return the status line and the header lines of an answer that pass."""
        if self.is_denylist:
            return framing.status_line(head.status) + framing.passed_lines(head.headers, but=self.response)
        return head.lines(self.response)


@dataclass(frozen=True, slots=True)
class Door:
    """One kind of endpoint that callers reach directly."""

    target: bytes
    """The path that the server is asked for; a request's `DirectRequest.rest` is appended."""
    methods: frozenset[str] | None
    """None: all."""
    headers: HeaderPolicy
    is_mcp: bool = True
    """Whether MCP is spoken: a GET only listens and is no call, and the hive may say something in an answer. Otherwise
    the bytes are the sandbox's own, and an answer that breaks off is cut off."""
    lines: bytes = b""
    """Header lines that the hive adds to each answer."""
    for_programs: bool = False
    """Whether requests are refused that a browser makes to show or run what comes, as `browser_refusal` has it."""
    has_body_cap: bool = True
    """Whether a request's body is at most `RelayLimits.max_direct_body_bytes` long."""
    silent_seconds: float | None = None
    """How long the sandbox may be silent; None: `RelayLimits.idle_stream_seconds`."""
    problem_of: Callable[[ResponseHead], str | None] | None = None
    """Says why an answer is not taken, or None; None: as the pool of connections has it."""
    websocket: Literal["ignored", "taken", "required"] = "ignored"
    """Whether a WebSocket is passed, or is the only thing that is. Where handshakes are ignored, they are plain
    requests. Such a door is not MCP's, and `headers` has to pass `websocket.REQUEST_HEADERS`."""

    def takes(self, method: str) -> bool:
        """Return whether requests with this method pass."""
        return self.methods is None or method in self.methods


CALL_HEADERS: Final = HeaderPolicy(framing.TO_CALL, framing.FROM_CALL)
"""Of a relayed call."""

MCP_DOOR: Final = Door(
    MCP_PATH.encode(), frozenset({"GET", "POST", "DELETE"}), HeaderPolicy(framing.TO_ENDPOINT, framing.FROM_ENDPOINT)
)
"""A sandbox's own MCP endpoint."""

_OF_SESSION: Final = frozenset(
    {b"last-event-id", b"mcp-method", b"mcp-name", b"mcp-protocol-version", b"mcp-session-id"}
)
RESUMPTION_DOOR: Final = Door(
    MCP_DOOR.target, frozenset({"GET"}), HeaderPolicy(framing.TO_ENDPOINT - _OF_SESSION, framing.FROM_CALL)
)
"""The stream of a relayed call, continued; the headers of its session are the hive's to set."""

OF_ORIGIN: Final = frozenset(
    {
        b"accept-ch", b"access-control-allow-credentials", b"access-control-allow-headers",
        b"access-control-allow-methods", b"access-control-allow-origin", b"access-control-expose-headers",
        b"access-control-max-age", b"alt-svc", b"clear-site-data", b"content-disposition", b"content-security-policy",
        b"content-security-policy-report-only", b"critical-ch", b"cross-origin-embedder-policy",
        b"cross-origin-opener-policy", b"cross-origin-resource-policy", b"nel", b"origin-agent-cluster",
        b"permissions-policy", b"proxy-authenticate", b"public-key-pins", b"refresh", b"report-to",
        b"reporting-endpoints", b"service-worker-allowed", b"set-cookie", b"set-cookie2", b"set-login",
        b"strict-transport-security", b"supports-loading-mode", b"timing-allow-origin", b"use-as-dictionary",
        b"www-authenticate", b"x-content-type-options", b"x-frame-options", b"x-xss-protection",
    }
)  # fmt: skip
"""Headers of an answer that would act on the hive's own origin; a policy that is a denylist has them in it."""

SANDBOXED_LINES: Final = framing.lines_of(
    [
        (b"content-security-policy", b"sandbox"),
        (b"content-disposition", b"attachment"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"x-content-type-options", b"nosniff"),
    ]
)
"""Of each answer on the hive's own origin whose bytes are a sandbox's: no browser shows or runs it there."""

_SHOWN: Final = frozenset(
    {
        b"document",
        b"embed",
        b"fencedframe",
        b"frame",
        b"iframe",
        b"object",
        b"serviceworker",
        b"sharedworker",
        b"worker",
    }
)
_ELSEWHERE: Final = frozenset({b"cross-site", b"same-site"})


def browser_refusal(fields: Fields) -> AshError | None:
    """Return why a browser's request gets nothing of a door for programs, or None.

    Refused are a page, a frame or a worker on the hive's origin, and what a page of another origin embeds: such a
    request says no `Origin`, so admission cannot refuse it.
    """
    if b"sec-fetch-dest" in fields and (fields[b"sec-fetch-dest"] or b"document").lower() in _SHOWN:
        return PermissionDenied(
            "a browser may not show or run here what comes from a sandbox; fetch it with a program, such as curl"
        )
    if (fields.get(b"sec-fetch-site") or b"").lower() in _ELSEWHERE and b"origin" not in fields:
        return PermissionDenied("a page of another site may not embed what comes from a sandbox")
    return None


_FILE_REQUEST: Final = frozenset(
    {
        b"accept", b"content-encoding", b"content-type", b"if-match", b"if-modified-since", b"if-none-match",
        b"if-range", b"if-unmodified-since", b"range", b"traceparent", b"tracestate",
    }
)  # fmt: skip
_FILE_RESPONSE: Final = frozenset(
    {
        b"accept-ranges", b"allow", b"cache-control", b"content-range", b"content-type", b"etag", b"last-modified",
        b"link", b"retry-after", b"vary",
    }
)  # fmt: skip


def _file_problem(head: ResponseHead) -> str | None:
    return None if head.status == 304 else framing.response_problem(head)


FILES_DOOR: Final = Door(
    FILES_PATH.encode(),
    frozenset({"DELETE", "GET", "HEAD", "PUT"}),
    HeaderPolicy(_FILE_REQUEST, _FILE_RESPONSE),
    is_mcp=False,
    lines=SANDBOXED_LINES,
    for_programs=True,
    has_body_cap=False,
    silent_seconds=120.0,
    problem_of=_file_problem,
)
"""A sandbox's files: bytes of any length, each way."""

TERMINAL_DOOR: Final = Door(
    TERMINAL_PATH.encode(),
    frozenset({"GET"}),
    HeaderPolicy(websocket.REQUEST_HEADERS, frozenset({b"content-type"})),
    is_mcp=False,
    lines=SANDBOXED_LINES,
    for_programs=True,
    websocket="required",
)
"""A sandbox's terminals, by a WebSocket for each."""

TO_INNER_SERVER: Final = frozenset(
    {
        b"authorization", b"cookie", b"cookie2", b"forwarded", b"x-forwarded-for", b"x-forwarded-host",
        b"x-forwarded-port", b"x-forwarded-prefix", b"x-forwarded-proto", b"x-forwarded-server", b"x-real-ip",
        b"x-session-id",
    }
)  # fmt: skip
"""What of a request never gets to a server inside a sandbox; of `x-forwarded-…` the hive's own does."""

PORTS_DOOR: Final = Door(
    b"",
    None,
    HeaderPolicy(TO_INNER_SERVER, OF_ORIGIN | {b"location"}, is_denylist=True),
    is_mcp=False,
    websocket="taken",
    lines=SANDBOXED_LINES,
    for_programs=True,
    has_body_cap=False,
    problem_of=framing.unframed_problem,
)
"""A server inside a sandbox, for programs. `ports.py` says what is asked of it."""

DOORS: Final[Mapping[DoorKind, Door]] = {
    DoorKind.MCP: MCP_DOOR,
    DoorKind.FILES: FILES_DOOR,
    DoorKind.TERMINAL: TERMINAL_DOOR,
    DoorKind.PORTS: PORTS_DOOR,
}
"""The doors that callers reach as `/s/<sandbox>/…`. A kind that is not here is no way in."""
