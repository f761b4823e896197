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
import secrets
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
from ash_router._framing import Headers, ResponseHead
from ash_router.answers import Caller
from ash_router.asking import SessionEvents
from ash_router.direct import Door
from ash_router.exchange import Services, explained
from ash_router.ledger import Call
from ash_router.reply import Reply
from ash_router.upstream import Connection

__all__ = ["Passage", "Sender"]

log = logging.getLogger(__name__)

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
        headers: The caller's own.
        told: For whom the hive asks.
        paused: Whether the caller is slow already.
    """

    _max_kept_bytes = _MAX_KEPT_BYTES

    def __init__(
        self, sender: Sender, door: Door, headers: Headers, told: Headers, services: Services, *, paused: bool = False
    ) -> None:
        self._sender = sender
        self._door = door
        self._headers = headers
        self._told = told
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._reply = _reply_to(sender, door)
        self._entry: Call | None = None
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._moved_at = 0.0
        self._paused = paused
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._kept: bytes | None = b""
        self._ended = False
        self._reaching = False
        self._holding = False
        self._chunked = False
        self._done = False

    @property
    def begun(self) -> bool:
        """Whether its answer has."""
        return self._reply.begun

    def start(self) -> None:
        """Enter the books; the first `flush` sends what there is."""
        if self._enter_stream() if self._door.is_stream else self._enter_call(self._door.route.sandbox_id):
            self._moved_at = self._loop.time()
            self._watch()

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
        self._pending.append(data)
        self._pending_bytes += len(data)
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
        if self._connection is None and self._pending_bytes > self._services.limits.high_water_bytes:
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
        body, self._pending, self._pending_bytes = b"".join(self._pending), [], 0
        length = len(body) if self._ended else _framing.content_length(self._headers)
        self._chunked = length is None
        ours, asked = self._credentials(), _asked_of(self._door, self._headers)
        head = _framing.direct_head(self._door.method.encode(), asked, ours, length)
        connection.send(
            head + self._framed(body), self, more=not self._ended, on_pressure=None if self._ended else self._hold
        )
        if self._paused:
            connection.pause()

    def _credentials(self) -> Headers:
        """Return what proves that the hive asks, and for whom."""
        route = self._door.route
        token = self._services.tokens.mint(route.sandbox_id, route.generation)
        return [(HEADER_TOKEN.encode(), token), *self._told]

    def _send_more(self, connection: Connection) -> None:
        if not self._pending and not (self._ended and self._chunked):
            return
        body, self._pending, self._pending_bytes = b"".join(self._pending), [], 0
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
        if complete:
            self._end()
        if out:
            self._sender.write(out)
        if complete:
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
            nonce = (answers.NONCE.decode(), secrets.token_hex(16))
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
            is_modern = _framing.one(self._headers, b"mcp-protocol-version") == MODERN_VERSION.encode()
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

    def _watch(self) -> None:
        """Look after whoever is silent too long: the caller with its request, then the sandbox."""
        limits = self._services.limits
        bounds = (limits.idle_stream_seconds or math.inf, limits.body_timeout_seconds)
        on_sandbox = self._ended or self._holding
        left = self._moved_at + bounds[not on_sandbox] - self._loop.time()
        if left > 0:
            # whose turn it is may change meanwhile, and the other's bound be the shorter one
            self._timer = self._loop.call_later(min(left, *bounds), self._watch)
        elif on_sandbox:
            self.fail(AshTimeout(f"the sandbox was silent for {bounds[0]:g} s"))
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
        if self._timer is not None:
            self._timer.cancel()
        if self._entry is not None:
            self._services.ledger.end(self._entry)
        if self._door.is_stream:
            self._services.streams.end(self._door.route.owner, self)


def _reply_to(sender: Sender, door: Door) -> Reply:
    resumed = door.resumed
    if resumed is None:
        return Reply(sender, (), passes_session=True)
    return Reply(
        sender,
        [(b"mcp-session-id", resumed.session.id.encode())],
        editor=lambda: SessionEvents(resumed.session, resumed.upstream),
    )


def _asked_of(door: Door, headers: Headers) -> Headers:
    """Return the caller's headers as the sandbox should see them."""
    if door.resumed is None:
        return headers
    ours = {**door.resumed.upstream.headers(), b"last-event-id": door.resumed.last_event_id}
    kept = [(key, value) for key, value in headers if key not in ours]
    return [*kept, *((key, value) for key, value in ours.items() if value is not None)]
