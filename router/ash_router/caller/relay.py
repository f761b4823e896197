"""The relay: a uvicorn protocol class that sends calls to sandboxes itself and gives all else to the ASGI app.

    head ──▶ admitting ──▶ collecting ──▶ relaying ──▶ head     a POST that may be for a sandbox
                  │            └──▶ asgi ──▶ head               and is not
                  ├──▶ passing ──▶ head                         a sandbox's own endpoint, or another replica's
                  ├──▶ tunnelling                               a WebSocket to a sandbox, until either side closes
                  ├──▶ asgi                                     everything else
                  └──▶ draining                                 refused: answered, then closed

Reading heads and admission are in the base class, `intake.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Final
from urllib.parse import quote

from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from ash_mcp.errors import AshError, AshTimeout, ConfigError, ConnectFailed, PermissionDenied, SandboxNotFound
from ash_mcp.wire import MCP_PATH
from ash_router.admission.base import ADMITTED_KEY, Admission, Admitted, Refusal
from ash_router.bounds.limits import RelayLimits
from ash_router.caller.intake import BUSY, Intake, Phase
from ash_router.calls.classifier import Cancellation, ClientAnswer, LevelChange, RootsChange
from ash_router.calls.direct import DirectRequest
from ash_router.calls.exchange import Exchange, RelayedCall
from ash_router.calls.passage import Passage
from ash_router.calls.tunnel import Tunnel
from ash_router.dataplane import SILENT_SECONDS, DataPlane
from ash_router.http import bodies, framing, responses, websocket
from ash_router.http.heads import RequestHead, SameHead
from ash_router.replicas.forwarding import Forward, Forwarder, Forwarding
from ash_router.sessions.session_gate import INITIALIZE_KEY
from ash_router.upstream import liveness

__all__ = ["Relay", "RelayLimits", "RelayProtocol"]

_HIVE_WORK: Final = 40
"""The weight in `Turns` of a request to the hive itself, where a call weighs 1. It takes the time of about 10 calls,
in some 25 turns of the loop; with a smaller weight several of one principal would run at once and lengthen each."""


class Relay(DataPlane):
    """The data plane of one process, with the protocol class that brings callers to it."""

    @property
    def protocol_class(self) -> type[RelayProtocol]:
        """The class of its callers' connections."""
        return RelayProtocol

    def protocol(self, admission: Admission, *, forwards: bool = True) -> type[asyncio.Protocol]:
        """Return the class to give to `uvicorn.Config(http=...)`, with `admission` before everything.

        Args:
            forwards: Whether to forward requests of sessions that live on other replicas; false on the internal
                listener, which takes what they forward.
        """
        attributes = {"relay": self, "admission": admission, "forwarder": self.forwarder if forwards else None}
        return type("RelayProtocol", (self.protocol_class,), attributes)


@dataclass(slots=True)
class _RepeatableRequest:
    """The last request of a connection. Fast path: one with an equal head (`SameHead`) is not parsed again."""

    same: SameHead
    head: RequestHead
    direct: DirectRequest | Refusal | None = None
    """Cached result of `Relay.direct_request`. Good for `found_for` and while `Routes.changes` equals `found_at`."""
    found_for: Admitted | None = None
    found_at: int = 0


class RelayProtocol(Intake):
    """One connection of a caller. It is also the `Caller` of its exchange and the `Sender` of its passage."""

    forwarder: ClassVar[Forwarder | None]

    _verdict: Admitted
    _exchange: Exchange | Passage | None = None
    _passage: Passage | None = None
    """The same as `_exchange`, while the request's body is still arriving."""
    _passed_bytes = 0
    """How many bytes of its passage's body have arrived."""
    _looked_up_for: object = None
    """The ASGI scope of the last request whose sandbox was looked up in the store: at most one look-up each."""
    _body_counted_for: str | None = None
    """The principal in whose quota of unfinished bodies this request's body is counted."""
    _body_counted_bytes = 0
    _repeatable: _RepeatableRequest | None = None
    """Set if the last request went to a sandbox and arrived in one read."""
    _forwarded_cache: tuple[RequestHead, bytes] | None = None
    """The head of the last direct request, and the `x-forwarded-…` lines that were made from it."""

    # What asyncio calls.

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        self._passage = None
        self._uncount_body()
        if self._phase is Phase.ASGI:
            self.relay.services.turns.leave(self._verdict.principal.subject, self)
        if exchange is not None:
            exchange.caller_left()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        try:
            phase, repeatable = self._phase, self._repeatable
            if phase is Phase.TUNNELLING:
                self._tunnel(data)
                return
            is_first = phase is Phase.HEAD and not self._in_head and not self._pipelined
            if is_first and repeatable is not None:
                body = repeatable.same.body_of(data)
                if body is not None and self._take_repeated(repeatable, body):
                    return
            super().data_received(data)
            if is_first:
                self._note_repeatable(data)
        except Exception as error:
            self._answer_fault(error)

    def _tunnel(self, data: bytes) -> None:
        if isinstance(self._exchange, Tunnel):
            self._exchange.body(data)
            self._exchange.flush()

    def _note_repeatable(self, data: bytes) -> None:
        if self._received_all and self._phase in (Phase.RELAYING, Phase.PASSING):
            same = SameHead.of(data) if self._keep_alive and not self._pipelined else None
            self._repeatable = None if same is None else _RepeatableRequest(same, self._head)

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
        if self._phase in BUSY:
            self._keep_alive = False
            if isinstance(self._exchange, Passage):
                self._exchange.stopping()
        elif self._phase is Phase.ASGI and self._head.method == b"GET" and self._verdict.path == MCP_PATH:
            self.transport.close()  # a handshake-era GET stream never ends by itself
        else:
            super().shutdown()

    # What the parser calls.

    def on_body(self, body: bytes) -> None:
        if self._passage is not None:
            self._passed_bytes += len(body)
            most = self._passage.max_body_bytes
            if most is not None and self._passed_bytes > most:
                self._direct_body_exceeded(most)
                return
            self._passage.body(body)
        elif self._phase is Phase.COLLECTING:
            self._body += body
            if len(self._body) > self.relay.limits.max_body_bytes:
                self._refuse(self.relay.limits.body_exceeded(), 413)
            elif self._body_counted_for is not None:
                self._body_counted_bytes += len(body)
                self._grow_body(len(body))
        else:
            super().on_body(body)

    def _received_body(self) -> None:
        if self._phase is Phase.COLLECTING:
            self._collected()
        elif self._passage is not None:
            self._passage.body_ended()

    def _after_read(self) -> None:
        if self._phase is Phase.COLLECTING and self._body_counted_for is None:
            self._count_body()
        super()._after_read()
        if self._passage is not None:
            self._passage.flush()

    # From the verdict on.

    def _take_repeated(self, repeatable: _RepeatableRequest, body: bytes) -> bool:
        """Handle a request whose head equals the last one's without parsing the head again.

        Returns:
            False if it does not surely go to a sandbox; nothing was done then, and the parser gets the bytes.
        """
        relay, head, size = self.relay, repeatable.head, len(body)
        verdict, limits = self._held_verdict(head), relay.limits
        if verdict is None or relay.is_leaving or size > limits.max_body_bytes or size > limits.max_direct_body_bytes:
            return False
        changes = relay.routes.changes
        if repeatable.found_for is not verdict or repeatable.found_at != changes:
            repeatable.direct = relay.direct_request(verdict, head.method.decode("ascii"), head)
            repeatable.found_for, repeatable.found_at = verdict, changes
        taken = repeatable.direct
        if taken is None:
            message = bodies.read_message(body)
            taken = relay.classifier.classify(verdict, head, message) if message is not None else None
        is_call = isinstance(taken, RelayedCall)
        if not is_call and not isinstance(taken, DirectRequest):
            return False
        self._unset_keepalive_if_required()
        if self._timer is not None:
            self._disarm()
        self._verdict, self._head = verdict, head
        self._received_all = True
        if is_call:
            self._relay(taken)
        else:
            self._phase = Phase.PASSING
            passage = self._exchange = self._passage = self._passage_to(taken)
            passage.start_whole(body)
        return True

    def _admitted(self, verdict: Admitted) -> None:
        self._verdict = verdict
        direct = self.relay.direct_request(verdict, self.scope["method"], self._head)
        if isinstance(direct, DirectRequest):
            self._take_direct(direct)
            return
        if direct is not None:
            if not (isinstance(direct.error, SandboxNotFound) and self._look_up(self._readmit)):
                self._refuse(direct.error, direct.status, direct.headers)
            return
        if self.forwarder is not None and self._try_forward(self.forwarder):
            return
        self._enter(verdict)

    def _take_direct(self, direct: DirectRequest) -> None:
        takes = direct.door.websocket
        if takes != "ignored" and self._wants_upgrade and websocket.asks_for_one(self._head):
            self._open_tunnel(direct)
        elif takes == "required":
            self._refuse(ConfigError("this is a WebSocket: open one here"), 426, (("upgrade", "websocket"),))
        else:
            self._pass(self._passage_to(direct))

    def _enter(self, verdict: Admitted) -> None:
        """Take a request to the hive's own endpoints."""
        self.scope[ADMITTED_KEY] = verdict  # type: ignore[typeddict-unknown-key]
        self.scope["path"] = self.root_path + verdict.path
        self.scope["raw_path"] = quote(self.scope["path"]).encode("ascii")
        if self.scope["method"] == "POST" and verdict.path == MCP_PATH:
            self._collect()
        else:
            self._start_asgi()

    # Looking up a sandbox that this process does not know.

    def _look_up(self, then: Callable[[], None]) -> bool:
        """Fetch other processes' routes, then call `then` to decide anew; False if that was done for this request."""
        if not self.relay.looks_up or self._looked_up_for is self.scope:
            return False
        self._looked_up_for = self.scope
        self._decide_later(self._decide_after_lookup(then))
        return True

    async def _decide_after_lookup(self, then: Callable[[], None]) -> None:
        error = await self.relay.look_up()
        if self._phase is not Phase.ADMITTING or self.transport.is_closing():
            return  # the request was refused meanwhile, or its caller left
        self._admitting = None
        self.flow.resume_reading()
        direct = self.relay.direct_request(self._verdict, self.scope["method"], self._head)
        if error is not None and isinstance(direct, Refusal):
            self._refuse(error, 503 if isinstance(error, ConnectFailed) else None)
        else:
            then()  # a call to a sandbox that is still unknown goes to the ASGI app, which explains it
        self._after_read()

    def _readmit(self) -> None:
        self._admitted(self._verdict)

    def _try_forward(self, forwarder: Forwarder) -> bool:
        """Forward the request, or reopen its session, if that lives on another replica; False if it does not."""
        forward = forwarder.forward_of(self._verdict, self.scope["method"], self._head.fields)
        if forward is None:
            return False
        session_id = forward.session_id
        if self.relay.has_session(self._verdict, session_id):
            return False  # the session was reopened here
        if forwarder.is_reached(forward.replica):
            self._forward(forwarder, forward)
        else:
            self._decide_later(self._reopen_or_forward(forwarder, forward, session_id))
        return True

    def _forward(self, forwarder: Forwarder, forward: Forward) -> None:
        services, paused = self.relay.services, self.flow.write_paused
        self._pass(Forwarding(self, forward, self._head, forwarder, services, paused=paused))

    async def _reopen_or_forward(self, forwarder: Forwarder, forward: Forward, session_id: str) -> None:
        """Take up the session if its replica is gone; otherwise, or if that fails, forward the request to it."""
        is_reopened = await forwarder.is_gone(forward.replica) and await self.relay.reopen(self._verdict, session_id)
        if self._phase is not Phase.ADMITTING or self.transport.is_closing():
            return  # the request was refused meanwhile, or its caller left
        self._admitting = None
        self.flow.resume_reading()
        if is_reopened:
            self._enter(self._verdict)
        else:
            self._forward(forwarder, forward)  # to a replica that is gone: it answers that there is no such session
        self._after_read()

    # Passing a request to a sandbox's own endpoint, or to another replica.

    def _passage_to(self, direct: DirectRequest) -> Passage:
        services, paused = self.relay.services, self.flow.write_paused
        forwarded = b"" if direct.start else self._forwarded_lines()
        return Passage(self, direct, self._head, forwarded, services, paused=paused)

    def _forwarded_lines(self) -> bytes:
        if self._forwarded_cache is None or self._forwarded_cache[0] is not self._head:
            client = self.client[0] if self.client is not None else ""
            forwarded = framing.forwarded(self._head.headers, client, self._seen_scheme)
            self._forwarded_cache = self._head, forwarded
        return self._forwarded_cache[1]

    @property
    def _seen_scheme(self) -> str:
        """By which the caller sees the hive: a proxy before it may speak https for a preview."""
        preview = self._verdict.preview
        return preview.scheme if preview is not None else self.scheme or "http"

    def _pass(self, passage: Passage) -> None:
        announced = self._head.fields.get(b"content-length")
        most = passage.max_body_bytes
        if announced is not None and most is not None and int(announced) > most:
            self._direct_body_exceeded(most)
            return
        self._phase = Phase.PASSING
        self._passed_bytes = 0
        self._continue()
        self._exchange = self._passage = passage
        passage.start()
        body, self._body = bytes(self._body), bytearray()
        if body:
            self.on_body(body)
        if self._received_all:  # the whole body arrived while the verdict was awaited
            passage.body_ended()

    def pause_reading(self) -> None:
        self.flow.pause_reading()

    def resume_reading(self) -> None:
        self.flow.resume_reading()

    def request_stalled(self) -> None:
        self._stop_passage()
        self._refuse(AshTimeout("the request did not arrive in time; send it again"), 408)

    def _direct_body_exceeded(self, most: int) -> None:
        if self._stop_passage():
            self.transport.close()
        else:
            self._refuse(self.relay.limits.direct_body_exceeded(most), 413)

    def _stop_answering(self) -> bool:
        if self._phase is Phase.PASSING:
            return self._stop_passage()
        if self._phase is not Phase.ASGI:
            return False
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        return self.cycle.response_started

    def _stop_passage(self) -> bool:
        """Drop the passage as if its caller had left; return whether its answer had begun."""
        passage, self._passage, self._exchange = self._passage, None, None
        if passage is not None:
            passage.caller_left()
        return passage is not None and passage.begun

    # Passing a WebSocket.

    def _open_tunnel(self, direct: DirectRequest) -> None:
        self._keep_alive = False
        if self._pipelined:  # what came meanwhile was dropped
            self._refuse(ConfigError("what follows a WebSocket's handshake has to wait for the answer to it"), 400)
            return
        self._phase = Phase.TUNNELLING
        with suppress(OSError):  # on a Unix socket
            liveness.keep_alive(self.transport.get_extra_info("socket"), SILENT_SECONDS)
        services, paused = self.relay.services, self.flow.write_paused
        tunnel = self._exchange = Tunnel(self, direct, self._head, self._forwarded_lines(), services, paused=paused)
        tunnel.start()
        tunnel.flush()

    def refusal_now(self) -> AshError | Awaitable[AshError | None] | None:
        verdict = self._verdict_on(self._head)
        return self._refusal_of(verdict) if isinstance(verdict, Admitted | Refusal) else self._refusal_later(verdict)

    async def _refusal_later(self, verdict: Awaitable[Admitted | Refusal]) -> AshError | None:
        return self._refusal_of(await verdict)

    def _refusal_of(self, verdict: Admitted | Refusal) -> AshError | None:
        if isinstance(verdict, Refusal):
            return None if verdict.status == 503 else verdict.error  # who knows the credential is away
        if verdict.principal.subject != self._verdict.principal.subject:
            return PermissionDenied("the credential is another principal's now")
        direct = self.relay.direct_request(verdict, self.scope["method"], self._head)
        # a route that is not known may be so for a moment; the end of a sandbox ends its WebSockets by itself
        return direct.error if isinstance(direct, Refusal) and not isinstance(direct.error, SandboxNotFound) else None

    def has_vanished(self) -> bool:
        return liveness.is_silent(self.transport.get_extra_info("socket"), SILENT_SECONDS)

    # Collecting the body of a message to `/mcp`.

    def _collect(self) -> None:
        problem = framing.content_problem(self._head.fields)
        if problem is not None:
            self._refuse(ConfigError(problem.message), problem.status)
            return
        self._phase = Phase.COLLECTING
        announced = framing.content_length(self.headers) or 0
        if max(announced, len(self._body)) > self.relay.limits.max_body_bytes:
            self._refuse(self.relay.limits.body_exceeded(), 413)
            return
        self._continue()
        if self._received_all:
            self._collected()

    def _count_body(self) -> None:
        """Count a body that did not arrive in one read in its principal's quota of unfinished bodies."""
        principal, size = self._verdict.principal, len(self._body)
        # an owner can make many guests, and each would have room for as many bodies as an owner
        owner = principal.guests or principal.subject
        if self.relay.unfinished.begin(owner):
            self._body_counted_for, self._body_counted_bytes = owner, size
            self._grow_body(size)
        else:
            self._refuse(self.relay.limits.unfinished_exceeded())

    def _grow_body(self, size: int) -> None:
        assert self._body_counted_for is not None
        if not self.relay.unfinished.grow(self._body_counted_for, size):
            self._refuse(self.relay.limits.unfinished_exceeded())

    def _uncount_body(self) -> None:
        owner, self._body_counted_for = self._body_counted_for, None
        if owner is not None:
            self.relay.unfinished.end(owner, self._body_counted_bytes)

    def _drain(self) -> None:
        self._uncount_body()
        self._body = bytearray()
        super()._drain()

    def _collected(self) -> None:
        self._uncount_body()
        self._disarm()
        message = bodies.read_message(bytes(self._body))
        if message is None:
            self._body = bytearray()
            self.write(responses.unreadable(self))
            self.finished()
            return
        decision = self.relay.classifier.classify(self._verdict, self._head, message)
        if (
            decision is None
            and self.relay.classifier.may_be_unknown_sandbox(self._verdict, self._head, message)
            and self._look_up(self._collected)
        ):
            return
        if isinstance(decision, RelayedCall):
            self._relay(decision)
        elif isinstance(decision, Cancellation | ClientAnswer):
            self._body = bytearray()
            self.relay.tell(decision)
            self.write(responses.accepted(self))
            self.finished()
        else:
            if isinstance(decision, LevelChange):
                self.relay.level_changed(decision)
            elif isinstance(decision, RootsChange):
                self.relay.roots_changed(decision)
            if message.method == "initialize":
                self.scope[INITIALIZE_KEY] = message.params  # type: ignore[typeddict-unknown-key]
            self._start_asgi()

    def _relay(self, call: RelayedCall) -> None:
        self._phase = Phase.RELAYING
        self._body = bytearray()
        exchange = self._exchange = Exchange(self, call, self.relay.services, paused=self.flow.write_paused)
        exchange.start()

    # Answering.

    def _start_asgi(self) -> None:
        """Give the request, with the body read so far, to the ASGI app when its principal's turn comes."""
        self._phase = Phase.ASGI
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=[*self.server_state.default_headers, responses.FROM_HUB],
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=self._keep_alive,
            on_response=self.on_response_complete,
        )
        self.cycle.body, self._body = self._body, bytearray()
        self.cycle.more_body = not self._received_all
        if self._received_all or self.cycle.body:
            self.cycle.message_event.set()
        work = _HIVE_WORK if self._verdict.path == MCP_PATH else 1
        self.relay.services.turns.take(self._verdict.principal.subject, self, work)

    def begin(self) -> None:
        """Start the ASGI app; called by `Turns` in the principal's turn."""
        busiest, limit = max(len(self.connections), len(self.tasks)), self.limit_concurrency
        self._start_asgi_task(self.cycle, self.app if limit is None or busiest < limit else service_unavailable)

    @property
    def keeps_alive(self) -> bool:
        return self._keep_alive and (self._received_all or self._phase is not Phase.PASSING)

    def finished(self) -> None:
        """The answer is complete: await the next request, or drain the rest of this one, or close."""
        self._exchange = self._passage = None
        if not self._received_all or self._phase is Phase.TUNNELLING:
            self._drain()
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
