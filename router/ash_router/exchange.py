"""One relayed call, from the decision to relay it to the last byte of its answer.

    reaching ──▶ waiting ──▶ streaming ──▶ done
        └───────────┴────────────┴──▶ done, by `fail` or `caller_left`

Until the answer has begun, a failure is a whole JSON answer of the hive's. After that it is one more event on an
event stream, with the nonce of the response's own head, or a connection cut short. The call is sent once; the only
second sending is to a sandbox that said with 404 that it did not know the session and so did not take the first.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

from ash_mcp.errors import (
    AshError,
    AshTimeout,
    ConnectFailed,
    HiveFault,
    RemoteProtocolError,
    SandboxError,
)
from ash_mcp.wire import HEADER_TOKEN
from ash_router import _framing, answers
from ash_router._framing import Headers, ResponseHead
from ash_router.answers import Caller
from ash_router.asking import SessionEvents
from ash_router.bodies import RequestId
from ash_router.connection import Connection
from ash_router.handshakes import Handshakes
from ash_router.heads import RequestHead
from ash_router.ledger import Call, Ledger
from ash_router.limits import RelayLimits
from ash_router.reply import EventEditor, Reply
from ash_router.rounds import Rounds
from ash_router.routes import Route
from ash_router.sessions import LegacySession, UpstreamSession
from ash_router.streams import OpenStreams
from ash_router.tokens import CallTokens
from ash_router.upstream import Upstreams

__all__ = ["Exchange", "RelayedCall", "Services", "explained"]

log = logging.getLogger(__name__)

_TOKEN_LINE: Final = b"%b: %%b\r\n" % HEADER_TOKEN.encode()
# What goes with a call of its caller's headers, but for those that are ours to set.
_OF_CALL: Final = _framing.TO_CALL - {b"mcp-name"}
_OF_SESSION_CALL: Final = _OF_CALL - {b"mcp-method", b"mcp-protocol-version"}


@dataclass(slots=True, eq=False, kw_only=True)
class RelayedCall:
    """A call that goes to a sandbox."""

    route: Route
    request_id: RequestId
    head: RequestHead
    """The caller's own."""
    body: bytes
    """As the sandbox will get it."""
    tool: str
    """The sandbox's own name for it."""
    session: LegacySession | None = None
    """In the handshake era."""
    hold: AbstractContextManager[None] | None = None
    """Keeps the hub's own transport session alive meanwhile."""


@dataclass(frozen=True, slots=True)
class Services:
    """What every exchange of a relay shares."""

    upstreams: Upstreams
    handshakes: Handshakes
    tokens: CallTokens
    ledger: Ledger
    limits: RelayLimits
    streams: OpenStreams
    rounds: Rounds
    explain: Callable[[Route], Awaitable[AshError]]
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Exchange:
    """A `Sink` between one sandbox and one caller.

    Args:
        paused: Whether the caller is slow already, with answers before this one that it has not read yet.
    """

    _entry: Call | None = None
    _connection: Connection | None = None
    _task: asyncio.Task[None] | None = None
    _last_byte_at = 0.0
    _upstream: UpstreamSession | None = None
    _renewed = False
    _done = False

    def __init__(self, caller: Caller, call: RelayedCall, services: Services, *, paused: bool = False) -> None:
        self._caller = caller
        self._call = call
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._paused = paused
        editor = self._editor if call.session is not None else None
        self._reply = Reply(caller, _framing.lines_of(self._session_header()), editor=editor)

    def start(self) -> None:
        """Send the call, at once where a connection is idle."""
        call, services = self._call, self._services
        if services.ledger.of_owner(call.route.owner) >= services.limits.max_in_flight_per_owner:
            self.fail(services.limits.in_flight_exceeded())
            return
        self._entry = services.ledger.begin(call.route.sandbox_id, call.route.owner, self.fail)
        if call.hold is not None:
            call.hold.__enter__()
        if services.limits.idle_stream_seconds is not None:
            self._last_byte_at = self._loop.time()
            services.rounds.enter(self)
        self._reach()

    def fail(self, error: AshError) -> None:
        """End the caller's answer with `error` at once; no-op if it has ended."""
        if self._done:
            return
        self._end()
        if not self._reply.begun:
            failure = self._failure(error, None)
            self._caller.write(answers.whole_failure(self._caller, failure, error, self._session_header()))
            self._caller.finished()
            return
        rest = self._reply.cut(self._failure(error, self._reply.nonce))
        if rest is None:
            self._caller.broken_off()
        else:
            self._caller.write(rest)
            self._caller.finished()

    def caller_left(self) -> None:
        """Stop: nobody waits any more. Closing the connection is how a stateless call is cancelled."""
        if not self._done:
            self._end()

    def pause(self) -> None:
        """Stop reading the sandbox's answer: the caller is slow."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._paused = False
        if self._connection is not None:
            self._connection.resume()

    # The sandbox's answer.

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        if complete:
            self._connection = None
        self._last_byte_at = self._loop.time()
        if head is not None and head.status == 404 and self._renew_session():
            return
        out = self._reply.frame(head, data, complete)
        if out:
            self._caller.write(out)
        if complete:
            self._end()
            self._caller.finished()

    def broken(self, error: AshError) -> None:
        self._connection = None
        self._run(self._fail_explained(error))

    # Reaching the sandbox.

    def _reach(self) -> None:
        session, route = self._call.session, self._call.route
        if session is not None:
            self._upstream = session.upstreams.get((route.sandbox_id, route.generation))
        if session is None or self._upstream is not None:
            connection = self._services.upstreams.idle(route)
            if connection is not None:
                self._send(connection)
                return
        self._run(self._connect())

    async def _connect(self) -> None:
        services, call = self._services, self._call
        try:
            if call.session is not None and self._upstream is None:
                self._upstream = await services.handshakes.session_on(call.session, call.route)
            connection = services.upstreams.idle(call.route) or await services.upstreams.connect(call.route)
        except (ConnectFailed, RemoteProtocolError) as error:
            await self._fail_explained(error)
            return
        except AshError:
            await self._fail_explained(ConnectFailed("the sandbox opened no session for the call; nothing was sent"))
            return
        self._send(connection)

    def _send(self, connection: Connection) -> None:
        call = self._call
        token = self._services.tokens.mint(call.route.sandbox_id, call.route.generation)
        ours = _TOKEN_LINE % token
        if self._upstream is None:
            lines = call.head.lines(_OF_CALL)
            ours += b"mcp-name: %b\r\n" % _framing.encode_name(call.tool)
        else:
            assert call.session is not None
            lines = call.head.lines(_OF_SESSION_CALL)
            ours += self._upstream.lines()
            call.session.calls[call.request_id] = self._upstream
            self._upstream.voices[self] = self.say
        self._connection = connection
        connection.send(_framing.request_head(b"POST", len(call.body), lines, ours) + call.body, self)
        if self._paused:
            connection.pause()

    def _renew_session(self) -> bool:
        """Open a new upstream session and send the call again, if the sandbox did not know the old one."""
        session, lost = self._call.session, self._upstream
        if session is None or lost is None or lost.id is None or self._renewed:
            return False
        self._renewed = True
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        key = (self._call.route.sandbox_id, self._call.route.generation)
        if session.upstreams.get(key) is lost:
            session.forget(key)
        lost.voices.pop(self, None)
        self._reach()
        return True

    # Answering the caller.

    def say(self, event: bytes) -> None:
        """Put an event that is of this call's session, though not of its own answer, into the answer's stream."""
        out = self._reply.say(event)
        if out:
            self._caller.write(out)

    def _editor(self) -> EventEditor:
        call = self._call
        assert call.session is not None and self._upstream is not None
        return SessionEvents(call.session, self._upstream)

    def _session_header(self) -> Headers:
        session = self._call.session
        return [] if session is None else [(b"mcp-session-id", session.id.encode())]

    def _failure(self, error: AshError, nonce: bytes | None) -> bytes:
        is_modern = self._call.session is None
        return answers.failure(self._call.request_id, error, nonce=nonce, is_modern=is_modern)

    # Failing and ending.

    async def _fail_explained(self, error: AshError) -> None:
        """Fail with why the sandbox is gone, where the hive knows it, otherwise with `error`."""
        if isinstance(error, RemoteProtocolError):
            self.fail(error)
        else:
            self.fail(await explained(self._services, self._call.route, error))

    def look(self, now: float) -> None:
        """Look after a sandbox that is silent for too long."""
        idle = self._services.limits.idle_stream_seconds or math.inf
        if self._last_byte_at + idle <= now:
            self.fail(AshTimeout(f"the sandbox sent nothing for {idle:g} s"))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = self._services.spawn(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.exception("a relayed call failed in the hive itself")
            self.fail(HiveFault("the hive itself failed; its log has the details"))

    def _end(self) -> None:
        """Let go of everything that the call holds."""
        self._done = True
        call = self._call
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        if self._upstream is not None:
            self._upstream.voices.pop(self, None)
        if call.session is not None and call.session.calls.get(call.request_id) is self._upstream:
            call.session.calls.pop(call.request_id, None)
        if self._entry is None:
            return  # it was never let in
        self._services.rounds.leave(self)
        self._services.ledger.end(self._entry)
        if call.hold is not None:
            call.hold.__exit__(None, None, None)


async def explained(services: Services, route: Route, error: AshError) -> AshError:
    """Return why a sandbox is gone, where the hive knows it in time, otherwise `error`."""
    try:
        async with asyncio.timeout(services.limits.explain_timeout_seconds):
            said = await services.explain(route)
    except TimeoutError:
        log.warning("nobody could say in time why sandbox %s went away", route.sandbox_id)
        return error
    # A call that was sent may have run; no explanation may tell the caller that it did not.
    fits = isinstance(said, SandboxError) if isinstance(error, ConnectFailed) else not said.retryable
    return said if fits else error
