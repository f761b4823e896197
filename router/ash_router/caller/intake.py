"""The reading side of a caller's connection: heads under limits, admission before everything, refusals.

What an admitted request becomes is `relay.py`'s. These two are the only files that know uvicorn's private parts;
`pyproject.toml` pins its minor version for them.

One request at a time: what is pipelined behind an unanswered one is dropped, and the connection is closed after the
answer, so the client sends it again. An `Upgrade` is ignored; nothing here speaks WebSocket.
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Awaitable, Sequence
from enum import Enum, auto
from typing import Any, ClassVar, Final

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ash_mcp.errors import AshError, AshTimeout, ConfigError, HiveFault
from ash_router import _framing, answers
from ash_router._framing import Headers
from ash_router.admission import Admission, Admitted, Head, Refusal
from ash_router.dataplane import DataPlane
from ash_router.heads import RequestHead
from ash_router.limits import HeadMeter

__all__ = ["Intake", "Phase"]

log = logging.getLogger(__name__)

SAME_HEAD_SECONDS: Final = 0.25
"""How long a verdict holds for the same head on the same connection; a revoked key is refused within two seconds."""


class Phase(Enum):
    """What the bytes are that come next on a connection."""

    HEAD = auto()
    """Idle, or in the middle of a head."""
    ADMITTING = auto()
    COLLECTING = auto()
    RELAYING = auto()
    PASSING = auto()
    ASGI = auto()
    DEAF = auto()
    """Answered with a refusal; whatever else comes is dropped."""


_BUSY = (Phase.ADMITTING, Phase.COLLECTING, Phase.RELAYING, Phase.PASSING)


class Intake(HttpToolsProtocol):
    """One connection of a caller, up to the verdict on each request."""

    app: Any  # uvicorn leaves its type open
    admission: ClassVar[Admission]
    relay: ClassVar[DataPlane]
    _default_headers: ClassVar[Headers | None] = None
    _default_lines: ClassVar[bytes] = b""

    _phase = Phase.HEAD
    _in_head = False
    _version = "1.1"
    _keep_alive = True
    _pipelined = False
    _received_all = False
    _skipped_upgrade = False
    _resuming = False
    _timer: asyncio.TimerHandle | None = None
    _admitting: asyncio.Task[None] | None = None
    _head: RequestHead
    """Of the request that is read, once it is there."""
    _last: RequestHead | None = None
    """The last head of this connection that was admitted at once."""
    _last_verdict: Admitted
    _last_until = 0.0
    _idle_timer: asyncio.TimerHandle | None = None
    """Looks whether the client has asked for nothing more after a relayed answer."""
    _idle_since = 0.0

    @abstractmethod
    def _admitted(self, verdict: Admitted) -> None:
        """Begin with an admitted request, of whose body `_body` holds what has come."""

    # What asyncio calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._body = bytearray()
        self._meter = HeadMeter(self.relay.limits)
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
        if self._phase is Phase.DEAF or self._pipelined:
            return
        was_in_head = self._in_head
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._resume_after_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            self._parser_stopped(error)
            if self._pipelined:
                self._read_over()  # the request before it may have come in the same read
            return
        if self._in_head and was_in_head and not self._meter.fed(len(data)):
            self._refuse(self.relay.limits.head_exceeded(), 431)
        self._read_over()

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._resuming:
            return
        if self._phase in _BUSY or (self._phase is Phase.ASGI and not self.cycle.response_complete):
            self._stop_pipelining()
            raise httptools.HttpParserError("pipelined")
        if self._phase is not Phase.DEAF:
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
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._phase is not Phase.HEAD or self._resuming:
            return
        self._in_head = False
        self._disarm()
        self._version = self.parser.get_http_version()
        self._keep_alive = self._version != "1.0" and self.parser.should_keep_alive()
        method = self.parser.get_method()
        last = self._last
        if last is not None and last.is_same(self._version, method, self.url, self.headers):
            self._head = last
        elif self._is_sound(method):
            self._head = RequestHead(self._version, method, self.url, self.headers)
        else:
            return
        self._skipped_upgrade = self.parser.should_upgrade() and _framing.has_body(self.headers)
        self.scope["method"] = method.decode("ascii")
        self.scope["http_version"] = self._version
        self.scope["query_string"] = self.url.partition(b"?")[2]
        verdict = self._verdict_on(self._head)
        if isinstance(verdict, Admitted | Refusal):
            self._decided(verdict)
        else:
            self._phase = Phase.ADMITTING
            self._admitting = self.relay.spawn(self._await_verdict(verdict))

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
            self._last_until = self.loop.time() + SAME_HEAD_SECONDS
        return verdict

    def _held_verdict(self, head: RequestHead) -> Admitted | None:
        """Return the verdict on a head that this connection sent a moment ago.

        Whoever calls a tool again and again sends the same head. A verdict that could be another by now is asked for.
        """
        return self._last_verdict if head is self._last and self._last_until >= self.loop.time() else None

    def _is_sound(self, method: bytes) -> bool:
        """Say whether a head is within its bounds and can be read in one way only; one that is not is refused."""
        if not self._meter.fits(self.url, self.headers):
            self._refuse(self.relay.limits.head_exceeded(), 431)
            return False
        problem = _framing.check_head(self._version, method, self.url, self.headers)
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
        """Learn that the whole body of a request has come that is not the app's."""

    def _should_upgrade(self) -> bool:
        return False

    # Admission.

    async def _await_verdict(self, verdict: Awaitable[Admitted | Refusal]) -> None:
        try:
            decided = await verdict
        except Exception:
            log.exception("admission failed")
            decided = Refusal(HiveFault("the hive could not check who you are; its log has the details"))
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self._decided(decided)
            self._read_over()

    def _decided(self, verdict: Admitted | Refusal) -> None:
        self._admitting = None
        if isinstance(verdict, Refusal):
            self._refuse(verdict.error, verdict.status, verdict.headers)
        else:
            self._admitted(verdict)

    def _continue(self) -> None:
        """Tell a client that waits for it to send its body."""
        if self.expect_100_continue and not self._received_all:
            self.expect_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # Refusing.

    def _refuse(self, error: AshError, status: int | None = None, headers: Sequence[tuple[str, str]] = ()) -> None:
        """Answer with a typed error, and hear no more."""
        self._keep_alive = False
        if not self.transport.is_closing():
            self.transport.write(answers.refusal(self, error, status, headers))
        self._turn_deaf()

    def _turn_deaf(self) -> None:
        """Drop whatever the client goes on sending until it has had time to read its answer, then close."""
        self._phase = Phase.DEAF
        self._in_head = False
        self._keep_alive = False
        self._disarm()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(self.relay.limits.linger_seconds, self.transport.close)

    def _parser_stopped(self, error: httptools.HttpParserError) -> None:
        if self._pipelined or self._phase is Phase.DEAF:
            return
        if self._received_all and self._phase in (Phase.RELAYING, Phase.PASSING, Phase.ASGI):
            self._stop_pipelining()  # garbage behind a whole request
            return
        if self._answer_begun():
            self.transport.close()
            return
        if self._admitting is not None:
            self._admitting.cancel()
        self._refuse(ConfigError(f"the request is not HTTP as it should be: {error}"), 400)

    @abstractmethod
    def _answer_begun(self) -> bool:
        """Say whether an answer has begun to a request that turns out to be none, and stop making one."""

    def _stop_pipelining(self) -> None:
        self._pipelined = True
        self._keep_alive = False
        if self._phase is Phase.ASGI:
            self.cycle.keep_alive = False

    def _resume_after_upgrade(self, rest: bytes) -> None:
        """Read the body of a request that asked for another protocol, which the parser would not."""
        if self._skipped_upgrade and self._phase is not Phase.DEAF:
            self._skipped_upgrade = False
            self.parser = httptools.HttpRequestParser(self)
            self._resuming = True
            self.parser.feed_data(_framing.body_head(self.headers))
            self._resuming = False
        if rest:
            self.data_received(rest)
        else:
            self._read_over()

    # Time.

    def _read_over(self) -> None:
        """Do what follows the last byte that is there now."""
        if self._timer is None and self.timeout_keep_alive_task is None:
            if self._phase is Phase.HEAD:
                if self._in_head or self._idle_timer is None:
                    self._arm(self.relay.limits.head_timeout_seconds)
            elif self._phase is Phase.COLLECTING or (self._phase is Phase.ASGI and not self._received_all):
                self._arm(self.relay.limits.body_timeout_seconds)

    def _await_next(self) -> None:
        """Wait for the next request, as long as uvicorn does after an answer of the app's, with one timer for many."""
        self.server_state.total_requests += 1
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_idle)

    def _look_idle(self) -> None:
        self._idle_timer = None
        if self._phase is not Phase.HEAD or self._in_head or self.timeout_keep_alive_task is not None:
            return  # it asked for something
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
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
        elif self._answer_begun():
            self.transport.close()
        else:
            self._refuse(AshTimeout("the request did not arrive in time; send it again", retryable=True), 408)

    # As the one to whom answers are written.

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
            type(self)._default_headers, type(self)._default_lines = headers, _framing.lines_of(headers)
        return self._default_lines

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    @abstractmethod
    def finished(self) -> None: ...

    @abstractmethod
    def broken_off(self) -> None: ...
