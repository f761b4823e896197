"""What is known of a request's head, worked out once; and how a head that comes again is told from its bytes. Pure.

Who calls a tool again and again sends the same head but for its length, and so does who answers. Of such a message
only the first is parsed: the same bytes mean the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Self

from ash_router import _framing
from ash_router._framing import Headers

__all__ = ["Fields", "RequestHead", "SameHead"]

Fields = Mapping[bytes, bytes | None]
"""A request's headers as `_framing.indexed` returns them."""

_DIGITS: Final = re.compile(rb"[1-9][0-9]{0,8}")
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*([1-9][0-9]{0,8})\r\n", re.IGNORECASE)


class RequestHead:
    """The head of a caller's request, as it was parsed."""

    __slots__ = ("_fields", "_lines", "_tool", "headers", "method", "named", "target", "version")

    def __init__(self, version: str, method: bytes, target: bytes, headers: Headers) -> None:
        self.version = version
        self.method = method
        self.target = target
        self.headers = headers
        self.named: tuple[str, Any] | None = None
        """What `direct.py` read from it about whose endpoint it means, and under which path."""
        self._fields: Fields | None = None
        self._tool: tuple[str | None] | None = None
        self._lines: dict[frozenset[bytes], bytes] = {}

    @property
    def fields(self) -> Fields:
        if self._fields is None:
            self._fields = _framing.indexed(self.headers)
        return self._fields

    @property
    def tool(self) -> str | None:
        """The tool that it names in the stateless era, under the hive's name for it."""
        if self._tool is None:
            value = self.fields.get(b"mcp-name")
            self._tool = (None if value is None else _framing.decode_name(value),)
        return self._tool[0]

    def is_same(self, version: str, method: bytes, target: bytes, headers: Headers) -> bool:
        return (self.version, self.method, self.target, self.headers) == (version, method, target, headers)

    def lines(self, kept: frozenset[bytes]) -> bytes:
        """Return the lines that a sandbox gets to see: those of `kept`, and what mirrors arguments."""
        lines = self._lines.get(kept)
        if lines is None:
            lines = self._lines[kept] = _framing.asked_lines(self.headers, kept)
        return lines


class SameHead:
    """Knows whether a message has the same head as one that was parsed before, but for the length of its body."""

    __slots__ = ("_after", "_before", "_digits_at")

    def __init__(self, before: bytes, after: bytes) -> None:
        self._before = before
        self._after = after
        self._digits_at = len(before)

    @classmethod
    def of(cls, message: bytes) -> Self | None:
        """Return what tells the head of `message` again; None unless this is one message, whole, with a length."""
        end = message.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(message, 0, end) if end > 3 else None
        if length is None or len(message) - end != int(length[1]):
            return None
        return cls(message[: length.start(1)], message[length.end(1) : end])

    def body_of(self, message: bytes) -> bytes | None:
        """Return the body of a message with this head that is whole; None for anything else."""
        if not message.startswith(self._before):
            return None
        digits_at, after = self._digits_at, self._after
        digits_end = message.find(b"\r", digits_at)
        if not message.startswith(after, digits_end):
            return None
        body = message[digits_end + len(after) :]
        # its length in the one way to write it, so that nothing but digits can stand there
        return body if message[digits_at:digits_end] == b"%d" % len(body) else None

    def is_head_of(self, data: bytes) -> bool:
        """Say whether `data` is such a head and not more, so that its body is still to come."""
        digits = data[self._digits_at : len(data) - len(self._after)]
        return data == b"%b%b%b" % (self._before, digits, self._after) and _DIGITS.fullmatch(digits) is not None
