"""Rewrites a sandbox's answer for its caller: a new head, new body framing, and a proper end in every case. No I/O.

The bytes that it returns must be written to the caller in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from ash_router.calls.door import CALL_HEADERS, HeaderPolicy
from ash_router.http import framing, responses
from ash_router.http.framing import ResponseHead
from ash_router.http.responses import Caller

__all__ = ["EventEditor", "PassedReply", "Reply"]

_STREAM_LINES: Final = framing.status_line(200) + framing.lines_of(
    [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache, no-transform")]
)
_CHUNKED: Final = b"transfer-encoding: chunked\r\n"
_LINE_ENDS_TO_SPACES: Final = bytes.maketrans(b"\r\n", b"  ")
_OF_SANDBOX: Final = framing.lines_of([responses.FROM_SANDBOX, (responses.NONCE, b"%b")])


class EventEditor(Protocol):
    """Edits the events of a stream as it passes."""

    @property
    def between_events(self) -> bool:
        """Whether the stream stands between two events, so that one may be injected."""
        ...

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """Take the next bytes and return those that can be passed on now."""
        ...


class Reply:
    """One answer, of which `frame` rewrites each piece.

    Args:
        lines: Header lines that the hive adds.
        headers: Which headers of the sandbox's answer reach the caller.
        editor: Makes the editor of the answer, told whether it comes as events; None passes it on unchanged.
    """

    _editor: EventEditor | None = None
    _pending_events: list[bytes] | None = None
    """Injected events that wait for the end of the event that is passing."""
    _chunked = False
    _fixed_length = False
    _begun_early = False
    """Whether the hive began the stream before the sandbox answered."""
    _wraps = False
    """Whether the sandbox's answer is one JSON message, which becomes an event of that stream."""
    _tail = b""
    begun = False
    is_stream = False
    nonce = b""

    def __init__(
        self,
        caller: Caller,
        lines: bytes = b"",
        *,
        headers: HeaderPolicy = CALL_HEADERS,
        editor: Callable[[bool], EventEditor | None] | None = None,
    ) -> None:
        self._caller = caller
        self._lines = lines
        self._headers = headers
        self._make_editor = editor

    def frame(self, head: ResponseHead | None, data: bytes, complete: bool) -> bytes:
        """Take the next piece of the sandbox's answer and return it as it goes to the caller."""
        if self._begun_early:
            data = self._as_events(head, data, complete)
        elif head is not None and complete and self._make_editor is None:
            return self._begin(head, len(data)) + data
        out = b""
        if head is not None:
            self.is_stream = head.is_stream or self._begun_early
            if self._make_editor is not None:
                self._editor = self._make_editor(self.is_stream)
        if self._editor is not None:
            data = self._editor.feed(data, last=complete)
            data = self._with_pending_events(data)
        if head is not None and not self._begun_early:
            out = self._begin(head, len(data) if complete else None)
        if self.is_stream:
            self._tail = framing.sse_tail(self._tail, data)
        if not self._chunked:
            return out + data
        if data:
            out += framing.chunk(data)
        return out + framing.LAST_CHUNK if complete else out

    def inject_event(self, event: bytes) -> bytes:
        """Add an event to an edited stream: now, or as soon as the event that is passing has ended."""
        self._pending_events = [*(self._pending_events or ()), event]
        if not self.begun or not self._chunked or self._editor is None:
            return b""
        data = self._with_pending_events(b"")
        self._tail = framing.sse_tail(self._tail, data)
        return framing.chunk(data) if data else b""

    def takes(self, head: ResponseHead) -> bool:
        """Return whether an answer with this head can go into what was begun before it came."""
        return not self._begun_early or head.is_stream or head.is_json

    def append_event(self, event: bytes) -> bytes:
        """Add an event of the hive's own where the sandbox is silent, in a stream that is begun for it if need be.

        Returns:
            Nothing where the answer can take no event now.
        """
        if not self._caller.takes_chunks:
            return b""
        out = b""
        if not self.begun:
            self.begun = self._begun_early = self.is_stream = self._chunked = True
            self.nonce = responses.new_nonce()
            out = responses.passed_head(self._caller, _STREAM_LINES, _OF_SANDBOX % self.nonce, _CHUNKED, self._lines)
        elif not self._between_events():
            return b""
        self._tail = framing.sse_tail(self._tail, event)
        return out + framing.chunk(event)

    def _between_events(self) -> bool:
        if not (self.is_stream and self._chunked) or (self._editor is not None and not self._editor.between_events):
            return False
        return framing.between_events(self._tail)

    def _as_events(self, head: ResponseHead | None, data: bytes, complete: bool) -> bytes:
        """Return a piece of the sandbox's answer as it goes into a stream that was begun before."""
        start = b""
        if head is not None and not head.is_stream:
            self._wraps, start = True, b"event: message\ndata: "
        if not self._wraps:
            return data
        return start + data.translate(_LINE_ENDS_TO_SPACES) + (b"\n\n" if complete else b"")

    def cut(self, message: bytes | None) -> bytes | None:
        """Return the bytes that end an answer which has begun; None if only closing the connection can end it.

        Args:
            message: The JSON-RPC answer to the caller's request; None just ends the stream.
        """
        if not self.is_stream or self._fixed_length:
            return None
        event = b"" if message is None else framing.sse_event(self._tail, message)
        if not self._chunked:
            return event
        return framing.chunk(event) + framing.LAST_CHUNK if event else framing.LAST_CHUNK

    def _begin(self, head: ResponseHead, whole_length: int | None) -> bytes:
        self.begun = True
        length, framing = whole_length, b""
        if length is None and self._editor is None:  # an edited body may become longer
            length = head.length
        if head.status not in (204, 304):
            if length is not None:
                self._fixed_length = True
                framing = b"content-length: %d\r\n" % length
            elif self._caller.takes_chunks:
                self._chunked = True
                framing = _CHUNKED
        return responses.passed_head(self._caller, *self._said(head), framing, self._lines)

    def _said(self, head: ResponseHead) -> tuple[bytes, bytes]:
        """Return the lines that pass of the sandbox's head, and the lines that the hive adds about it."""
        nonce = self.nonce = responses.new_nonce()
        return self._headers.response_lines(head), _OF_SANDBOX % nonce

    def _with_pending_events(self, data: bytes) -> bytes:
        if self._pending_events and self._editor is not None and self._editor.between_events:
            data += b"".join(self._pending_events)
            self._pending_events = None
        return data


class PassedReply(Reply):
    """An answer that is not MCP: nothing is ever added to its body, and one that breaks off is cut off.

    Args:
        is_head: It answers a `HEAD`: the length that its head has is that of a body which does not come.
    """

    def __init__(
        self, caller: Caller, lines: bytes = b"", *, headers: HeaderPolicy = CALL_HEADERS, is_head: bool = False
    ) -> None:
        super().__init__(caller, lines, headers=headers)
        self._is_head = is_head

    def cut(self, message: bytes | None) -> bytes | None:
        del message
        return None

    def _begin(self, head: ResponseHead, whole_length: int | None) -> bytes:
        if not self._is_head:
            return super()._begin(head, whole_length)
        self.begun = True
        length = b"" if head.length is None else b"content-length: %d\r\n" % head.length
        return responses.passed_head(self._caller, *self._said(head), length, self._lines)
