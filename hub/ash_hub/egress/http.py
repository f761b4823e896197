"""Heads of requests and answers: read strictly, written anew. No I/O.

Whatever two readers may understand in two ways (several lengths, both framings, folded lines, bare line feeds, space
before a colon) is refused, and the head that goes on is written from what was understood, never copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .names import Target, parse_authority
from .refusal import Refusal

__all__ = ["CHUNKED", "Answer", "Request", "chunk_size", "read_answer", "read_request"]

CHUNKED = -1
"""In place of a length: the body comes in chunks."""

Headers = Sequence[tuple[bytes, bytes]]

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/1\.([01])")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [^\r\n\0]*)?")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\r\n\0]*)?\r\n")
_ABSOLUTE = re.compile(r"(?i:http)://([^/?#]*)([/?][^#]*)?")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MOST_HEADERS = 200
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"proxy-authorization", b"proxy-authenticate", b"proxy-authentication-info", b"http2-settings"),
        b"ash-egress",  # only the proxy itself says that
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it was understood."""

    method: str
    target: Target
    path: str = ""
    """In origin form; empty for CONNECT."""
    headers: Headers = ()
    """Those that go on; neither framing nor host is among them."""
    length: int = 0
    """Of the body, or `CHUNKED`."""

    @property
    def tunnel(self) -> bool:
        return self.method == "CONNECT"

    def head(self) -> bytes:
        """Return the head that goes to the server."""
        host = str(self.target)
        if self.target.port == 80:
            host = host.removesuffix(":80")
        lines = [f"{self.method} {self.path} HTTP/1.1".encode("ascii"), b"Host: " + host.encode("ascii")]
        lines += [name + b": " + value for name, value in self.headers]
        if self.length == CHUNKED:
            lines.append(b"Transfer-Encoding: chunked")
        elif self.length or self.method in ("POST", "PUT", "PATCH"):
            lines.append(b"Content-Length: %d" % self.length)
        return b"\r\n".join([*lines, b"Connection: close", b"", b""])


def read_request(head: bytes) -> Request:
    """Return the request whose head, with the empty line, is `head`.

    Raises:
        Refusal: It is malformed, ambiguous, or not addressed as to a proxy.
    """
    first, headers = _split(head)
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise _bad("the request line is not one of HTTP/1.1")
    method, place = line[1].decode("ascii"), line[2].decode("ascii")
    if method == "CONNECT":
        target = parse_authority(place)
        _check_host(headers, target, default_port=target.port, required=False)
        if any(name.lower() in _FRAMING for name, _ in headers):
            raise _bad("a CONNECT request has no body")
        return Request(method=method, target=target)
    target, path = _absolute(place)
    _check_host(headers, target, default_port=80, required=line[3] == b"1")
    length = _framing(headers, chunks=line[3] == b"1")
    kept = [(name, value) for name, value in _end_to_end(headers) if name.lower() not in (b"host", b"content-length")]
    return Request(method=method, target=target, path=path, headers=kept, length=length)


def _absolute(text: str) -> tuple[Target, str]:
    """Split an absolute form into target and origin form."""
    match = _ABSOLUTE.fullmatch(text)
    if match is None:
        if (scheme := _SCHEME.match(text)) and scheme[1].lower() != "http":
            raise Refusal("scheme", "the proxy takes http:// here, and CONNECT for everything else")
        raise _bad("this is a proxy: it takes whole addresses (GET http://host/path) and CONNECT")
    path = match[2] or "/"
    return parse_authority(match[1], default_port=80), path if path.startswith("/") else f"/{path}"


def _check_host(headers: Headers, target: Target, *, default_port: int, required: bool) -> None:
    hosts = [value for name, value in headers if name.lower() == b"host"]
    if len(hosts) > 1 or (required and not hosts):
        raise _bad("a request has exactly one Host")
    for value in hosts:
        try:
            named = parse_authority(value.decode("ascii"), default_port=default_port)
        except (Refusal, UnicodeDecodeError):
            named = None
        if named != target:
            raise Refusal("host", "the Host header is not the host of the request's address")


def _framing(headers: Headers, *, chunks: bool) -> int:
    lengths = [value for name, value in headers if name.lower() == b"content-length"]
    codings = [value.lower() for name, value in headers if name.lower() == b"transfer-encoding"]
    if codings:
        if lengths or codings != [b"chunked"] or not chunks:
            raise _bad("the length of the body is not clear: chunked alone, or one Content-Length")
        return CHUNKED
    if not lengths:
        return 0
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise _bad("the length of the body is not clear: one Content-Length, a plain number")
    return int(lengths[0])


def _end_to_end(headers: Headers) -> Iterator[tuple[bytes, bytes]]:
    """Yield the headers that are not for this connection alone."""
    named = {
        word.strip().lower() for name, value in headers if name.lower() == b"connection" for word in value.split(b",")
    }
    for name, value in headers:
        if name.lower() not in _HOP_BY_HOP and name.lower() not in named:
            yield name, value


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of a server's answer."""

    status: int
    head: bytes
    """As the client gets it."""
    length: int | None
    """Of the body, whatever the method was; None is until the connection ends."""

    @property
    def interim(self) -> bool:
        return self.status < 200


def read_answer(head: bytes) -> Answer:
    """Return the head that the client gets for a server's `head`: it tells that the connection ends with it.

    Raises:
        Refusal: It is no answer of HTTP/1.1, or would switch to another protocol.
    """
    try:
        first, headers = _split(head)
    except Refusal as refusal:
        raise _bad_answer() from refusal
    line = _STATUS_LINE.fullmatch(first)
    if line is None or line[1] == b"101":
        raise _bad_answer()
    kept = [name + b": " + value for name, value in _end_to_end(headers)]
    # The body is passed on as it is, so its coding stays.
    kept += [name + b": " + value for name, value in headers if name.lower() == b"transfer-encoding"]
    status = int(line[1])
    closing = [] if status < 200 else [b"Connection: close"]
    return Answer(status, b"\r\n".join([first, *kept, *closing, b"", b""]), _answer_length(status, headers))


def _answer_length(status: int, headers: Headers) -> int | None:
    if status in (204, 304):
        return 0
    framing = [(name.lower(), value) for name, value in headers if name.lower() in _FRAMING]
    if len(framing) == 1 and framing[0][0] == b"content-length" and _LENGTH.fullmatch(framing[0][1]):
        return int(framing[0][1])
    return None


def _split(head: bytes) -> tuple[bytes, Headers]:
    if not head.endswith(b"\r\n\r\n"):
        raise _bad("the head does not end with an empty line")
    first, *lines = head[:-4].split(b"\r\n")
    if len(lines) > _MOST_HEADERS:
        raise _bad(f"more than {_MOST_HEADERS} headers")
    headers: list[tuple[bytes, bytes]] = []
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            raise _bad("a header line is malformed")
        headers.append((match[1], match[2].strip(b" \t")))
    return first, headers


def chunk_size(line: bytes) -> int:
    """Return the size that a chunk's first line gives, its extensions passed over.

    Raises:
        Refusal: It is not one.
    """
    match = _CHUNK.fullmatch(line)
    if match is None:
        raise _bad("a chunk does not begin with its size")
    return int(match[1], 16)


def _bad(message: str) -> Refusal:
    return Refusal("bad_request", message, status=400)


def _bad_answer() -> Refusal:
    return Refusal("bad_answer", "the server's answer is not HTTP/1.1", status=502)
