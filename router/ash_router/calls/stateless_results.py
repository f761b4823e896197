"""Makes a handshake-era server's answer one of the stateless era, where each result names its type. No I/O."""

from __future__ import annotations

import re
from typing import Final

from ash_router.http.event_stream import EventSplitter

__all__ = ["StatelessResults"]

MAX_HELD_BYTES: Final = 4096
"""The most that is held of a JSON answer whose result has not begun; it then passes as it is."""
_TYPE: Final = b'"resultType":"complete",'
# What stands before a result at the top of a message, in whatever order a server writes it.
_RESULT: Final = (
    rb'\{\s*(?:"(?:jsonrpc|id)"\s*:\s*(?:"(?:[^"\\]|\\.){0,1024}"|-?\d{1,20}|null)\s*,\s*){0,4}'
    rb'"result"\s*:\s*\{'
)
_IN_JSON: Final = re.compile(rb"\s*" + _RESULT + rb'(?=\s*")')
_IN_EVENT: Final = re.compile(rb"(?:^|[\r\n])data: ?" + _RESULT + rb'(?=\s*"|$)')


class StatelessResults:
    """The `EventEditor` of one answer to a stateless call.

    Args:
        is_stream: Whether it comes as events, or else as one JSON message.
    """

    def __init__(self, is_stream: bool) -> None:
        self._splitter = EventSplitter(_typed, to_key=True) if is_stream else None
        self._held: bytes | None = b""
        """The beginning of a JSON message; None once it has passed."""

    @property
    def between_events(self) -> bool:
        return self._splitter is None or self._splitter.between_events

    def feed(self, data: bytes, *, last: bool) -> bytes:
        if self._splitter is not None:
            return self._splitter.feed(data, last=last)
        if self._held is None:
            return data
        self._held += data
        found = _IN_JSON.match(self._held)
        if found is None and not last and len(self._held) <= MAX_HELD_BYTES:
            return b""
        begun, self._held = self._held, None
        return begun if found is None else begun[: found.end()] + _TYPE + begun[found.end() :]


def _typed(event: bytes) -> bytes:
    found = _IN_EVENT.search(event)
    return event if found is None else event[: found.end()] + _TYPE + event[found.end() :]
