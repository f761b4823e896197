"""The relay at the protocol level: calls to sandboxes below ASGI, all else above it.

    head ──▶ admitting ──▶ collecting ──▶ relaying ──▶ head     a POST that may be for a sandbox
                  │            └──▶ asgi ──▶ head               and is not
                  ├──▶ passing ──▶ head                         a sandbox's own endpoint, or another replica's
                  ├──▶ asgi                                     everything else
                  └──▶ deaf                                     refused: answered, then closed

Up to the verdict on a request it is `intake.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import quote

from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from ash_mcp.errors import AshTimeout, SandboxNotFound
from ash_mcp.wire import MCP_PATH
from ash_router import _framing, answers, bodies
from ash_router.admission import ADMITTED_KEY, Admission, Admitted, Refusal
from ash_router.calls import Cancellation, ClientAnswer, LevelChange, RootsChange
from ash_router.dataplane import DataPlane
from ash_router.direct import Door
from ash_router.exchange import Exchange, RelayedCall
from ash_router.forwarding import Forwarder, Forwarding
from ash_router.heads import RequestHead, SameHead
from ash_router.intake import Intake, Phase
from ash_router.limits import RelayLimits
from ash_router.passage import Passage
from ash_router.sessions import INITIALIZE_KEY

__all__ = ["Relay", "RelayLimits"]


class Relay(DataPlane):
    """The data plane of one process, with the protocol class that brings callers to it."""

    def protocol(self, admission: Admission, *, forwards: bool = True) -> type[asyncio.Protocol]:
        """Return the class to give to `uvicorn.Config(http=...)`, with `admission` before everything.

        Args:
            forwards: Whether what belongs to another replica is forwarded to it: not where it was forwarded already.
        """
        kept = {"relay": self, "admission": admission, "forwarder": self.forwarder if forwards else None}
        return type("RelayProtocol", (_RelayProtocol,), kept)


@dataclass(slots=True)
class _Again:
    """A request by which the next one of its connection is known again."""

    same: SameHead
    head: RequestHead
    door: Door | Refusal | None = None
    """Where such a request goes, for whom and as long as the routes are those of then."""
    found_for: Admitted | None = None
    found_at: int = 0


class _RelayProtocol(Intake):
    """One connection of a caller. It is also the `Caller` of its exchange and the `Sender` of its passage."""

    forwarder: ClassVar[Forwarder | None]

    _verdict: Admitted
    _exchange: Exchange | Passage | None = None
    _passage: Passage | None = None
    """The same as `_exchange` while its request still comes."""
    _passed = 0
    """Bytes of the body of its request."""
    _looked_for: object = None
    """The scope of the request for which other processes were asked last."""
    _again: _Again | None = None
    """The last request, if it was one to a sandbox and came whole."""
    _told: tuple[RequestHead, bytes] | None = None
    """For whom a sandbox is asked, of the head that says so in part."""

    # What asyncio calls.

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        self._passage = None
        if exchange is not None:
            exchange.caller_left()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        is_first = self._phase is Phase.HEAD and not self._in_head and not self._pipelined
        if is_first and self._again is not None:
            body = self._again.same.body_of(data)
            if body is not None and self._take_again(self._again, body):
                return
        super().data_received(data)
        if is_first and self._received_all and self._phase in (Phase.RELAYING, Phase.PASSING):
            same = SameHead.of(data) if self._keep_alive and not self._pipelined else None
            self._again = None if same is None else _Again(same, self._head)

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
        if self._phase in (Phase.ADMITTING, Phase.COLLECTING, Phase.RELAYING, Phase.PASSING):
            self._keep_alive = False
            if isinstance(self._exchange, Passage):
                self._exchange.stopping()
        elif self._phase is Phase.ASGI and self._head.method == b"GET" and self._verdict.path == MCP_PATH:
            self.transport.close()  # a stream of the handshake era that only listens would never end by itself
        else:
            super().shutdown()

    # What the parser calls.

    def on_body(self, body: bytes) -> None:
        if self._passage is not None:
            self._passed += len(body)
            if self._passed > self.relay.limits.max_direct_body_bytes:
                self._direct_body_exceeded()
                return
            self._passage.body(body)
        elif self._phase is Phase.COLLECTING:
            self._body += body
            if len(self._body) > self.relay.limits.max_body_bytes:
                self._refuse(self.relay.limits.body_exceeded(), 413)
        else:
            super().on_body(body)

    def _received_body(self) -> None:
        if self._phase is Phase.COLLECTING:
            self._collected()
        elif self._passage is not None:
            self._passage.body_ended()

    def _read_over(self) -> None:
        super()._read_over()
        if self._passage is not None:
            self._passage.flush()

    # From the verdict on.

    def _take_again(self, again: _Again, body: bytes) -> bool:
        """Take a whole request with the same head as the last one's, if it is one to a sandbox as that was.

        False leaves all to the parser: what is no such request, or not surely one.
        """
        head, verdict = again.head, self._held_verdict(again.head)
        if verdict is None or len(body) > self.relay.limits.max_body_bytes:
            return False
        routes_at = self.relay.routes.changes
        if again.found_for is not verdict or again.found_at != routes_at:
            again.door = self.relay.door(verdict, head.method.decode("ascii"), head)
            again.found_for, again.found_at = verdict, routes_at
        door, call = again.door, None
        if door is None:
            message = bodies.read_message(body)
            call = self.relay.calls.decide(verdict, head, message) if message is not None else None
        if not isinstance(door, Door) and not isinstance(call, RelayedCall):
            return False
        self._unset_keepalive_if_required()
        self._disarm()
        self._verdict, self._head = verdict, head
        self._received_all = True
        if isinstance(door, Door):
            self._phase = Phase.PASSING
            passage = self._exchange = self._passage = self._passage_to(door)
            passage.start_whole(body)
        elif isinstance(call, RelayedCall):
            self._relay(call)
        return True

    def _admitted(self, verdict: Admitted) -> None:
        self._verdict = verdict
        door = self.relay.door(verdict, self.scope["method"], self._head)
        if isinstance(door, Door):
            self._pass(self._passage_to(door))
            return
        if door is not None:
            if not (isinstance(door.error, SandboxNotFound) and self._look_up(self._admitted_again)):
                self._refuse(door.error, door.status, door.headers)
            return
        if self.forwarder is not None and self._is_forwarded(self.forwarder):
            return
        self.scope[ADMITTED_KEY] = verdict  # type: ignore[typeddict-unknown-key]
        self.scope["path"] = self.root_path + verdict.path
        self.scope["raw_path"] = quote(self.scope["path"]).encode("ascii")
        is_message = self.scope["method"] == "POST" and verdict.path == MCP_PATH
        if is_message and self.relay.calls.needs_body(verdict, self._head):
            self._collect()
        elif not (is_message and self.relay.calls.misses(verdict, self._head) and self._look_up(self._admitted_again)):
            self._start_asgi()

    # A sandbox that is not known here.

    def _look_up(self, then: Callable[[], None]) -> bool:
        """Have `then` decide anew after other processes' routes were looked up, once for each request."""
        if not self.relay.looks_up or self._looked_for is self.scope:
            return False
        self._looked_for = self.scope
        self._phase = Phase.ADMITTING
        self._admitting = self.relay.spawn(self._decide_after_look(then))
        return True

    async def _decide_after_look(self, then: Callable[[], None]) -> None:
        error = await self.relay.look_up()
        if self.transport.is_closing():
            return
        self._admitting = None
        self.flow.resume_reading()
        door = self.relay.door(self._verdict, self.scope["method"], self._head)
        if error is not None and isinstance(door, Refusal):
            self._refuse(error, 503)
        else:
            then()  # what is no door the hive's own endpoint answers, and says what it knows
        self._read_over()

    def _admitted_again(self) -> None:
        self._admitted(self._verdict)

    def _is_forwarded(self, forwarder: Forwarder) -> bool:
        forward = forwarder.forward_of(self._verdict, self.scope["method"], self._head.fields)
        if forward is None:
            return False
        services, paused = self.relay.services, self.flow.write_paused
        self._pass(Forwarding(self, forward, self._head, forwarder, services, paused=paused))
        return True

    # A sandbox's own endpoint, or another replica's.

    def _passage_to(self, door: Door) -> Passage:
        if self._told is None or self._told[0] is not self._head:
            client = self.client[0] if self.client is not None else ""
            self._told = self._head, _framing.forwarded(self._head.headers, client, self.scheme or "http")
        services, paused = self.relay.services, self.flow.write_paused
        return Passage(self, door, self._head, self._told[1], services, paused=paused)

    def _pass(self, passage: Passage) -> None:
        announced = self._head.fields.get(b"content-length")
        if announced is not None and int(announced) > self.relay.limits.max_direct_body_bytes:
            self._direct_body_exceeded()
            return
        self._phase = Phase.PASSING
        self._passed = 0
        self._continue()
        self._exchange = self._passage = passage
        passage.start()
        body, self._body = bytes(self._body), bytearray()
        if body:
            self.on_body(body)
        if self._received_all:  # before a verdict that took its time
            passage.body_ended()

    def pause_reading(self) -> None:
        self.flow.pause_reading()

    def resume_reading(self) -> None:
        self.flow.resume_reading()

    def request_stalled(self) -> None:
        self._stop_passage()
        self._refuse(AshTimeout("the request did not arrive in time; send it again"), 408)

    def _direct_body_exceeded(self) -> None:
        if self._stop_passage():
            self.transport.close()
        else:
            self._refuse(self.relay.limits.direct_body_exceeded(), 413)

    def _answer_begun(self) -> bool:
        if self._phase is Phase.PASSING:
            return self._stop_passage()
        if self._phase is not Phase.ASGI:
            return False
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        return self.cycle.response_started

    def _stop_passage(self) -> bool:
        passage, self._passage, self._exchange = self._passage, None, None
        if passage is not None:
            passage.caller_left()
        return passage is not None and passage.begun

    # Reading a message.

    def _collect(self) -> None:
        self._phase = Phase.COLLECTING
        announced = _framing.content_length(self.headers) or 0
        if max(announced, len(self._body)) > self.relay.limits.max_body_bytes:
            self._refuse(self.relay.limits.body_exceeded(), 413)
            return
        self._continue()
        if self._received_all:
            self._collected()

    def _collected(self) -> None:
        self._disarm()
        message = bodies.read_message(bytes(self._body))
        decision = None
        if message is not None:
            decision = self.relay.calls.decide(self._verdict, self._head, message)
            if (
                decision is None
                and self.relay.calls.misses(self._verdict, self._head, message)
                and self._look_up(self._collected)
            ):
                return
        if isinstance(decision, RelayedCall):
            self._relay(decision)
        elif isinstance(decision, Cancellation | ClientAnswer):
            self._body = bytearray()
            self.relay.tell(decision)
            self.write(answers.accepted(self))
            self.finished()
        else:
            if isinstance(decision, LevelChange):
                self.relay.level_changed(decision)
            elif isinstance(decision, RootsChange):
                self.relay.roots_changed(decision)
            if message is not None and message.method == "initialize":
                self.scope[INITIALIZE_KEY] = message.params  # type: ignore[typeddict-unknown-key]
            self._start_asgi()

    def _relay(self, call: RelayedCall) -> None:
        self._phase = Phase.RELAYING
        self._body = bytearray()
        exchange = self._exchange = Exchange(self, call, self.relay.services, paused=self.flow.write_paused)
        exchange.start()

    # Answering.

    def _start_asgi(self) -> None:
        """Hand the request, with what has been read of its body, to the ASGI app."""
        self._phase = Phase.ASGI
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

    @property
    def keeps_alive(self) -> bool:
        return self._keep_alive and (self._received_all or self._phase is not Phase.PASSING)

    def finished(self) -> None:
        self._exchange = self._passage = None
        if self._phase is Phase.PASSING and not self._received_all:
            self._turn_deaf()
            return
        self._phase = Phase.HEAD
        if self._keep_alive:
            if self.flow.read_paused:
                self.flow.resume_reading()
            self._await_next()
        else:
            self.transport.close()

    def broken_off(self) -> None:
        self._exchange = self._passage = None
        self.transport.close()
