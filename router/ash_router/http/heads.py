"""Parsed request heads, and the fast path for a head equal to the previous one but for Content-Length. Pure.

Fast path: a head whose bytes equal the last one's on its connection, except for Content-Length, is not parsed again.
Clients that call a tool repeatedly send such heads, and so do the sandboxes that answer them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Self

from ash_router.http import framing
from ash_router.http.framing import Headers

__all__ = ["Fields", "RequestHead", "SameHead"]

Fields = Mapping[bytes, bytes | None]
"""A request's headers as `framing.indexed` returns them."""

_DIGITS: Final = re.compile(rb"[1-9][0-9]{0,8}")
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*([1-9][0-9]{0,8})\r\n", re.IGNORECASE)


class RequestHead:
    """The parsed head of a caller's request."""

    __slots__ = ("_lines", "_tool", "fields", "headers", "method", "named", "resolved", "target", "version")

    def __init__(self, version: str, method: bytes, target: bytes, headers: Headers) -> None:
        self.version = version
        self.method = method
        self.target = target
        self.headers = headers
        self.fields: Fields = framing.indexed(headers)
        self.named: tuple[str, Any] | None = None
        """Cache of `direct.door_in`: the path that it read, and what it returned."""
        self.resolved: Any = None
        """Cache of `MessageClassifier`: the tool that a call with this head was last resolved to."""
        self._tool: tuple[str | None] | None = None
        self._lines: dict[frozenset[bytes], bytes] = {}

    @property
    def tool(self) -> str | None:
        """The tool in a stateless-era head (`Mcp-Name`), by the name that the hive lists it under."""
        if self._tool is None:
            value = self.fields.get(b"mcp-name")
            self._tool = (None if value is None else framing.decode_name(value),)
        return self._tool[0]

    def is_same(self, version: str, method: bytes, target: bytes, headers: Headers) -> bool:
        return (self.version, self.method, self.target, self.headers) == (version, method, target, headers)

    def lines(self, kept: frozenset[bytes]) -> bytes:
        """Return the header lines that a sandbox gets: those named in `kept`, and `Mcp-Param-…` ones."""
        lines = self._lines.get(kept)
        if lines is None:
            lines = self._lines[kept] = framing.asked_lines(self.headers, kept)
        return lines


class SameHead:
    """Recognises a message whose head equals one that was parsed before, except for Content-Length."""

    __slots__ = ("_after", "_before", "_digits_at")

    def __init__(self, before: bytes, after: bytes) -> None:
        self._before = before
        self._after = after
        self._digits_at = len(before)

    @classmethod
    def of(cls, message: bytes) -> Self | None:
        """Return what recognises the head of `message`; None unless that is one whole message with Content-Length."""
        end = message.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(message, 0, end) if end > 3 else None
        if length is None or len(message) - end != int(length[1]):
            return None
        return cls(message[: length.start(1)], message[length.end(1) : end])

    def body_of(self, message: bytes) -> bytes | None:
        """Return the body of a whole message with this head; None for anything else."""
        before, after = self._before, self._after
        end = message.find(b"\r", self._digits_at) + len(after)
        length = len(message) - end
        # the length that follows from the message is its only spelling that passes
        return message[end:] if message.startswith(b"%b%d%b" % (before, length, after)) else None

    def is_head_of(self, data: bytes) -> bool:
        """Return whether `data` is such a head alone, with its body still to come."""
        digits = data[self._digits_at : len(data) - len(self._after)]
        return data == b"%b%b%b" % (self._before, digits, self._after) and _DIGITS.fullmatch(digits) is not None
