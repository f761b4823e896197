"""The base of the protocol class: reads request heads under limits, asks admission, and writes refusals.

`relay.py` handles admitted requests. Only these two files use uvicorn's private parts; `pyproject.toml` pins its minor
version for them.

A connection has one request at a time. A request pipelined behind an unanswered one is dropped and the connection is
closed after the answer, so that the client sends it again. `Upgrade` is ignored but at doors that take WebSockets.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from enum import Enum, auto
from typing import Any, ClassVar, Final

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ash_mcp.errors import AshError, AshTimeout, CapacityExceeded, ConfigError, HiveFault
from ash_router.admission.base import Admission, Admitted, Head, Refusal
from ash_router.bounds import epoll_watches
from ash_router.bounds.limits import HeadMeter
from ash_router.dataplane import DataPlane
from ash_router.http import framing, responses
from ash_router.http.framing import Headers
from ash_router.http.heads import RequestHead

__all__ = ["BUSY", "Intake", "Phase"]

log = logging.getLogger(__name__)

SAME_HEAD_SECONDS: Final = 0.25
"""How long a verdict holds for the same head on the same connection; a revoked key is refused within two seconds."""


_REFUSED: Final = httptools.HttpParserError
"""What parser callbacks raise on purpose; any other exception in one is a bug."""


class Phase(Enum):
    """The state of a connection: what the next bytes from the caller belong to."""

    HEAD = auto()
    """Idle, or in the middle of a head."""
    ADMITTING = auto()
    """The head is read; a verdict or a look-up of its sandbox is awaited."""
    COLLECTING = auto()
    """The body of a message to `/mcp` is read whole."""
    RELAYING = auto()
    """A call is with its sandbox."""
    PASSING = auto()
    """A request to a sandbox's own endpoint, or another replica's: its body is passed on as it comes."""
    TUNNELLING = auto()
    """A WebSocket is opened or open: all that comes belongs to it."""
    ASGI = auto()
    """The ASGI app has the request."""
    DRAINING = auto()
    """Refused: the answer is written; the rest of the request is read and dropped until the connection closes."""


class _Flow(FlowControl):
    """Flow control that pauses reading without removing the socket from epoll, so its place cannot be lost."""

    def pause_reading(self) -> None:
        if not self.read_paused:
            self.read_paused = True
            epoll_watches.pause(self._transport)

    def resume_reading(self) -> None:
        if self.read_paused:
            self.read_paused = False
            try:
                epoll_watches.resume(self._transport)
            except OSError:
                self._transport.abort()


def _no_place(error: OSError) -> CapacityExceeded:
    return CapacityExceeded(
        f"this hive's host has no room for another connection: {error.strerror}. Processes of the hive's user hold "
        "all that the kernel allows it (fs.epoll.max_user_watches); calls on open connections go on",
        retry_after_seconds=2.0,
    )


BUSY = (Phase.ADMITTING, Phase.COLLECTING, Phase.RELAYING, Phase.PASSING, Phase.TUNNELLING)
"""The phases of a request that the ASGI app does not have."""


class Intake(HttpToolsProtocol):
    """One connection of a caller, up to the verdict on each request."""

    app: Any  # uvicorn leaves its type open
    admission: ClassVar[Admission]
    relay: ClassVar[DataPlane]
    clock: Callable[[], float] = time.monotonic
    """In seconds: how long a verdict holds and a connection idles. A built-in, and so no method."""
    _default_headers: ClassVar[Headers | None] = None
    _default_lines: ClassVar[bytes] = b""

    _phase = Phase.HEAD
    _in_head = False
    _version = "1.1"
    _keep_alive = True
    _pipelined = False
    _received_all = False
    _skipped_upgrade = False
    _wants_upgrade = False
    """Whether the request asks for another protocol, by the parser's word."""
    _resuming = False
    _timer: asyncio.TimerHandle | None = None
    _admitting: asyncio.Task[None] | None = None
    _head: RequestHead
    """The head of the current request, once it is parsed."""
    _last: RequestHead | None = None
    """The last head that was admitted without waiting; its verdict is reused for a moment."""
    _last_verdict: Admitted
    _last_until = 0.0
    _idle_timer: asyncio.TimerHandle | None = None
    """Closes the connection if no request follows a relayed answer in time."""
    _idle_since = 0.0

    @abstractmethod
    def _admitted(self, verdict: Admitted) -> None:
        """Start handling an admitted request; `_body` holds what has arrived of its body."""

    # What asyncio calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._body = bytearray()
        self._meter = HeadMeter(self.relay.limits)
        self.flow = _Flow(transport)
        try:
            epoll_watches.take_place(transport.get_extra_info("socket").fileno())
        except OSError as exc:
            self._keep_alive = False
            self._phase = Phase.DRAINING
            epoll_watches.turn_away(transport, self._refusal(_no_place(exc), 503, ()))
            return
        transport.set_write_buffer_limits(high=self.relay.limits.high_water_bytes)
        self._arm(self.relay.limits.head_timeout_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._admitting is not None:
            self._admitting.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._phase is Phase.DRAINING or self._pipelined:
            return
        was_in_head = self._in_head
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._resume_after_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(error.__context__, _REFUSED):
                self._answer_fault(error.__context__ or error)
                return
            self._parser_stopped(error)
            if self._pipelined:
                self._after_read()  # the request before it may have come in the same read
            return
        if self._in_head and was_in_head and not self._meter.fed(len(data)):
            self._refuse(self.relay.limits.head_exceeded(), 431)
        self._after_read()

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._resuming:
            return
        if self._phase in BUSY or (self._phase is Phase.ASGI and not self.cycle.response_complete):
            self._stop_pipelining()
            raise httptools.HttpParserError("pipelined")
        if self._phase is not Phase.DRAINING:
            super().on_message_begin()
            self._phase = Phase.HEAD
            self._in_head = True
            self._meter.restart()
            self._received_all = False
            self._body = bytearray()
            self._disarm()

    def on_url(self, url: bytes) -> None:
        if not self._resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer, which would come after admission
        name, value = name.lower(), value.rstrip(b" \t")  # the parser leaves what ends a line
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._phase is not Phase.HEAD or self._resuming:
            return
        self._in_head = False
        self._disarm()
        self._version = self.parser.get_http_version()
        lasts = self._version != "1.0" and self.parser.should_keep_alive()
        self._keep_alive = lasts and not self.relay.is_leaving
        method = self.parser.get_method()
        last = self._last
        if last is not None and last.is_same(self._version, method, self.url, self.headers):
            self._head = last
        elif self._is_sound(method):
            self._head = RequestHead(self._version, method, self.url, self.headers)
        else:
            return
        self._wants_upgrade = self.parser.should_upgrade()
        self._skipped_upgrade = self._wants_upgrade and framing.has_body(self.headers)
        self.scope["method"] = method.decode("ascii")
        self.scope["http_version"] = self._version
        self.scope["query_string"] = self.url.partition(b"?")[2]
        verdict = self._verdict_on(self._head)
        if isinstance(verdict, Admitted | Refusal):
            self._apply_verdict(verdict)
        else:
            self._decide_later(self._await_verdict(verdict))

    def _verdict_on(self, head: RequestHead) -> Admitted | Refusal | Awaitable[Admitted | Refusal]:
        held = self._held_verdict(head)
        if held is not None:
            return held
        host, port = self.server or ("", None)
        server = None if port is None else (host, port)
        asked = Head(head.method.decode("ascii"), head.target, head.headers, self.client, server, self)
        verdict = self.admission.admit(asked)
        if isinstance(verdict, Admitted):
            self._last, self._last_verdict = head, verdict
            self._last_until = self.clock() + SAME_HEAD_SECONDS
        return verdict

    def _held_verdict(self, head: RequestHead) -> Admitted | None:
        """Return the verdict if this connection sent an equal head within `SAME_HEAD_SECONDS`, else None.

        Fast path: a client that calls a tool repeatedly sends equal heads.
        """
        return self._last_verdict if head is self._last and self._last_until >= self.clock() else None

    def _is_sound(self, method: bytes) -> bool:
        """Return whether a head is within the limits and unambiguous; refuse the request if not."""
        if not self._meter.fits(self.url, self.headers):
            self._refuse(self.relay.limits.head_exceeded(), 431)
            return False
        problem = framing.check_head(self._version, method, self.url, self.headers)
        if problem is not None:
            self._refuse(ConfigError(problem.message), problem.status)
        return problem is None

    def on_body(self, body: bytes) -> None:
        if self._phase is Phase.ASGI:
            self._disarm()
            super().on_body(body)
        elif self._phase is Phase.ADMITTING:
            self._body += body
            if len(self._body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()

    def on_message_complete(self) -> None:
        if self._skipped_upgrade:
            return  # the parser takes what follows for another protocol; see _resume_after_upgrade
        self._received_all = True
        if self._phase is Phase.ASGI:
            self._disarm()
            super().on_message_complete()
        else:
            self._received_body()

    @abstractmethod
    def _received_body(self) -> None:
        """Called when the body of a request that is not the ASGI app's is complete."""

    def _should_upgrade(self) -> bool:
        return False

    # Admission.

    async def _await_verdict(self, verdict: Awaitable[Admitted | Refusal]) -> None:
        try:
            decided = await verdict
        except Exception:
            log.exception("admission failed")
            decided = Refusal(HiveFault("the hive could not check who you are; its log has the details"))
        if self._phase is Phase.ADMITTING and not self.transport.is_closing():
            self.flow.resume_reading()
            self._apply_verdict(decided)
            self._after_read()

    def _decide_later(self, work: Coroutine[Any, Any, None]) -> None:
        """Let the coroutine `work` decide on the request; if it raises, the caller gets a `hive_fault`."""
        self._phase = Phase.ADMITTING
        self._admitting = self.relay.spawn(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._admitting = None
            self._answer_fault(error)

    def _apply_verdict(self, verdict: Admitted | Refusal) -> None:
        self._admitting = None
        if isinstance(verdict, Refusal):
            self._refuse(verdict.error, verdict.status, verdict.headers)
        else:
            self._admitted(verdict)

    def _continue(self) -> None:
        """Send `100 Continue` to a client that waits for it."""
        if self.expect_100_continue and not self._received_all:
            self.expect_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # Refusing.

    def _refuse(self, error: AshError, status: int | None = None, headers: Sequence[tuple[str, str]] = ()) -> None:
        """Answer with a typed error, then drain the connection."""
        self._keep_alive = False
        if not self.transport.is_closing():
            self.transport.write(self._refusal(error, status, headers))
        self._drain()

    def _refusal(self, error: AshError, status: int | None, headers: Sequence[tuple[str, str]]) -> bytes:
        """Return the whole answer of a refused request."""
        answer = responses.refusal(self, error, status, headers)
        return responses.without_body(answer) if (self.scope or {}).get("method") == "HEAD" else answer

    def _answer_fault(self, error: BaseException) -> None:
        """Answer a request in whose handling the hive failed, or close its connection if the answer may have begun."""
        log.error("a request failed in the hive itself", exc_info=error)
        if self._phase in (Phase.HEAD, Phase.ADMITTING, Phase.COLLECTING):
            self._refuse(HiveFault("the hive itself failed; its log has the details"))
        else:
            self.transport.close()

    def _drain(self) -> None:
        """Read and drop what the client still sends, until it has had time to read the answer; then close."""
        self._phase = Phase.DRAINING
        self._in_head = False
        self._keep_alive = False
        self._disarm()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            try:
                self.transport.write_eof()
            except OSError:  # its client has reset the connection, which asyncio is yet to notice
                self.transport.abort()
                return
        self._timer = self.loop.call_later(self.relay.limits.linger_seconds, self.transport.close)

    def _parser_stopped(self, error: httptools.HttpParserError) -> None:
        if self._pipelined or self._phase is Phase.DRAINING:
            return
        if self._received_all and self._phase in (Phase.RELAYING, Phase.PASSING, Phase.ASGI):
            self._stop_pipelining()  # garbage behind a whole request
            return
        if self._stop_answering():
            self.transport.close()
            return
        if self._admitting is not None:
            self._admitting.cancel()
        self._refuse(ConfigError(f"the request is not HTTP as it should be: {error}"), 400)

    @abstractmethod
    def _stop_answering(self) -> bool:
        """Stop answering the current request; return whether its answer had begun, so that no other can be sent."""

    def _stop_pipelining(self) -> None:
        self._pipelined = True
        self._keep_alive = False
        if self._phase is Phase.ASGI:
            self.cycle.keep_alive = False

    def _resume_after_upgrade(self, rest: bytes) -> None:
        """Parse the body of a request with `Upgrade`, at whose head the parser has stopped."""
        if self._skipped_upgrade and self._phase is not Phase.DRAINING:
            self._skipped_upgrade = False
            self.parser = httptools.HttpRequestParser(self)
            self._resuming = True
            self.parser.feed_data(framing.body_head(self.headers))
            self._resuming = False
        if rest:
            self.data_received(rest)
        else:
            self._after_read()

    # Time.

    def _after_read(self) -> None:
        """Called after each read: arm the timeout of whatever is awaited next."""
        if self._timer is None and self.timeout_keep_alive_task is None:
            if self._phase is Phase.HEAD:
                if self._in_head or self._idle_timer is None:
                    self._arm(self.relay.limits.head_timeout_seconds)
            elif self._phase is Phase.COLLECTING or (self._phase is Phase.ASGI and not self._received_all):
                self._arm(self.relay.limits.body_timeout_seconds)

    def _await_next(self) -> None:
        """Start the keep-alive timeout after a relayed answer; one timer serves many answers."""
        self.server_state.total_requests += 1
        self._idle_since = self.clock()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_idle)

    def _look_idle(self) -> None:
        self._idle_timer = None
        if self._phase is not Phase.HEAD or self._in_head or self.timeout_keep_alive_task is not None:
            return  # it asked for something
        left = self._idle_since + self.timeout_keep_alive - self.clock()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._look_idle)
        else:
            self.transport.close()

    def _arm(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._timed_out)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        self._timer = None
        if self._phase is Phase.HEAD and not self._in_head:
            self.transport.close()  # it never asked for anything
        elif self._phase is Phase.ASGI and self.flow.read_paused:
            self._arm(self.relay.limits.body_timeout_seconds)  # the app is the slow one
        elif self._stop_answering():
            self.transport.close()
        else:
            self._refuse(AshTimeout("the request did not arrive in time; send it again", retryable=True), 408)

    # As the `Caller` of an answer.

    @property
    def takes_chunks(self) -> bool:
        return self._version == "1.1"

    @property
    def keeps_alive(self) -> bool:
        return self._keep_alive

    @property
    def default_lines(self) -> bytes:
        headers = self.server_state.default_headers
        if self._default_headers is not headers:  # uvicorn makes new ones each second
            type(self)._default_headers, type(self)._default_lines = headers, framing.lines_of(headers)
        return self._default_lines

    def write(self, data: bytes) -> None:
        transport = self.transport
        if not transport.is_closing():
            transport.write(data)

    @abstractmethod
    def finished(self) -> None: ...

    @abstractmethod
    def broken_off(self) -> None: ...
