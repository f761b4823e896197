"""A sandbox's answer on its way to one caller: its head made anew, its body framed anew, an end in every case. No I/O.

What this returns is to be written to the caller, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from ash_router import _framing, answers
from ash_router._framing import ResponseHead
from ash_router.answers import Caller

__all__ = ["EventEditor", "Reply"]

_OF_SANDBOX: Final = _framing.lines_of([answers.FROM_SANDBOX, (answers.NONCE, b"%b")])


class EventEditor(Protocol):
    """Changes events of a stream while it passes."""

    @property
    def between_events(self) -> bool:
        """Whether another event may be put in here."""
        ...

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """Take what came and return what may be passed on now."""
        ...


class Reply:
    """One answer.

    Args:
        lines: Ours, beside the sandbox's own headers.
        kept: Which of those reach the caller.
        editor: Makes what edits the answer if it is an event stream; None passes it on as it comes.
    """

    _editor: EventEditor | None = None
    _waiting: list[bytes] | None = None
    """Events of ours that stand in line."""
    _chunked = False
    _fixed_length = False
    _is_stream = False
    _tail = b""
    begun = False
    nonce = b""

    def __init__(
        self,
        caller: Caller,
        lines: bytes = b"",
        *,
        kept: frozenset[bytes] = _framing.FROM_CALL,
        editor: Callable[[], EventEditor] | None = None,
    ) -> None:
        self._caller = caller
        self._lines = lines
        self._kept = kept
        self._make_editor = editor

    def frame(self, head: ResponseHead | None, data: bytes, complete: bool) -> bytes:
        """Take what came from the sandbox and return it as it goes to the caller."""
        if head is not None and complete and self._make_editor is None:
            return self._begin(head, len(data)) + data
        out = b""
        if head is not None:
            self._is_stream = head.is_stream
            if head.is_stream and self._make_editor is not None:
                self._editor = self._make_editor()
        if self._editor is not None:
            data = self._editor.feed(data, last=complete)
            data = self._let_in(data)
        if head is not None:
            out = self._begin(head, len(data) if complete else None)
        if self._is_stream:
            self._tail = _framing.sse_tail(self._tail, data)
        if not self._chunked:
            return out + data
        if data:
            out += _framing.chunk(data)
        return out + _framing.LAST_CHUNK if complete else out

    def say(self, event: bytes) -> bytes:
        """Put an event of our own into an edited stream, now or as soon as the one that is passing has ended."""
        self._waiting = [*(self._waiting or ()), event]
        if not self.begun or not self._chunked or self._editor is None:
            return b""
        data = self._let_in(b"")
        self._tail = _framing.sse_tail(self._tail, data)
        return _framing.chunk(data) if data else b""

    def cut(self, message: bytes | None) -> bytes | None:
        """End an answer that has begun, if that can be said in it; None: only the end of the connection can.

        Args:
            message: Answers the caller's request; without one the stream just ends.
        """
        if not self._is_stream or self._fixed_length:
            return None
        event = b"" if message is None else _framing.sse_event(self._tail, message)
        if not self._chunked:
            return event
        return _framing.chunk(event) + _framing.LAST_CHUNK if event else _framing.LAST_CHUNK

    def _begin(self, head: ResponseHead, whole_length: int | None) -> bytes:
        self.begun = True
        length, framing = whole_length, b""
        if length is None and self._editor is None:  # what is edited may become longer
            length = head.length
        if head.status != 204:
            if length is not None:
                self._fixed_length = True
                framing = b"content-length: %d\r\n" % length
            elif self._caller.takes_chunks:
                self._chunked = True
                framing = b"transfer-encoding: chunked\r\n"
        return answers.passed_head(self._caller, *self._said(head), framing, self._lines)

    def _said(self, head: ResponseHead) -> tuple[bytes, bytes]:
        """Return what passes of the answer's own head, and the lines that we say of it."""
        nonce = self.nonce = answers.new_nonce()
        return head.lines(self._kept), _OF_SANDBOX % nonce

    def _let_in(self, data: bytes) -> bytes:
        if self._waiting and self._editor is not None and self._editor.between_events:
            data += b"".join(self._waiting)
            self._waiting = None
        return data
