"""The relay at the protocol level: admission and calls to sandboxes below ASGI, all else above it.

This is the only file that knows uvicorn's private parts; `pyproject.toml` pins its minor version for it.

    head ──▶ admitting ──▶ collecting ──▶ relaying ──▶ head     a POST that may be for a sandbox
                  │            └──▶ asgi ──▶ head               and is not
                  ├──▶ asgi                                     everything else
                  └──▶ deaf                                     refused: answered, then closed

One request at a time: what is pipelined behind an unanswered one is dropped, and the connection is closed after the
answer, so the client sends it again. An `Upgrade` is ignored; nothing here speaks WebSocket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from enum import Enum, auto
from typing import Any, ClassVar
from urllib.parse import quote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, service_unavailable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ash_mcp.errors import AshError, AshTimeout, ConfigError, HiveFault
from ash_mcp.wire import MCP_PATH
from ash_router import _framing, answers, bodies
from ash_router._framing import Headers
from ash_router.admission import ADMITTED_KEY, Admission, Admitted, Head, Refusal
from ash_router.calls import Cancellation, LevelChange
from ash_router.dataplane import DataPlane
from ash_router.exchange import Exchange, RelayedCall
from ash_router.limits import HeadMeter, RelayLimits
from ash_router.sessions import INITIALIZE_KEY

__all__ = ["Relay", "RelayLimits"]

log = logging.getLogger(__name__)


class Relay(DataPlane):
    """The data plane of one process, with the protocol class that brings callers to it."""

    def protocol(self, admission: Admission) -> type[asyncio.Protocol]:
        """Return the class to give to `uvicorn.Config(http=...)`, with `admission` before everything."""
        return type("RelayProtocol", (_RelayProtocol,), {"relay": self, "admission": admission})


class _Phase(Enum):
    HEAD = auto()
    """Idle, or in the middle of a head."""
    ADMITTING = auto()
    COLLECTING = auto()
    RELAYING = auto()
    ASGI = auto()
    DEAF = auto()
    """Answered with a refusal; whatever else comes is dropped."""


class _RelayProtocol(HttpToolsProtocol):
    """One connection of a caller. It is also the `Caller` of its exchange."""

    app: Any  # uvicorn leaves its type open
    relay: ClassVar[Relay]
    admission: ClassVar[Admission]

    _phase = _Phase.HEAD
    _in_head = False
    _version = "1.1"
    _keep_alive = True
    _pipelined = False
    _received_all = False
    _skipped_upgrade = False
    _resuming = False
    _verdict: Admitted
    _exchange: Exchange | None = None
    _timer: asyncio.TimerHandle | None = None
    _admitting: asyncio.Task[None] | None = None

    # What asyncio calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._body = bytearray()
        self._meter = HeadMeter(self.relay.limits)
        transport.set_write_buffer_limits(high=self.relay.limits.high_water_bytes)
        self._arm(self.relay.limits.head_timeout_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.caller_left()
        if self._admitting is not None:
            self._admitting.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._phase is _Phase.DEAF or self._pipelined:
            return
        was_in_head = self._in_head
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._resume_after_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            self._parser_stopped(error)
            return
        if self._in_head and was_in_head and not self._meter.fed(len(data)):
            self._refuse(self.relay.limits.head_exceeded(), 431)
        self._arm_for_rest()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._exchange is not None:
            self._exchange.resume()

    # What uvicorn's server calls.

    def shutdown(self) -> None:
        if self._phase in (_Phase.ADMITTING, _Phase.COLLECTING, _Phase.RELAYING):
            self._keep_alive = False
        else:
            super().shutdown()

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._resuming:
            return
        busy = self._phase in (_Phase.ADMITTING, _Phase.COLLECTING, _Phase.RELAYING)
        if busy or (self._phase is _Phase.ASGI and not self.cycle.response_complete):
            self._stop_pipelining()
            raise httptools.HttpParserError("pipelined")
        if self._phase is not _Phase.DEAF:
            super().on_message_begin()
            self._phase = _Phase.HEAD
            self._in_head = True
            self._meter.restart()
            self._received_all = False
            self._disarm()

    def on_url(self, url: bytes) -> None:
        if not self._resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # and not a trailer, which would come after admission
            super().on_header(name, value)
            if not self._meter.line(len(name) + len(value)):
                self._refuse(self.relay.limits.head_exceeded(), 431)

    def on_headers_complete(self) -> None:
        if self._phase is not _Phase.HEAD or self._resuming:
            return
        self._in_head = False
        self._disarm()
        self._version = self.parser.get_http_version()
        self._keep_alive = self._version != "1.0" and self.parser.should_keep_alive()
        method = self.parser.get_method()
        if not self._meter.line(len(self.url)):
            self._refuse(self.relay.limits.head_exceeded(), 431)
            return
        problem = _framing.check_head(self._version, method, self.url, self.headers)
        if problem is not None:
            self._refuse(ConfigError(problem.message), problem.status)
            return
        self._skipped_upgrade = self.parser.should_upgrade() and _framing.has_body(self.headers)
        self.scope["method"] = method.decode("ascii")
        self.scope["http_version"] = self._version
        self.scope["query_string"] = self.url.partition(b"?")[2]
        host, port = self.server or ("", None)
        server = None if port is None else (host, port)
        head = Head(self.scope["method"], self.url, self.headers, self.client, server, self)
        verdict = self.admission.admit(head)
        if isinstance(verdict, Admitted | Refusal):
            self._decided(verdict)
        else:
            self._phase = _Phase.ADMITTING
            self._admitting = self.relay.spawn(self._await_verdict(verdict))

    def on_body(self, body: bytes) -> None:
        if self._phase is _Phase.ASGI:
            super().on_body(body)
        elif self._phase in (_Phase.COLLECTING, _Phase.ADMITTING):
            self._body += body
            if self._phase is _Phase.COLLECTING and len(self._body) > self.relay.limits.max_body_bytes:
                self._refuse(self.relay.limits.body_exceeded(), 413)
            elif self._phase is _Phase.ADMITTING and len(self._body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()

    def on_message_complete(self) -> None:
        if self._skipped_upgrade:
            return  # the parser takes what follows for another protocol; see _resume_after_upgrade
        self._received_all = True
        if self._phase is _Phase.ASGI:
            super().on_message_complete()
        elif self._phase is _Phase.COLLECTING:
            self._collected()

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
            self._arm_for_rest()

    def _decided(self, verdict: Admitted | Refusal) -> None:
        self._admitting = None
        if isinstance(verdict, Refusal):
            self._refuse(verdict.error, verdict.status, verdict.headers)
            return
        self._verdict = verdict
        self.scope[ADMITTED_KEY] = verdict  # type: ignore[typeddict-unknown-key]
        self.scope["path"] = self.root_path + verdict.path
        self.scope["raw_path"] = quote(self.scope["path"]).encode("ascii")
        is_message = self.scope["method"] == "POST" and verdict.path == MCP_PATH
        if is_message and self.relay.calls.needs_body(verdict, self.headers):
            self._collect()
        else:
            self._start_asgi()

    # Reading a message.

    def _collect(self) -> None:
        self._phase = _Phase.COLLECTING
        announced = _framing.content_length(self.headers) or 0
        if max(announced, len(self._body)) > self.relay.limits.max_body_bytes:
            self._refuse(self.relay.limits.body_exceeded(), 413)
            return
        if self.expect_100_continue and not self._received_all:
            self.expect_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._received_all:
            self._collected()

    def _collected(self) -> None:
        self._disarm()
        message = bodies.read_message(bytes(self._body))
        decision = self.relay.calls.decide(self._verdict, self.headers, message) if message is not None else None
        if isinstance(decision, RelayedCall):
            self._phase = _Phase.RELAYING
            self._body = bytearray()
            self._exchange = Exchange(self, decision, self.relay.services, paused=self.flow.write_paused)
            self._exchange.start()
        elif isinstance(decision, Cancellation):
            self.relay.cancelled(decision)
            self.write(answers.accepted(self))
            self.finished()
        else:
            if isinstance(decision, LevelChange):
                self.relay.level_changed(decision)
            if message is not None and message.method == "initialize":
                self.scope[INITIALIZE_KEY] = message.params  # type: ignore[typeddict-unknown-key]
            self._start_asgi()

    # Answering.

    def _start_asgi(self) -> None:
        """Hand the request, with what has been read of its body, to the ASGI app."""
        self._phase = _Phase.ASGI
        busiest, limit = max(len(self.connections), len(self.tasks)), self.limit_concurrency
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=[*self.server_state.default_headers, answers.FROM_HUB],
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=self._keep_alive,
            on_response=self.on_response_complete,
        )
        self.cycle.body, self._body = self._body, bytearray()
        self.cycle.more_body = not self._received_all
        if self._received_all or self.cycle.body:
            self.cycle.message_event.set()
        self._start_asgi_task(self.cycle, self.app if limit is None or busiest < limit else service_unavailable)

    def _refuse(self, error: AshError, status: int | None = None, headers: Sequence[tuple[str, str]] = ()) -> None:
        """Answer with a typed error, and drop whatever the client goes on sending until it has had time to read it."""
        self._phase = _Phase.DEAF
        self._in_head = False
        self._keep_alive = False
        self._disarm()
        if self.transport.is_closing():
            return
        self.transport.write(answers.refusal(self, error, status, headers))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(self.relay.limits.linger_seconds, self.transport.close)

    # As the `Caller` of an exchange.

    @property
    def takes_chunks(self) -> bool:
        return self._version == "1.1"

    @property
    def keeps_alive(self) -> bool:
        return self._keep_alive

    @property
    def default_headers(self) -> Headers:
        return self.server_state.default_headers

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def finished(self) -> None:
        self._exchange = None
        self._phase = _Phase.HEAD
        if self._keep_alive:
            self.on_response_complete()
        else:
            self.transport.close()

    def broken_off(self) -> None:
        self._exchange = None
        self.transport.close()

    # Oddities of the input.

    def _parser_stopped(self, error: httptools.HttpParserError) -> None:
        if self._pipelined or self._phase is _Phase.DEAF:
            return
        if self._phase is _Phase.RELAYING or (self._phase is _Phase.ASGI and self._received_all):
            self._stop_pipelining()  # garbage behind a whole request
            return
        if self._phase is _Phase.ASGI:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        if self._admitting is not None:
            self._admitting.cancel()
        self._refuse(ConfigError(f"the request is not HTTP as it should be: {error}"), 400)

    def _stop_pipelining(self) -> None:
        self._pipelined = True
        self._keep_alive = False
        if self._phase is _Phase.ASGI:
            self.cycle.keep_alive = False

    def _resume_after_upgrade(self, rest: bytes) -> None:
        """Read the body of a request that asked for another protocol, which the parser would not."""
        if self._skipped_upgrade and self._phase is not _Phase.DEAF:
            self._skipped_upgrade = False
            self.parser = httptools.HttpRequestParser(self)
            self._resuming = True
            self.parser.feed_data(_framing.body_head(self.headers))
            self._resuming = False
        if rest:
            self.data_received(rest)
        else:
            self._arm_for_rest()

    def _arm_for_rest(self) -> None:
        if self._timer is None and self.timeout_keep_alive_task is None:
            if self._phase is _Phase.HEAD:
                self._arm(self.relay.limits.head_timeout_seconds)
            elif self._phase is _Phase.COLLECTING:
                self._arm(self.relay.limits.body_timeout_seconds)

    def _arm(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._timed_out)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        self._timer = None
        if self._phase is _Phase.HEAD and not self._in_head:
            self.transport.close()  # it never asked for anything
        else:
            self._refuse(AshTimeout("the request did not arrive in time; send it again", retryable=True), 408)
