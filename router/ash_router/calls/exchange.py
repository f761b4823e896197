"""One relayed call, from the decision to relay it to the last byte of its answer.

    queued ──▶ reaching ──▶ waiting ──▶ streaming ──▶ done
       └───────────┴───────────┴────────────┴──▶ done, by `fail` or `caller_left`

The call is sent once. The one exception: if the sandbox answers 404 because it does not know the session, it has not
run the call, and the call is sent again in a new session. A sandbox without a runner is spoken to in the handshake era
also for a stateless caller, in a session that the call borrows.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from ash_mcp.errors import (
    AshError,
    AshTimeout,
    CapacityExceeded,
    ConnectFailed,
    RemoteProtocolError,
    Unsupported,
)
from ash_mcp.types import Principal
from ash_mcp.wire import RUNNER_TOOL_PREFIX
from ash_router.calls.door import CALL_HEADERS, HeaderPolicy
from ash_router.calls.sandbox_exchange import SandboxExchange, Services
from ash_router.calls.sandbox_response import EventEditor, Reply
from ash_router.calls.stateless_results import StatelessResults
from ash_router.http import framing, responses
from ash_router.http.bodies import Message, RequestId
from ash_router.http.framing import Headers, ResponseHead
from ash_router.http.heads import RequestHead
from ash_router.http.responses import Caller
from ash_router.routes import Route
from ash_router.sessions.server_requests import SessionEvents
from ash_router.sessions.session_map import Era, LegacySession, UpstreamSession, era_of
from ash_router.upstream.connection import Connection

__all__ = ["Exchange", "RelayedCall", "request_start"]

# The caller's headers that go with a call, without those that the hive sets itself.
_OF_CALL: Final = CALL_HEADERS.request - {b"mcp-name"}
_OF_SESSION_CALL: Final = _OF_CALL - {b"mcp-method", b"mcp-protocol-version"}
_TO_BORROWER: Final = HeaderPolicy(CALL_HEADERS.request, CALL_HEADERS.response - {b"mcp-protocol-version"})


@dataclass(slots=True, eq=False, kw_only=True)
class RelayedCall:
    """A call that goes to a sandbox."""

    principal: Principal
    """The caller."""
    route: Route
    request_id: RequestId
    head: RequestHead
    """The caller's own."""
    start: bytes
    """Of the head that is sent to the sandbox, as `request_start` returns it."""
    body: bytes
    """As it is sent to the sandbox."""
    tool: str
    """The tool's name within its sandbox."""
    message: Message | None = None
    """The caller's own request."""
    session: LegacySession | None = None
    """The hub session of a handshake-era call, else None."""
    hold: AbstractContextManager[None] | None = None
    """Keeps the hub's own transport session from idling out during the call."""


def request_start(head: RequestHead, route: Route, tool: str) -> bytes:
    """Return how the head of a call's request to its sandbox starts: what the next call of the tool has as well.

    Args:
        head: The caller's own.
    """
    endpoint = route.endpoint
    if era_of(head.fields.get(b"mcp-protocol-version")) is Era.STATELESS and endpoint.has_runner:
        lines = head.lines(_OF_CALL) + framing.lines_of([(b"mcp-name", framing.encode_name(tool))])
    else:
        lines = head.lines(_OF_SESSION_CALL)  # the upstream session has the rest
    return framing.request_start(b"POST", endpoint.mcp_path.encode(), endpoint.authority, lines)


class Exchange(SandboxExchange):
    """One call of a sandbox's tool."""

    _upstream: UpstreamSession | None = None
    _renewed = False
    _is_sent = False
    _answer_status = 0
    _is_answered = False

    def __init__(self, caller: Caller, call: RelayedCall, services: Services, *, paused: bool = False) -> None:
        self._call = call
        self._borrows = False
        if call.session is not None:
            reply = Reply(caller, framing.lines_of(self._session_header()), editor=self._editor)
        elif call.route.endpoint.has_runner:
            reply = Reply(caller)
        else:
            self._borrows = True
            reply = Reply(caller, headers=_TO_BORROWER, editor=StatelessResults)
        super().__init__(caller, call.principal, call.route, reply, services, paused=paused)

    def start(self) -> None:
        """Count the call in the ledger, and send it when its principal's turn comes."""
        call = self._call
        if call.tool.startswith(RUNNER_TOOL_PREFIX) and not call.route.endpoint.has_runner:
            call.body = b""
            self._refuse(_no_runner(call))
        elif self._count(call.route.sandbox_id):
            if call.hold is not None:
                call.hold.__enter__()
            self._watch()
        else:
            call.body = b""
        self._take_turn()

    # The sandbox's answer.

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        if self._upstream is not None:
            if head is not None:
                if head.status == 404 and self._renew_session(self._upstream, complete):
                    return
                self._answer_status = head.status
            self._is_answered = complete
        super().received(head, data, complete)

    # Reaching the sandbox.

    def _reach(self) -> None:
        session, route = self._call.session, self._call.route
        if session is not None:
            self._upstream = session.upstreams.get(route.sandbox_id)
        elif self._borrows:
            self._upstream = self._services.handshakes.borrow_idle(self._principal.subject, route)
        if (session is None and not self._borrows) or self._upstream is not None:
            connection = self._services.upstreams.take_idle(route.endpoint)
            if connection is not None:
                self._send(connection)
                return
        self._run(self._connect)

    async def _connect(self) -> None:
        services, call = self._services, self._call
        endpoint = call.route.endpoint
        try:
            if call.session is not None and self._upstream is None:
                self._upstream = await services.handshakes.session_on(call.session, call.route)
            elif self._borrows and self._upstream is None:
                self._upstream = await services.handshakes.borrow(self._principal.subject, call.route)
            connection = services.upstreams.take_idle(endpoint) or await services.upstreams.connect(endpoint)
        except CapacityExceeded as error:
            self.fail(error)
            return
        except (ConnectFailed, RemoteProtocolError) as error:
            await self._fail_explained(error)
            return
        except AshError:
            await self._fail_explained(ConnectFailed("the sandbox opened no session for the call; nothing was sent"))
            return
        self._send(connection)

    def _send(self, connection: Connection) -> None:
        call, upstream = self._call, self._upstream
        lines = self._token_line()
        if upstream is not None:
            lines += upstream.lines
            if call.session is not None:
                call.session.calls[call.request_id] = upstream
                upstream.open_streams[self] = self.inject_event
        self._connection, self._is_sent = connection, True
        connection.send(framing.finish_head(call.start, len(call.body), lines) + call.body, self)
        if self._paused:
            connection.pause()

    def _renew_session(self, lost: UpstreamSession, complete: bool) -> bool:
        """Open a new upstream session and send the call again, if the sandbox did not know the old one.

        Args:
            complete: Whether its answer was there at once, so that the connection is in the pool again.
        """
        session = self._call.session
        if lost.id is None or self._renewed:
            return False
        self._renewed = True
        self._moved_at = self._loop.time()
        connection, self._connection = self._connection, None
        if connection is not None and not complete:
            connection.close()
        sandbox_id = self._call.route.sandbox_id
        if session is None:
            self._upstream = None
            self._services.handshakes.drop_lent(self._principal.subject, sandbox_id)
        elif session.upstreams.get(sandbox_id) is lost:
            session.forget(sandbox_id)
        lost.open_streams.pop(self, None)
        self._reach()
        return True

    # Answering the caller.

    def inject_event(self, event: bytes) -> None:
        """Write an event of the call's session that does not belong to its own answer into the answer's stream."""
        out = self._reply.inject_event(event)
        if out:
            self._caller.write(out)

    def _editor(self, is_stream: bool) -> EventEditor | None:
        call = self._call
        if not is_stream:
            return None
        assert call.session is not None and self._upstream is not None
        return SessionEvents(call.session, self._upstream)

    def _session_header(self) -> Headers:
        session = self._call.session
        return [] if session is None else [(b"mcp-session-id", session.id.encode())]

    # Failing and ending.

    def _whole_failure(self, error: AshError, status: int | None) -> bytes:
        return responses.whole_failure(self._caller, self._failure(error, None), error, self._session_header())

    def _late_failure(self, error: AshError) -> bytes:
        return self._failure(error, self._reply.nonce)

    def _failure(self, error: AshError, nonce: bytes | None) -> bytes:
        is_modern = self._call.session is None
        return responses.failure(self._call.request_id, error, nonce=nonce, is_modern=is_modern)

    def check_timeout(self, now: float) -> None:
        """Fail if the sandbox has sent nothing for `idle_stream_seconds`; tell a caller that waits that it goes on."""
        idle = self._services.limits.idle_stream_seconds or math.inf
        if self._fail_without_share():
            return
        if self._moved_at + idle <= now:
            self.fail(AshTimeout(f"the sandbox sent nothing for {idle:g} s"))
        else:
            self._tell_if_quiet(now)

    def _token(self) -> str | int | None:
        message = self._call.message
        return None if message is None else message.progress_token

    def _may_tell(self) -> bool:
        return b"text/event-stream" in (self._call.head.fields.get(b"accept") or b"")

    def _end(self) -> None:
        super()._end()
        call, upstream = self._call, self._upstream
        if upstream is not None:
            upstream.open_streams.pop(self, None)
            if self._borrows:
                usable = not self._is_sent or (self._is_answered and self._answer_status < 300)
                self._services.handshakes.give_back(self._principal.subject, upstream, usable=usable)
                self._upstream = None
            elif call.session is not None and call.session.calls.get(call.request_id) is upstream:
                del call.session.calls[call.request_id]
        if call.hold is not None and self._entry is not None:  # without an entry, `hold` was not entered
            call.hold.__exit__(None, None, None)


def _no_runner(call: RelayedCall) -> Unsupported:
    return Unsupported(
        f"{call.tool} needs a runner, and sandbox {call.route.session} is an image that serves MCP by itself: "
        "commands, jobs and files are there only as tools of its own. Call those, or spawn a recipe of another kind"
    )
