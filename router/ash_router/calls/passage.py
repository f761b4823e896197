"""One request that is passed to a sandbox's own endpoint, and its answer: both are streamed, neither is held whole.

    queued ──▶ reaching ──▶ passing ──▶ done
       └───────────┴───────────┴──▶ done, by `fail` or `caller_left`

The request's body goes on as it comes, and its caller is read no faster than the sandbox reads, and in its principal's
turns. Nothing is ever sent twice. A failure before the answer has begun is a JSON body with a status of its own; a
later one ends the answer as `sandbox_exchange.py` says.
"""

from __future__ import annotations

import math
from typing import Any, Final, Protocol

import orjson

from ash_mcp.errors import (
    AshError,
    AshTimeout,
    ConnectFailed,
    StreamBroken,
)
from ash_mcp.wire import MODERN_VERSION, failure_to_json
from ash_router.calls.direct import DirectRequest
from ash_router.calls.sandbox_exchange import CALL_BYTES, SMALL_BYTES, SandboxExchange, Services
from ash_router.calls.sandbox_response import PassedReply, Reply
from ash_router.http import bodies, framing, responses
from ash_router.http.heads import RequestHead
from ash_router.http.responses import Caller
from ash_router.sessions.server_requests import SessionEvents
from ash_router.upstream.connection import Connection

__all__ = ["Passage", "Sender"]

_MAX_KEPT_BYTES: Final = 64 * 1024
"""The longest request body that is kept, so that the id and the progress token of its call can be read."""
_CHUNK_BYTES: Final = 6
"""What a chunk takes on the wire beside its bytes: many small ones are work, too."""
_TOKEN: Final = b'"progressToken"'
_MODERN: Final = MODERN_VERSION.encode()


class Sender(Caller, Protocol):
    """The connection that a passage's request comes on."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def request_stalled(self) -> None:
        """The rest of the request did not arrive in time."""
        ...


class _RestOfBody:
    """The rest of a request's body, which `Turns` has read in its principal's turn."""

    def __init__(self, passage: Passage) -> None:
        self._passage = passage

    def begin(self) -> None:
        self._passage.read_body_on()


class Passage(SandboxExchange):
    """A request to a sandbox's own endpoint, whose body may still be arriving.

    `forwarding.py` derives one that goes to another replica, `seed_passage.py` one to a sandbox of the seed.

    Args:
        head: The head of the caller's request.
        forwarded_lines: The `x-forwarded-…` header lines.
        paused: Whether the caller already has more unread bytes than the high-water mark.
    """

    _max_kept_bytes = _MAX_KEPT_BYTES
    _pending: bytes | bytearray = b""
    """The part of the request's body that is not sent on yet."""
    _kept: bytes | bytearray | None = b""
    """The request's body so far; None where it is longer than `_max_kept_bytes`."""
    _uncounted_bytes = 0
    """What came of the body since `flush` counted it as work, about as it came on the wire."""
    _body_complete = False
    _asked_for_turn = False
    """Whether it was given to `Turns`."""
    _read_token = False
    _progress_token: str | int | None = None
    _is_slow = False
    """Whether the sandbox has more unread bytes than it should, or is not reached yet."""
    _rest_of_body: _RestOfBody | None = None
    """Set while the rest of the request's body waits for a turn to be read."""
    _caller_paused = False
    """Whether reading the caller is paused, for one of these two."""
    _counts_as_stream = False
    """Whether it is counted among the open streams."""
    _chunked = False
    """Whether the request is sent with chunked framing."""

    def __init__(
        self,
        sender: Sender,
        direct: DirectRequest,
        head: RequestHead,
        forwarded_lines: bytes,
        services: Services,
        *,
        paused: bool = False,
    ) -> None:
        self._sender = sender
        self._direct = direct
        self._head = head
        self._forwarded_lines = forwarded_lines
        self._endpoint = direct.route.endpoint
        if not direct.door.is_mcp:
            self._kept = None  # nothing of it is looked at
        is_plain = direct.door.is_mcp and direct.resumed is None
        reply = (
            Reply(sender, direct.door.lines, headers=direct.door.headers) if is_plain else _reply_to(sender, direct)
        )
        super().__init__(sender, direct.principal, direct.route, reply, services, paused=paused)

    @property
    def begun(self) -> bool:
        """Whether the answer has begun."""
        return self._reply.begun

    @property
    def max_body_bytes(self) -> int | None:
        """How long the request's body may be; None: as long as it likes."""
        if self._direct.max_bytes is not None or not self._direct.door.has_body_cap:
            return self._direct.max_bytes
        return self._services.limits.max_direct_body_bytes

    def start(self) -> None:
        """Count the request; the first `flush` queues it for its turn."""
        if self._enter_stream() if self._direct.listens else self._count(self._route.sandbox_id):
            self._watch()
        else:
            self._pending = b""  # refused: nothing is sent, and its turn answers

    def start_whole(self, body: bytes) -> None:
        """`start` and send a request whose body is complete."""
        self._pending = body
        if self._kept is not None:
            self._kept = body if len(body) <= self._max_kept_bytes else None
        self._body_complete = self._asked_for_turn = True
        self.start()
        self._take_turn()

    def _enter_stream(self) -> bool:
        services, limits = self._services, self._services.limits
        limit = limits.streams_of(self._principal)
        if not services.streams.begin_guests(self._principal.guests, limits.max_streams_per_owner):
            self._refuse(limits.guests_exceeded("streams"))
            return False
        self._counts_as_stream = True
        if services.streams.begin(self._principal.subject, self, limit.most):
            return True
        self._refuse(limit.reached("streams"))
        return False

    # The request.

    def body(self, data: bytes) -> None:
        """Take the next bytes of the request's body."""
        if self._done or self._refusal is not None:
            return
        self._pending = _joined(self._pending, data)
        if self._kept is not None:
            self._kept = _joined(self._kept, data) if len(self._kept) + len(data) <= self._max_kept_bytes else None
        if self._connection is not None:
            self._uncounted_bytes += len(data) + _CHUNK_BYTES

    def _count_input(self) -> None:
        """Count a part of the body as work; what follows is read in a later turn if the principal has none left."""
        size, self._uncounted_bytes = self._uncounted_bytes, 0
        if size <= SMALL_BYTES:
            return
        turns, owner, work = self._services.turns, self._principal.subject, size / CALL_BYTES
        if self._rest_of_body is not None:
            turns.spend(owner, work)
            return
        self._rest_of_body = _RestOfBody(self)
        turns.take(owner, self._rest_of_body, work)
        self._update_pause()

    def read_body_on(self) -> None:
        """Read the rest of the request's body: its turn has come."""
        self._rest_of_body = None
        self._update_pause()

    def body_ended(self) -> None:
        """Note that the request's body is complete; `flush` sends the rest of it."""
        self._body_complete = True

    def flush(self) -> None:
        """Send on the part of the body that has arrived; before its turn, ask for the turn."""
        if self._done:
            return
        self._moved_at = self._loop.time()
        if self._connection is not None:
            self._count_input()
            self._send_more(self._connection)
        elif not self._asked_for_turn:
            self._asked_for_turn = True
            self._take_turn()
        if self._connection is None and len(self._pending) > self._services.limits.high_water_bytes:
            self._pause_caller(True)

    def _reach(self) -> None:
        connection = self._services.upstreams.take_idle(self._endpoint)
        if connection is None:
            self._run(self._connect)
            return
        if self._caller_paused:
            self._pause_caller(False)
        self._send(connection)

    async def _connect(self) -> None:
        try:
            connection = await self._services.upstreams.connect(self._endpoint)
        except ConnectFailed as error:
            timed_out = isinstance(error.__cause__, TimeoutError)
            await self._fail_explained(error, 504 if timed_out else None)
            return
        except AshError as error:
            self.fail(error)
            return
        self._pause_caller(False)
        self._send(connection)

    def _send(self, connection: Connection) -> None:
        self._connection = connection
        body, self._pending = bytes(self._pending), b""
        direct, is_whole = self._direct, self._body_complete
        if not direct.start:
            direct.start = self._request_start(connection)
        length = len(body) if is_whole else framing.content_length(self._head.headers)
        self._chunked = length is None
        connection.send(
            framing.finish_head(direct.start, length, self._token_line()) + (body if is_whole else self._framed(body)),
            self,
            more=not is_whole,
            on_pressure=None if is_whole else self._pause_caller,
            is_head=direct.method == "HEAD",
            problem_of=direct.door.problem_of,
        )
        if self._paused:
            connection.pause()

    def _request_start(self, connection: Connection) -> bytes:
        direct = self._direct
        host = direct.authority or connection.endpoint.authority
        target = (direct.door.target if self._endpoint.has_runner else self._endpoint.mcp_path.encode()) + direct.rest
        lines = self._caller_lines(), self._forwarded_lines
        return framing.request_start(direct.method.encode(), target, host, *lines)

    def _caller_lines(self) -> bytes:
        """Return the caller's header lines that are passed on."""
        passed, resumed = self._direct.door.headers.request_lines(self._head), self._direct.resumed
        if resumed is None:
            return passed
        last = framing.lines_of([(b"last-event-id", resumed.last_event_id)])
        return passed + resumed.upstream.lines + last

    def _send_more(self, connection: Connection) -> None:
        if not self._pending and not (self._body_complete and self._chunked):
            return
        body, self._pending = bytes(self._pending), b""
        data = self._framed(body)
        if data:
            connection.send_more(data, more=not self._body_complete)

    def _framed(self, body: bytes) -> bytes:
        if not self._chunked:
            return body
        framed = framing.chunk(body) if body else b""
        return framed + framing.LAST_CHUNK if self._body_complete else framed

    def _pause_caller(self, paused: bool) -> None:
        """Stop reading the caller's request, because the sandbox is slow or not reached yet; or read on."""
        self._is_slow = paused
        self._update_pause()

    def _update_pause(self) -> None:
        paused = self._is_slow or self._rest_of_body is not None
        if paused != self._caller_paused and not self._done:
            self._caller_paused = paused
            self._moved_at = self._loop.time()
            if paused:
                self._sender.pause_reading()
            else:
                self._sender.resume_reading()

    # Signs of life.

    def _token(self) -> str | int | None:
        if not self._read_token and self._body_complete:
            self._read_token = True
            message = bodies.read_message(bytes(self._kept)) if self._kept and _TOKEN in self._kept else None
            self._progress_token = None if message is None else message.progress_token
        return self._progress_token

    def _may_tell(self) -> bool:
        if not self._direct.door.is_mcp:
            return False
        return not self._direct.listens if self._reply.begun else self._may_begin()

    def _may_begin(self) -> bool:
        """Return whether the hive may begin the answer: of a session only the sandbox can, as it may not know it."""
        fields = self._head.fields
        is_call = fields.get(b"mcp-protocol-version") == _MODERN and fields.get(b"mcp-method") == b"tools/call"
        can_fail_later = self._body_complete and bool(self._kept)
        return is_call and can_fail_later and b"text/event-stream" in (fields.get(b"accept") or b"")

    # Failing and ending.

    def stopping(self) -> None:
        """End a stream that only listens: the hive stops, and it would never end by itself."""
        if self._direct.listens:
            self.fail(StreamBroken("the hive stops"))

    def _whole_failure(self, error: AshError, status: int | None) -> bytes:
        nonce = (responses.NONCE.decode(), responses.new_nonce().decode())
        answer = responses.refusal(self._sender, error, status, [nonce])
        return responses.without_body(answer) if self._direct.method == "HEAD" else answer

    def _late_failure(self, error: AshError) -> bytes | None:
        return self._failure(error)

    def _failure(self, error: AshError) -> bytes | None:
        """Return `error` as the JSON-RPC answer to the caller's request; None where its id is not known."""
        message = bodies.read_message(bytes(self._kept)) if self._kept and self._body_complete else None
        request_id: Any = message.fields.get("id") if message is not None else None
        if message is None or not isinstance(request_id, str | int) or isinstance(request_id, bool):
            return None
        if message.method == "tools/call":
            is_modern = self._head.fields.get(b"mcp-protocol-version") == _MODERN
            return responses.failure(request_id, error, nonce=self._reply.nonce, is_modern=is_modern)
        said = {"code": -32000, "message": error.message, "data": failure_to_json(error)}
        return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "error": said}, default=str)

    def check_timeout(self, now: float) -> None:
        """Fail if the sandbox was silent for too long, or, while the request is being read, the caller."""
        limits = self._services.limits
        on_sandbox = self._body_complete or self._caller_paused
        bound = self._silence_seconds() if on_sandbox else limits.body_timeout_seconds
        if self._fail_without_share():
            return
        if self._moved_at + bound > now:
            self._tell_if_quiet(now)
        elif on_sandbox:
            self.fail(AshTimeout(f"the sandbox was silent for {bound:g} s"))
        else:
            self._sender.request_stalled()

    def _silence_seconds(self) -> float:
        """Return how long the sandbox may be silent, in seconds."""
        return self._direct.door.silent_seconds or self._services.limits.idle_stream_seconds or math.inf

    def _end(self) -> None:
        if self._rest_of_body is not None:
            self._services.turns.leave(self._principal.subject, self._rest_of_body)
            self._rest_of_body = None
        self._pause_caller(False)
        super()._end()
        if self._counts_as_stream:
            self._counts_as_stream = False
            self._services.streams.end(self._principal.subject, self)
            self._services.streams.end_guests(self._principal.guests)


def _joined(begun: bytes | bytearray, more: bytes) -> bytes | bytearray:
    """Return both. What has grown once grows in place: a copy for each of many small chunks would take seconds."""
    if not begun:
        return more
    grown = begun if isinstance(begun, bytearray) else bytearray(begun)
    grown += more
    return grown


def _reply_to(sender: Sender, direct: DirectRequest) -> Reply:
    headers, resumed = direct.door.headers, direct.resumed
    if not direct.door.is_mcp:
        return PassedReply(sender, direct.door.lines, headers=headers, is_head=direct.method == "HEAD")
    assert resumed is not None
    return Reply(
        sender,
        framing.lines_of([(b"mcp-session-id", resumed.session.id.encode())]),
        headers=headers,
        editor=lambda is_stream: SessionEvents(resumed.session, resumed.upstream) if is_stream else None,
    )
