"""A sandbox's answer on its way to one caller: its head made anew, its body framed anew, an end in every case. No I/O.

What this returns is to be written to the caller, in order.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Protocol

from ash_router import _framing, answers
from ash_router._framing import Headers, ResponseHead
from ash_router.answers import Caller

__all__ = ["EventEditor", "Reply"]


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
        headers: Ours, beside the sandbox's own.
        passes_session: Whether the id of a session on the sandbox itself reaches the caller.
        editor: Makes what edits the answer if it is an event stream; None passes it on as it comes.
    """

    def __init__(
        self,
        caller: Caller,
        headers: Headers,
        *,
        passes_session: bool = False,
        editor: Callable[[], EventEditor] | None = None,
    ) -> None:
        self._caller = caller
        self._headers = headers
        self._passes_session = passes_session
        self._make_editor = editor
        self._editor: EventEditor | None = None
        self._waiting: list[bytes] = []
        self._chunked = False
        self._fixed_length = False
        self._is_stream = False
        self._tail = b""
        self.begun = False
        self.nonce = ""

    def frame(self, head: ResponseHead | None, data: bytes, complete: bool) -> bytes:
        """Take what came from the sandbox and return it as it goes to the caller."""
        out = b""
        if head is not None:
            self._read(head)
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
        self._waiting.append(event)
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

    def _read(self, head: ResponseHead) -> None:
        kind = _framing.one(head.headers, b"content-type")
        self._is_stream = kind is not None and kind.lower().startswith(b"text/event-stream")
        if self._is_stream and self._make_editor is not None:
            self._editor = self._make_editor()

    def _begin(self, head: ResponseHead, whole_length: int | None) -> bytes:
        self.begun = True
        returned, ours = self._said(head)
        length = whole_length
        if length is None and self._editor is None:  # what is edited may become longer
            length = _framing.content_length(head.headers)
        if head.status != 204:
            if length is not None:
                self._fixed_length = True
                ours.append((b"content-length", b"%d" % length))
            elif self._caller.takes_chunks:
                self._chunked = True
                ours.append((b"transfer-encoding", b"chunked"))
        return answers.head(self._caller, head.status, returned, ours, self._headers)

    def _said(self, head: ResponseHead) -> tuple[Headers, list[tuple[bytes, bytes]]]:
        """Return what passes of the answer's own headers, and what we say of it."""
        self.nonce = secrets.token_hex(16)
        returned = _framing.wanted_response_headers(head.headers, session=self._passes_session)
        return returned, [answers.FROM_SANDBOX, (answers.NONCE, self.nonce.encode())]

    def _let_in(self, data: bytes) -> bytes:
        if self._waiting and self._editor is not None and self._editor.between_events:
            data += b"".join(self._waiting)
            self._waiting.clear()
        return data
