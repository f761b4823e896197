"""Checks of HTTP heads, and the writing of heads, chunks and events. Pure.

The parser below uvicorn refuses malformed heads: bare line feeds, folded lines, repeated or contradicting lengths,
unknown final codings. The checks here refuse well-formed heads that two readers could take differently. Framing
headers are never copied from a message that came in: each message that goes out is framed anew.
"""

from __future__ import annotations

import base64
import http
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = [
    "FROM_CALL",
    "FROM_ENDPOINT",
    "LAST_CHUNK",
    "TO_CALL",
    "TO_ENDPOINT",
    "Headers",
    "Problem",
    "ResponseHead",
    "asked_lines",
    "between_events",
    "body_head",
    "check_head",
    "chunk",
    "content_length",
    "content_problem",
    "decode_name",
    "encode_name",
    "finish_head",
    "forwarded",
    "has_body",
    "indexed",
    "lines_of",
    "one",
    "passed_lines",
    "request_head",
    "request_start",
    "response_problem",
    "sse_event",
    "sse_tail",
    "status_line",
    "unframed_problem",
    "value_problem",
]

Headers = Sequence[tuple[bytes, bytes]]
"""Name and value of each header line in order; names in lower case."""

LAST_CHUNK: Final = b"0\r\n\r\n"

_TARGET: Final = re.compile(rb"/[\x21\x22\x24-\x7e]*")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")

_JSON: Final = re.compile(rb'application/json[ \t]*(;[ \t]*charset="?utf-8"?[ \t]*)?', re.IGNORECASE)

_SAID_ONCE: Final = frozenset(
    {b"authorization", b"content-encoding", b"content-type", b"host", b"last-event-id", b"origin", b"x-session-id"}
)
_SAID_ONCE_PREFIXES: Final = (b"ash-", b"mcp-")
"""Headers that authenticate or route a request may come once: of two, readers disagree which one counts."""

_PLAIN: Final = re.compile(r"[\x20-\x7e]+")

TO_CALL: Final = frozenset(
    {
        b"content-type",
        b"accept",
        b"mcp-protocol-version",
        b"mcp-method",
        b"mcp-name",
        b"last-event-id",
        b"traceparent",
        b"tracestate",
    }
)
"""Headers of a caller's request that pass to a sandbox with a relayed call."""
TO_ENDPOINT: Final = TO_CALL | {b"accept-language", b"mcp-session-id", b"user-agent"}
"""Headers of a caller's request that pass to a sandbox's own endpoint."""
_ASKED_PREFIX: Final = b"mcp-param-"

_OF_CONNECTION: Final = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

# Headers of a sandbox's response that pass to the caller. All others are dropped: cookies, CORS, challenges, redirects
# and security policies would act on the hive's own origin, and ash-* headers are the hive's to set.
FROM_CALL: Final = frozenset(
    {
        b"allow",
        b"cache-control",
        b"content-language",
        b"content-type",
        b"mcp-protocol-version",
        b"retry-after",
        b"vary",
        b"x-accel-buffering",
    }
)
FROM_ENDPOINT: Final = FROM_CALL | {b"mcp-session-id"}


@dataclass(frozen=True, slots=True)
class Problem:
    """The HTTP status and the message with which a head is refused."""

    status: int
    message: str


class ResponseHead:
    """The head of a sandbox's response, and the properties of it that the relay uses."""

    __slots__ = ("_kept", "_lines", "headers", "is_json", "is_stream", "length", "status")

    def __init__(self, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = headers
        kind = one(headers, b"content-type")
        self.is_stream = kind is not None and kind.lower().startswith(b"text/event-stream")
        self.is_json = kind is not None and kind.lower().startswith(b"application/json")
        self.length = content_length(headers)
        """Bytes of the body by Content-Length; None without that header."""
        self._kept: frozenset[bytes] | None = None
        self._lines: bytes

    def lines(self, kept: frozenset[bytes]) -> bytes:
        """Return the status line, and the lines of the headers that `kept` names; the last result is cached."""
        if self._kept is not kept:
            self._kept = kept
            self._lines = status_line(self.status) + lines_of((k, v) for k, v in self.headers if k in kept)
        return self._lines


def one(headers: Headers, name: bytes) -> bytes | None:
    """Return the value of a header that occurs exactly once, otherwise None."""
    found: bytes | None = None
    for key, value in headers:
        if key == name:
            if found is not None:
                return None
            found = value
    return None if found is None else found.strip()


def indexed(headers: Headers) -> dict[bytes, bytes | None]:
    """Return the value of each header by its name, None for one that occurs more than once.

    For several headers of one head this is faster than `one`.
    """
    index: dict[bytes, bytes | None] = {}
    for key, value in headers:
        index[key] = value.strip() if key not in index else None
    return index


def content_length(headers: Headers) -> int | None:
    """Return Content-Length in bytes; None if it is absent, repeated or not a number."""
    value = one(headers, b"content-length")
    return int(value) if value is not None and value.isdigit() else None


def has_body(headers: Headers) -> bool:
    """Return whether a request with these headers has a body."""
    return any(
        key == b"transfer-encoding" or (key == b"content-length" and value.strip() != b"0") for key, value in headers
    )


def body_head(headers: Headers) -> bytes:
    """Return the head of a request with only the framing headers of these: a new parser reads the body after it."""
    lines = [
        b"%b: %b\r\n" % (key, value) for key, value in headers if key in (b"content-length", b"transfer-encoding")
    ]
    return b"POST / HTTP/1.1\r\n" + b"".join(lines) + b"\r\n"


def check_head(version: str, method: bytes, target: bytes, headers: Headers) -> Problem | None:
    """Return the problem of a request head that the parser accepted, or None.

    Args:
        version: Of HTTP, such as `1.1`.
        target: Path and query, as sent.
    """
    if version not in ("1.1", "1.0"):
        return Problem(505, f"HTTP/{version} is not served here; use HTTP/1.1")
    if method == b"CONNECT" or _TARGET.fullmatch(target) is None:
        return Problem(400, "the request target must be a path that starts with a slash")
    return _check_framing(version, headers) or _check_repeats(headers)


def _check_repeats(headers: Headers) -> Problem | None:
    seen: set[bytes] = set()
    for key, _ in headers:
        if key in seen and (key in _SAID_ONCE or key.startswith(_SAID_ONCE_PREFIXES)):
            return Problem(400, f"the header {key.decode('latin-1')} came more than once; send it once")
        seen.add(key)
    return None


def content_problem(fields: Mapping[bytes, bytes | None]) -> Problem | None:
    """Return the problem of the headers of an MCP message, which is JSON in UTF-8, not compressed; or None.

    Args:
        fields: As `indexed` returns them.
    """
    kind = fields.get(b"content-type") or b""
    if kind != b"application/json" and _JSON.fullmatch(kind) is None:
        return Problem(400, "a message is JSON in UTF-8: send Content-Type: application/json")
    if (fields.get(b"content-encoding") or b"identity").lower() != b"identity":
        return Problem(400, "a message is not compressed: send it without Content-Encoding")
    return None


def _check_framing(version: str, headers: Headers) -> Problem | None:
    lengths, codings = 0, 0
    if _VALUE.fullmatch(b"".join([value for _, value in headers])) is None:
        return Problem(400, "a header value holds a control character")
    for key, value in headers:
        if key == b"content-length":
            lengths += 1
            if not value.strip().isdigit() or len(value) > 18:
                return Problem(400, "Content-Length must be a decimal number")
        elif key == b"transfer-encoding":
            codings += 1
            if value.strip().lower() != b"chunked":
                return Problem(400, "the only Transfer-Encoding that is served is chunked")
    if lengths + codings > 1:
        return Problem(400, "the length of the body is given more than once")
    if codings and version == "1.0":
        return Problem(400, "HTTP/1.0 has no Transfer-Encoding")
    return None


def encode_name(name: str) -> bytes:
    """Return the value of an `Mcp-Name` header for a tool: its name if that is printable ASCII, else `=?base64?…?=`.

    No tool's name can end the header line.
    """
    if name.isidentifier() and name.isascii():
        return name.encode()  # what most names are
    if _PLAIN.fullmatch(name) and name == name.strip() and not name.startswith("=?base64?"):
        return name.encode()
    return b"=?base64?" + base64.b64encode(name.encode("utf-8", "surrogatepass")) + b"?="


def decode_name(value: bytes) -> str | None:
    """Return the tool's name in an `Mcp-Name` header value; None for a value that `encode_name` never returns."""
    try:
        if value.startswith(b"=?base64?") and value.endswith(b"?="):
            name = base64.b64decode(value[9:-2], validate=True).decode()
            return name if encode_name(name) == value else None
        return value.decode("ascii")
    except ValueError:
        return None


def lines_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return headers as the lines of a head, each with its line end."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def asked_lines(headers: Headers, kept: frozenset[bytes]) -> bytes:
    """Return the header lines of a request that pass: those that `kept` names, and `Mcp-Param-…`."""
    return lines_of(header for header in headers if header[0] in kept or header[0].startswith(_ASKED_PREFIX))


def passed_lines(headers: Headers, *, but: frozenset[bytes] = frozenset()) -> bytes:
    """Return all header lines but those of framing, of one connection (`Connection` names more), and `ash-…`.

    Args:
        but: Names of further headers to leave out.
    """
    said = b",".join([value for key, value in headers if key == b"connection"]).lower()
    kept_back = _OF_CONNECTION | but | {name.strip() for name in said.split(b",")}
    return lines_of((k, v) for k, v in headers if k not in kept_back and not k.startswith(b"ash-"))


def request_head(method: bytes, host: str, length: int | None, *lines: bytes, target: bytes = b"/mcp") -> bytes:
    """Return the head of a request to a sandbox.

    Args:
        host: The sandbox's `Endpoint.authority`.
        length: Bytes of the body; None for a chunked body.
        lines: Header lines, as `lines_of` returns them.
        target: Path and query.
    """
    return finish_head(request_start(method, target, host, *lines), length)


def request_start(method: bytes, target: bytes, host: str, *lines: bytes) -> bytes:
    """Return the part of a request's head that stays when the request is repeated, for `finish_head`."""
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b" % (method, target, host.encode(), b"".join(lines))


def finish_head(start: bytes, length: int | None, lines: bytes = b"") -> bytes:
    """Return the head of a request that begins with `start`, with further lines and the framing of its body."""
    if length is None:
        return b"%b%btransfer-encoding: chunked\r\n\r\n" % (start, lines)
    return b"%b%bcontent-length: %d\r\n\r\n" % (start, lines, length)


def forwarded(headers: Headers, client: str, scheme: str) -> bytes:
    """Return the `x-forwarded-…` lines for a sandbox.

    The address and the scheme are those of the caller's connection, never from `x-forwarded-…` headers of its request.
    """
    told = [(b"x-forwarded-for", client.encode("ascii", "replace")), (b"x-forwarded-proto", scheme.encode())]
    host = one(headers, b"host")
    return lines_of([*told, (b"x-forwarded-host", host)] if host is not None else told)


def unframed_problem(head: ResponseHead) -> str | None:
    """Return why a response, of any server, cannot be passed on: status, control character or coding; or None."""
    if not 200 <= head.status <= 599:
        return f"the sandbox answered with status {head.status}"
    for key, value in head.headers:
        if key == b"transfer-encoding" and value.strip().lower() != b"chunked":
            return "the sandbox sent an unknown transfer coding"
    return value_problem(head)


def value_problem(head: ResponseHead) -> str | None:
    """Return that a response has a header value which cannot be passed on, or None."""
    if any(_VALUE.fullmatch(value) is None for _, value in head.headers):
        return "the sandbox sent a header value with a control character"
    return None


def response_problem(head: ResponseHead) -> str | None:
    """Return why a response of one of the hive's sandboxes cannot be passed on, or None.

    Besides `unframed_problem`: redirects, 401, 407 and compressed bodies.
    """
    if 300 <= head.status <= 399:
        return f"the sandbox answered with a redirect ({head.status}), which is never followed"
    if head.status in (401, 407):
        return f"the sandbox wants a credential that the hive does not have: it answered {head.status}"
    for key, value in head.headers:
        if key == b"content-encoding" and value.strip().lower() != b"identity":
            return "the sandbox compressed its answer, which nobody asked for"
    return unframed_problem(head)


def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


_STATUS_LINES: Final = {status: _status_line(status) for status in range(200, 600)}


def status_line(status: int) -> bytes:
    """Return the first line of a response."""
    return _STATUS_LINES[status]


def chunk(data: bytes) -> bytes:
    """Return `data`, which is not empty, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse_tail(tail: bytes, data: bytes) -> bytes:
    """Return the last bytes of an event stream, at most 4, for `between_events`.

    Args:
        tail: The last bytes before `data`.
    """
    return (tail + data)[-4:] if len(data) < 4 else data[-4:]


def between_events(tail: bytes) -> bool:
    """Return whether a stream whose last bytes are `tail` stands between two events."""
    return tail == b"" or tail.endswith((b"\n\n", b"\r\r", b"\n\r\n"))


def sse_event(tail: bytes, data: bytes) -> bytes:
    """Return one whole `message` event to append to a stream whose last bytes are `tail`.

    If the stream was cut within an event, that event is ended first, under the type `ash-cut`: clients ignore an event
    of an unknown type, and so do not parse half a message.
    """
    event = b"event: message\ndata: " + data + b"\n\n"
    if between_events(tail):
        return event
    line_end = b"" if tail.endswith((b"\n", b"\r")) else b"\n"
    return line_end + b"event: ash-cut\n\n" + event
