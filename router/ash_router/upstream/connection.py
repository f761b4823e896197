"""One connection to a sandbox: one request at a time, and its answer as it comes.

A sandbox may be hostile. What it says is bounded and parsed strictly, and a connection that says anything out of turn
is closed. A request is never sent twice from here.
"""

from __future__ import annotations

import asyncio
import logging
import select
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from ash_mcp.errors import AshError, HiveFault, RemoteProtocolError, StreamBroken
from ash_mcp.types import Endpoint
from ash_router.bounds import epoll_watches
from ash_router.http.framing import ResponseHead, response_problem
from ash_router.http.heads import SameHead
from ash_router.upstream import liveness

__all__ = ["Connection", "Sink"]

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Who gets the response to one request. After `complete` or `broken` nothing more comes."""

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        """Take what one read brought: the head if it came now, body bytes without their framing, and the end."""
        ...

    def broken(self, error: AshError) -> None:
        """Learn that the response will not be completed."""
        ...


class Connection(asyncio.Protocol):
    """One connection to one sandbox.

    Args:
        endpoint: Where it leads.
        problem_of: Says why an answer is not taken, or None.
    """

    idle_since = 0.0
    _transport: asyncio.Transport | None = None
    _sink: Sink | None = None
    _closed = False
    _sending = False
    _on_pressure: Callable[[bool], None] | None = None
    _same: SameHead | None = None
    """Tells the last answer's head again, if that answer came whole and leaves the connection open."""
    _same_head: ResponseHead | None = None
    _sound_head: ResponseHead | None = None
    """The last head in which `problem_of` found nothing. One with equal headers is this object, and not checked."""
    _reading = False
    """Whether the parser has begun with an answer."""
    _no_body = False
    """Whether the answer ends with its head, whatever that says of a body."""
    _early = b""
    """A head that is known, whose body is still to come."""
    _may_switch = False
    """Whether the request asks for another protocol."""
    _switched = False
    """Whether the connection has another protocol now: all that comes is passed on as it is."""

    def __init__(
        self,
        endpoint: Endpoint,
        release: Callable[[Connection, bool], None],
        *,
        max_head_bytes: int,
        max_headers: int,
        problem_of: Callable[[ResponseHead], str | None] = response_problem,
    ) -> None:
        self.endpoint = endpoint
        self._problem_of = self._problem_now = problem_of
        self._release = release
        self._max_head_bytes = max_head_bytes
        self._max_headers = max_headers
        self._poll = select.poll()
        self._parser = httptools.HttpResponseParser(self)

    def _begin(self) -> None:
        self._reading = True
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._head: ResponseHead | None = None
        self._head_is_new = False
        self._interim = False
        self._parts: list[bytes] = []
        self._complete = False
        self._reusable = False
        self._came: bytes | None = None
        """All of the answer, as long as its head was not passed on."""

    def send(
        self,
        data: bytes,
        sink: Sink,
        *,
        more: bool = False,
        on_pressure: Callable[[bool], None] | None = None,
        is_head: bool = False,
        problem_of: Callable[[ResponseHead], str | None] | None = None,
        may_switch: bool = False,
    ) -> None:
        """Send one request; its response goes to `sink`.

        Args:
            more: The rest of the request follows by `send_more`.
            on_pressure: Learns when the sandbox reads too slowly (True) and when it has caught up.
            is_head: It is a `HEAD`, after whose answer the connection is closed: the parser cannot go on behind it.
            problem_of: Says of this request why its answer is not taken; None: as of every other.
            may_switch: It asks for another protocol. If the answer is a 101, what follows goes to `sink` as it comes,
                and is complete with the end of the connection.
        """
        assert self._transport is not None and self._sink is None
        self._reading, self._early = False, b""
        self._sink = sink
        self._sending = more
        self._on_pressure = on_pressure
        self._no_body = is_head
        self._problem_now = problem_of or self._problem_of
        self._may_switch = may_switch
        self._transport.write(data)

    def send_more(self, data: bytes, *, more: bool) -> None:
        """Send the next part of the request; ignored once its response is complete."""
        self._sending = more
        if self._sink is not None and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def pause(self) -> None:
        """Stop reading the response until `resume`."""
        if self._transport is not None:
            epoll_watches.pause(self._transport)

    def resume(self) -> None:
        if self._transport is None:
            return
        try:
            epoll_watches.resume(self._transport)
        except OSError as exc:
            sink = self._sink
            self.close()
            if sink is not None:
                sink.broken(StreamBroken(f"the hive could not go on reading the sandbox's answer: {exc.strerror}"))

    def expect_life(self, seconds: int) -> None:
        """Have the connection break when the other side's host is silent so long while nothing is under way to it."""
        assert self._transport is not None
        liveness.keep_alive(self._transport.get_extra_info("socket"), seconds)

    def break_if_silent(self, seconds: int) -> None:
        """Break the connection if the other side's host has not taken what is under way to it for so long."""
        assert self._transport is not None
        if not self._closed and liveness.is_silent(self._transport.get_extra_info("socket"), seconds):
            self._transport.abort()

    def close(self) -> None:
        """Close at once, whatever is in flight; the sink hears nothing more. Idempotent."""
        self._sink = None
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def alive(self) -> bool:
        """Whether an idle connection is still good: open, and nothing has come on it, not even its end."""
        return not self._closed and not self._poll.poll(0)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)  # uvloop's own class is no subclass of it
        self._transport = transport
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN | select.POLLRDHUP)

    def data_received(self, data: bytes) -> None:
        sink = self._sink
        if sink is None:
            self.close()  # it speaks out of turn
            return
        if self._switched:
            self._give(sink, None, data, False)
            return
        if not self._reading:
            early, same = self._early, None if self._no_body else self._same
            if early:
                data, self._early = early + data, b""
            body = None if same is None else same.body_of(data)
            if body is not None:
                self._sink = None
                self._release(self, not self._sending)
                self._give(sink, self._same_head, body, True)
                return
            if same is not None and not early and same.is_head_of(data):
                self._early = data
                return
            self._begin()
            self._came = data
        elif self._came is not None:  # in two pieces, as many servers send it, or in more
            self._came = self._came + data if self._head_is_new else None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._switch(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as exc:
            self._refuse(f"the sandbox's answer is not HTTP as it should be: {exc}")
            return
        if self._head is None:
            self._head_bytes += len(data)
            if self._head_bytes > self._max_head_bytes:
                self._refuse("the head of the sandbox's answer is too long")
            return
        self._pass_on()

    def pause_writing(self) -> None:
        if self._on_pressure is not None:
            self._on_pressure(True)

    def resume_writing(self) -> None:
        if self._on_pressure is not None:
            self._on_pressure(False)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        sink, self._sink = self._sink, None
        self._release(self, False)
        if sink is None:
            return
        ends_well = self._switched or (self._reading and self._head is not None and self._ends_with_connection())
        if ends_well and exc is None:
            self._give(sink, None, b"", True)
        else:
            sink.broken(StreamBroken("the connection to the sandbox broke before the call was answered"))

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._complete:
            raise httptools.HttpParserError("bytes follow the end of the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head is not None:
            return  # a trailer
        self._headers.append((name.lower(), value))
        self._head_bytes += len(name) + len(value)
        if len(self._headers) > self._max_headers or self._head_bytes > self._max_head_bytes:
            raise httptools.HttpParserError("its head is too long")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._interim = 100 <= status < 200 and not (status == 101 and self._may_switch)
        if self._interim:
            self._headers = []
            return
        sound = self._sound_head if self._problem_now is self._problem_of else None
        is_known = sound is not None and sound.status == status and sound.headers == self._headers
        self._head = sound if is_known else ResponseHead(status, self._headers)
        self._head_is_new = True
        self._reusable = self._parser.should_keep_alive() and not self._no_body
        self._complete = self._no_body

    def on_body(self, body: bytes) -> None:
        if not self._no_body:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        if not self._interim:
            self._complete = True

    # Inner steps.

    def _switch(self, first: bytes) -> None:
        """Pass on everything from now on, as its 101 says that the protocol is another one."""
        sink, head = self._sink, self._head
        if sink is None or head is None or head.status != 101:
            self._refuse("the sandbox's answer is not HTTP as it should be: it changes the protocol unasked")
            return
        self._switched = True
        self._give(sink, head, first, False)

    def _pass_on(self) -> None:
        """Give the sink what is new; of an answer with a length not before its body begins."""
        sink, head, complete = self._sink, self._head, self._complete
        assert sink is not None and head is not None
        if self._head_is_new and head is not self._sound_head:
            problem = self._problem_now(head)
            if problem is not None:
                self._refuse(problem)
                return
            if self._problem_now is self._problem_of:
                self._sound_head = head
        if self._head_is_new and head.length and not head.is_stream and not self._parts and not complete:
            return
        is_new, self._head_is_new = self._head_is_new, False
        parts, self._parts = self._parts, []
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if complete:
            self._sink = None
            # a 2, so not behind an interim answer
            is_usual = is_new and self._reusable and self._problem_now is self._problem_of
            if is_usual and self._came is not None and self._came.startswith(b"HTTP/1.1 2"):
                self._same, self._same_head = SameHead.of(self._came), head
            # the rest of a request that was answered early must not be taken for the next one
            self._release(self, self._reusable and not self._sending)
        if is_new or data or complete:
            self._give(sink, head if is_new else None, data, complete)

    def _give(self, sink: Sink, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        """Pass on what came; a sink that cannot take it learns that the answer ends, as of any other end."""
        try:
            sink.received(head, data, complete)
        except Exception:
            log.exception("an answer of %s could not be passed on", self.endpoint)
            self.close()
            sink.broken(HiveFault("the hive itself failed; its log has the details"))

    def _refuse(self, message: str) -> None:
        sink = self._sink
        self.close()
        if sink is not None:
            sink.broken(RemoteProtocolError(message))

    def _ends_with_connection(self) -> bool:
        return not any(key in (b"content-length", b"transfer-encoding") for key, _ in self._headers)
