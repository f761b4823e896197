"""The handshake of a WebSocket (RFC 6455) as the relay passes it: which request asks for one, and both heads. Pure."""

from __future__ import annotations

from typing import Final

from ash_router.http import framing
from ash_router.http.framing import Headers, ResponseHead
from ash_router.http.heads import RequestHead

__all__ = ["ANSWER_HEADERS", "REQUEST_HEADERS", "accepting_lines", "answer_problem", "asks_for_one", "request_head"]

_OF_BOTH: Final = frozenset({b"sec-websocket-extensions", b"sec-websocket-protocol"})
REQUEST_HEADERS: Final = _OF_BOTH | {b"sec-websocket-key", b"sec-websocket-version"}
"""What of a caller's handshake the server gets."""
ANSWER_HEADERS: Final = _OF_BOTH | {b"sec-websocket-accept"}
"""What of the server's handshake the caller gets; nothing else of its head passes."""
_SWITCH: Final = b"connection: Upgrade\r\nupgrade: websocket\r\n"


def asks_for_one(head: RequestHead) -> bool:
    """Return whether a request is the handshake of a WebSocket."""
    fields = head.fields
    return (
        head.version == "1.1"
        and head.method == b"GET"
        and (fields.get(b"upgrade") or b"").lower() == b"websocket"
        and _names_upgrade(head.headers)
        and bool(fields.get(b"sec-websocket-key"))
        and not framing.has_body(head.headers)
    )


def _names_upgrade(headers: Headers) -> bool:
    said = b",".join([value for name, value in headers if name == b"connection"]).lower()
    return b"upgrade" in [name.strip() for name in said.split(b",")]


def request_head(target: bytes, host: str, *lines: bytes) -> bytes:
    """Return the head of a handshake with a sandbox.

    Args:
        host: The sandbox's `Endpoint.authority`.
        lines: Further header lines; those of `REQUEST_HEADERS` are among them.
    """
    begin = b"GET %b HTTP/1.1\r\nhost: %b\r\n" % (target, host.encode())
    return b"".join((begin, _SWITCH, *lines, b"\r\n"))


def answer_problem(head: ResponseHead) -> str | None:
    """Return why a 101 of a sandbox is not the answer to such a handshake, or None."""
    if (framing.one(head.headers, b"upgrade") or b"").lower() != b"websocket":
        return "the sandbox switched to another protocol than the one that was asked for"
    if framing.one(head.headers, b"sec-websocket-accept") is None:
        return "the sandbox did not accept the WebSocket as RFC 6455 has it"
    return framing.value_problem(head)


def accepting_lines(head: ResponseHead) -> bytes:
    """Return the status line and the header lines of a 101 that its caller gets."""
    passed = framing.lines_of((name, value) for name, value in head.headers if name in ANSWER_HEADERS)
    return b"HTTP/1.1 101 Switching Protocols\r\n" + _SWITCH + passed
