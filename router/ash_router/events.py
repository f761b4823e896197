"""An event stream cut at the ends of its events, with nothing held back that need not be. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

__all__ = ["MAX_HELD_BYTES", "EventSplitter"]

MAX_HELD_BYTES: Final = 1024 * 1024
"""Of an event that has not ended. Clients refuse longer ones, so such a one is passed on unread."""

# A line end twice. A lone carriage return is one only if no line feed can follow it any more.
_END: Final = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")

# The start of an answer, as every server writes it. What begins so need not be read to its end.
_ANSWER: Final = re.compile(
    rb"(?:(?:event: ?message|id:[^\r\n]*)\r?\n)*data: ?"
    rb'\{"jsonrpc": ?"2\.0", ?"id": ?(?:\d{1,20}|"[^"\\]{0,256}"), ?"result":'
)


class EventSplitter:
    """Passes events on, each through `edit` as soon as it is whole; the long rest of an answer as it comes.

    Args:
        edit: Takes one event with its end, or the beginning of an answer up to its result, and returns it changed.
    """

    def __init__(self, edit: Callable[[bytes], bytes]) -> None:
        self._edit = edit
        self._held = b""
        self._passing = False
        self._tail = b""

    @property
    def between_events(self) -> bool:
        return not self._held and not self._passing

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """Take what came and return what may be passed on now; with `last` all of it."""
        out: list[bytes] = []
        if self._passing:
            found = _END.search(self._tail + data)
            if found is None:
                self._tail = (self._tail + data)[-3:]
                return data
            end = found.end() - len(self._tail)
            out.append(data[:end])
            data, self._passing = data[end:], False
        data = self._held + data
        begin, search_from = 0, max(0, len(self._held) - 3)
        while (found := _END.search(data, search_from)) is not None:
            out.append(self._edit(data[begin : found.end()]))
            begin = search_from = found.end()
        self._held = data[begin:]
        if self._held:
            self._let_go(out, last)
        return b"".join(out)

    def _let_go(self, out: list[bytes], last: bool) -> None:
        """Pass on the beginning of an event that needs no more reading."""
        start = _ANSWER.match(self._held)
        if start is not None:
            out += (self._edit(self._held[: start.end()]), self._held[start.end() :])
        elif last or len(self._held) > MAX_HELD_BYTES:
            out.append(self._held)
        else:
            return
        self._tail, self._held, self._passing = self._held[-3:], b"", True
