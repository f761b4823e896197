"""Splits an event stream (SSE) into events, and holds back no more bytes than it must. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

__all__ = ["MAX_HELD_BYTES", "EventSplitter"]

MAX_HELD_BYTES: Final = 1024 * 1024
"""The most that is held of an event that has not ended. Clients refuse longer events; they pass unedited."""

# Two line ends. Spelled out, this is searched six times as fast as with a repeat count.
_END: Final = re.compile(rb"(?:\n|\r\n?+)(?:\n|\r\n?+)")

# The start of a JSON-RPC answer, as servers write it: its rest needs no edit. The match is short, so trying it after
# each read costs the same however much is held.
_START: Final = (
    rb"(?:(?:event: ?message|id:[^\r\n]{0,1024})\r?\n){0,2}data: ?"
    rb'\{"jsonrpc": ?"2\.0", ?"id": ?(?:\d{1,20}|"[^"\\]{0,256}"), ?"result":'
)
_ANSWER: Final = re.compile(_START)
_ANSWER_TO_KEY: Final = re.compile(_START + rb' ?\{(?=")')


class EventSplitter:
    """Passes each whole event through `edit`; the result of an answer passes unedited as it comes.

    Args:
        edit: Takes one event with its end, or the beginning of an answer up to its result, and returns it changed.
        to_key: Whether that beginning goes on to the first key of the result.
    """

    def __init__(self, edit: Callable[[bytes], bytes], *, to_key: bool = False) -> None:
        self._edit = edit
        self._answer = _ANSWER_TO_KEY if to_key else _ANSWER
        self._held = bytearray()
        self._passing = False
        self._tail = b""

    @property
    def between_events(self) -> bool:
        return not self._held and not self._passing

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """Take the next bytes and return those that can be passed on now; with `last`, all of them."""
        out: list[bytes] = []
        if self._passing:
            found = _END.search(self._tail + data)
            if found is None:
                self._tail = (self._tail + data)[-3:]
                return data
            end = found.end() - len(self._tail)
            out.append(data[:end])
            data, self._passing = data[end:], False
        held = self._held
        begin, search_from = 0, max(0, len(held) - 3)
        held += data
        while (found := _END.search(held, search_from)) is not None:
            out.append(self._edit(bytes(held[begin : found.end()])))
            begin = search_from = found.end()
        del held[:begin]
        if held:
            self._let_go(out, last)
        return b"".join(out)

    def _let_go(self, out: list[bytes], last: bool) -> None:
        """Pass on the beginning of an event whose rest needs no edit."""
        held, start = self._held, self._answer.match(self._held)
        if start is not None:
            out += (self._edit(start[0]), bytes(held[start.end() :]))
        elif last or len(held) > MAX_HELD_BYTES:
            out.append(bytes(held))
        else:
            return
        self._tail, self._held, self._passing = bytes(held[-3:]), bytearray(), True
