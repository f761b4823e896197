"""One request to a sandbox's own endpoint, and its answer: both pass as bytes, framed anew, neither is collected.

    reaching ──▶ passing ──▶ done
        └───────────┴──▶ done, by `fail` or `caller_left`

The request's body goes on as it comes, and its caller is read no faster than the sandbox reads. Nothing is ever sent
twice. Until the answer has begun, a failure is a JSON body with a status of its own; after that it is one more event
on the stream where the call's id is known, otherwise the stream's end.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
from typing import Any, Final, Protocol

import orjson

from ash_mcp.errors import (
    AshError,
    AshTimeout,
    ConnectFailed,
    HiveFault,
    RemoteProtocolError,
    StreamBroken,
)
from ash_mcp.types import SandboxId
from ash_mcp.wire import HEADER_TOKEN, MODERN_VERSION, failure_to_json
from ash_router import _framing, answers, bodies
from ash_router._framing import ResponseHead
from ash_router.answers import Caller
from ash_router.asking import SessionEvents
from ash_router.connection import Connection
from ash_router.direct import Door
from ash_router.exchange import Services, explained
from ash_router.heads import RequestHead
from ash_router.ledger import Call
from ash_router.reply import Reply

__all__ = ["Passage", "Sender"]

log = logging.getLogger(__name__)

_TOKEN_LINE: Final = b"%b: %%b\r\n" % HEADER_TOKEN.encode()
_OF_RESUMPTION: Final = _framing.TO_ENDPOINT - {
    b"last-event-id",
    b"mcp-method",
    b"mcp-name",
    b"mcp-protocol-version",
    b"mcp-session-id",
}
_MAX_KEPT_BYTES: Final = 64 * 1024
"""Of a request's body, kept to know the id of the call if it fails in the middle of its answer."""


class Sender(Caller, Protocol):
    """The connection that a passage's request comes on."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def request_stalled(self) -> None:
        """The rest of the request does not come."""
        ...


class Passage:
    """A `Sink` between one sandbox and one caller, with a request that is still coming.

    `forwarding.py` makes of it one between another replica and a caller.

    Args:
        head: The caller's own.
        told: For whom the hive asks, ready lines.
        paused: Whether the caller is slow already.
    """

    _max_kept_bytes = _MAX_KEPT_BYTES
    _entry: Call | None = None
    _connection: Connection | None = None
    _task: asyncio.Task[None] | None = None
    _moved_at = 0.0
    _pending = b""
    """Of the request's body, what was not sent on yet."""
    _kept: bytes | None = b""
    _ended = False
    _reaching = False
    _holding = False
    _chunked = False
    _done = False

    def __init__(
        self, sender: Sender, door: Door, head: RequestHead, told: bytes, services: Services, *, paused: bool = False
    ) -> None:
        self._sender = sender
        self._door = door
        self._head = head
        self._told = told
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._reply = _reply_to(sender, door)
        self._paused = paused

    @property
    def begun(self) -> bool:
        """Whether its answer has."""
        return self._reply.begun

    def start(self) -> None:
        """Enter the books; the first `flush` sends what there is."""
        if self._enter_stream() if self._door.is_stream else self._enter_call(self._door.route.sandbox_id):
            self._moved_at = self._loop.time()
            self._services.rounds.enter(self)

    def start_whole(self, body: bytes) -> None:
        """`start` and send, where all of the request's body is there."""
        self._pending = body
        self._kept = body if len(body) <= self._max_kept_bytes else None
        self._ended = True
        self.start()
        self.flush()

    def _enter_stream(self) -> bool:
        services, owner = self._services, self._door.route.owner
        if services.streams.begin(owner, self):
            return True
        self.fail(services.limits.streams_exceeded())
        return False

    def _enter_call(self, sandbox_id: SandboxId | None) -> bool:
        services, owner = self._services, self._door.route.owner
        if services.ledger.of_owner(owner) >= services.limits.max_in_flight_per_owner:
            self.fail(services.limits.in_flight_exceeded())
            return False
        self._entry = services.ledger.begin(sandbox_id, owner, self.fail)
        return True

    # The request.

    def body(self, data: bytes) -> None:
        """Take the next bytes of the request's body."""
        if self._done:
            return
        self._pending = self._pending + data if self._pending else data
        if self._kept is not None:
            self._kept = self._kept + data if len(self._kept) + len(data) <= self._max_kept_bytes else None

    def body_ended(self) -> None:
        self._ended = True

    def flush(self) -> None:
        """Send on what has come."""
        if self._done:
            return
        self._moved_at = self._loop.time()
        if self._connection is not None:
            self._send_more(self._connection)
        elif not self._reaching and not self._begin_at_once():
            self._reaching = True
            self._task = self._services.spawn(self._guarded(self._connect()))
        if self._connection is None and len(self._pending) > self._services.limits.high_water_bytes:
            self._hold(True)

    def _begin_at_once(self) -> bool:
        connection = self._services.upstreams.idle(self._door.route)
        if connection is not None:
            self._send(connection)
        return connection is not None

    async def _connect(self) -> None:
        try:
            connection = await self._services.upstreams.connect(self._door.route)
        except ConnectFailed as error:
            timed_out = isinstance(error.__cause__, TimeoutError)
            self.fail(await explained(self._services, self._door.route, error), 504 if timed_out else None)
            return
        self._hold(False)
        self._send(connection)

    def _send(self, connection: Connection) -> None:
        self._connection = connection
        body, self._pending = self._pending, b""
        length = len(body) if self._ended else _framing.content_length(self._head.headers)
        self._chunked = length is None
        lines = (self._asked_lines(), self._credentials(), self._told)
        head = _framing.request_head(self._door.method.encode(), length, *lines)
        connection.send(
            head + self._framed(body), self, more=not self._ended, on_pressure=None if self._ended else self._hold
        )
        if self._paused:
            connection.pause()

    def _credentials(self) -> bytes:
        """Return the lines that prove that the hive asks."""
        route = self._door.route
        return _TOKEN_LINE % self._services.tokens.mint(route.sandbox_id, route.generation)

    def _asked_lines(self) -> bytes:
        """Return the caller's headers as the sandbox should see them."""
        resumed = self._door.resumed
        if resumed is None:
            return self._head.lines(_framing.TO_ENDPOINT)
        last = _framing.lines_of([(b"last-event-id", resumed.last_event_id)])
        return self._head.lines(_OF_RESUMPTION) + resumed.upstream.lines() + last

    def _send_more(self, connection: Connection) -> None:
        if not self._pending and not (self._ended and self._chunked):
            return
        body, self._pending = self._pending, b""
        data = self._framed(body)
        if data:
            connection.send_more(data, more=not self._ended)

    def _framed(self, body: bytes) -> bytes:
        if not self._chunked:
            return body
        framed = _framing.chunk(body) if body else b""
        return framed + _framing.LAST_CHUNK if self._ended else framed

    def _hold(self, holding: bool) -> None:
        """Stop reading the caller while the sandbox is slow."""
        if holding != self._holding and not self._done:
            self._holding = holding
            self._moved_at = self._loop.time()
            if holding:
                self._sender.pause_reading()
            else:
                self._sender.resume_reading()

    # The answer.

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        if complete:
            self._connection = None
        self._moved_at = self._loop.time()
        out = self._reply.frame(head, data, complete)
        if out:
            self._sender.write(out)
        if complete:
            self._end()
            self._sender.finished()

    def broken(self, error: AshError) -> None:
        self._connection = None
        self._task = self._services.spawn(self._guarded(self._fail_explained(error)))

    def pause(self) -> None:
        """Stop reading the sandbox's answer: the caller is slow."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._paused = False
        if self._connection is not None:
            self._connection.resume()

    # Failing and ending.

    def fail(self, error: AshError, status: int | None = None) -> None:
        """End the caller's answer with `error` at once; no-op if it has ended."""
        if self._done:
            return
        self._end()
        if not self._reply.begun:
            nonce = (answers.NONCE.decode(), answers.new_nonce().decode())
            self._sender.write(answers.refusal(self._sender, error, status, [nonce]))
            self._sender.finished()
            return
        rest = self._reply.cut(self._failure(error))
        if rest is None:
            self._sender.broken_off()
        else:
            self._sender.write(rest)
            self._sender.finished()

    def stopping(self) -> None:
        """End a stream that only listens: the hive stops, and it would never end by itself."""
        if self._door.is_stream:
            self.fail(StreamBroken("the hive stops"))

    def caller_left(self) -> None:
        """Stop: nobody waits any more."""
        if not self._done:
            self._end()

    def _failure(self, error: AshError) -> bytes | None:
        """Return `error` as the answer to the call that the caller made; None where its id is not known."""
        message = bodies.read_message(self._kept) if self._kept and self._ended else None
        request_id: Any = message.fields.get("id") if message is not None else None
        if message is None or not isinstance(request_id, str | int) or isinstance(request_id, bool):
            return None
        if message.method == "tools/call":
            is_modern = self._head.fields.get(b"mcp-protocol-version") == MODERN_VERSION.encode()
            return answers.failure(request_id, error, nonce=self._reply.nonce, is_modern=is_modern)
        said = {"code": -32000, "message": error.message, "data": failure_to_json(error)}
        return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "error": said}, default=str)

    async def _fail_explained(self, error: AshError) -> None:
        if isinstance(error, RemoteProtocolError):
            self.fail(error)
        else:
            self.fail(await explained(self._services, self._door.route, error))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.exception("a request to a sandbox failed in the hive itself")
            self.fail(HiveFault("the hive itself failed; its log has the details"))

    def look(self, now: float) -> None:
        """Look after whoever is silent for too long: the caller with its request, then the sandbox."""
        limits = self._services.limits
        on_sandbox = self._ended or self._holding
        bound = (limits.idle_stream_seconds or math.inf) if on_sandbox else limits.body_timeout_seconds
        if self._moved_at + bound > now:
            return
        if on_sandbox:
            self.fail(AshTimeout(f"the sandbox was silent for {bound:g} s"))
        else:
            self._sender.request_stalled()

    def _end(self) -> None:
        """Let go of everything that the request holds."""
        if self._holding:
            self._hold(False)
        self._done = True
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._services.rounds.leave(self)
        if self._entry is not None:
            self._services.ledger.end(self._entry)
        if self._door.is_stream:
            self._services.streams.end(self._door.route.owner, self)


def _reply_to(sender: Sender, door: Door) -> Reply:
    resumed = door.resumed
    if resumed is None:
        return Reply(sender, kept=_framing.FROM_ENDPOINT)
    return Reply(
        sender,
        _framing.lines_of([(b"mcp-session-id", resumed.session.id.encode())]),
        editor=lambda: SessionEvents(resumed.session, resumed.upstream),
    )
