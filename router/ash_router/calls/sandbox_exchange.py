"""The base class of a relayed call and of a direct request: one sandbox, one caller, and an answer that always ends.

A failure before the answer has begun is a whole answer of the hive's. A later one is a last event on the sandbox's
stream, with the nonce of the response's head, or else the connection is closed early.
"""

from __future__ import annotations

import asyncio
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from ash_mcp.errors import AshError, ConnectFailed, HiveFault, PermissionDenied, RemoteProtocolError, SandboxError
from ash_mcp.types import Principal, SandboxId
from ash_mcp.wire import HEADER_TOKEN
from ash_router.bounds.deadlines import TimeoutSweeper
from ash_router.bounds.limits import RelayLimits
from ash_router.bounds.streams import OpenStreams
from ash_router.bounds.turns import Turns
from ash_router.calls.sandbox_response import Reply
from ash_router.http import responses
from ash_router.http.framing import ResponseHead
from ash_router.http.responses import Caller
from ash_router.ledger import Call, Ledger
from ash_router.routes import Route
from ash_router.sessions.handshakes import Handshakes
from ash_router.upstream.call_tokens import CallTokens
from ash_router.upstream.connection import Connection
from ash_router.upstream.pool import ConnectionPool

__all__ = ["CALL_BYTES", "SMALL_BYTES", "SandboxExchange", "Services"]

log = logging.getLogger(__name__)

_PROGRESS: Final = b'"notifications/progress"'
_PROGRESS_VALUE: Final = re.compile(rb'"progress": ?(\d{1,15}(?:\.\d{1,15})?)[,}]')
_STEP: Final = 1e-6
"""Per second: progress must grow with each report, and leave room for what the sandbox itself may report next."""
CALL_BYTES: Final = 24 * 1024
"""Of an answer, or of a request's body that is not kept, are as much work as a call."""
SMALL_BYTES: Final = 4 * 1024
"""A part up to this size is not counted: it is the work of its call."""
_TOKEN_LINE: Final = b"%b: %%b\r\n" % HEADER_TOKEN.encode()


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a data plane that every exchange uses."""

    upstreams: ConnectionPool
    handshakes: Handshakes
    tokens: CallTokens
    ledger: Ledger
    limits: RelayLimits
    streams: OpenStreams
    turns: Turns
    sweeper: TimeoutSweeper
    explain: Callable[[Route], Awaitable[AshError]]
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    is_good: Callable[[Principal], bool] = lambda _: True
    """Whether the share of a guest is still good; of any other principal always."""
    tunnels: OpenStreams = field(default_factory=OpenStreams)
    """The open WebSockets by the id of their sandbox, which ends them with itself."""


class _Reading:
    """The rest of an answer, which `Turns` has read in its principal's turn."""

    def __init__(self, exchange: SandboxExchange) -> None:
        self._exchange = exchange
        self.is_waiting = False

    def begin(self) -> None:
        self._exchange.read_on()


class SandboxExchange(ABC):
    """A `Sink` between one sandbox and one caller.

    Args:
        principal: The caller, in whose limits the exchange counts.
        paused: Whether the caller still has unread bytes of earlier answers, above the high-water mark.
    """

    _entry: Call | None = None
    _connection: Connection | None = None
    _task: asyncio.Task[None] | None = None
    _moved_at = 0.0
    """When the last byte came or went, by the loop's clock."""
    _started_at = 0.0
    _heard_at = 0.0
    """When the caller was last told that its request goes on, by the loop's clock."""
    _progress = 0.0
    """What the sandbox last reported."""
    _begun = False
    """Whether `Turns` has started it."""
    _reading: _Reading | None = None
    """Set while the rest of the answer waits for a turn to be read."""
    _refusal: AshError | None = None
    """The error that it is answered with when its turn comes."""
    _done = False

    def __init__(
        self, caller: Caller, principal: Principal, route: Route, reply: Reply, services: Services, *, paused: bool
    ) -> None:
        self._caller = caller
        self._principal = principal
        self._route = route
        self._reply = reply
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._paused = paused

    # What the subclasses define.

    @abstractmethod
    def _reach(self) -> None:
        """Send the request: at once on an idle connection, else after connecting."""

    @abstractmethod
    def check_timeout(self, now: float) -> None:
        """Fail if the caller or the sandbox was silent for too long."""

    @abstractmethod
    def _token(self) -> str | int | None:
        """Return the token with which the caller asked for progress; None if it did not."""

    @abstractmethod
    def _may_tell(self) -> bool:
        """Return whether the hive may say in the answer, or begin one to say, that the request goes on."""

    @abstractmethod
    def _whole_failure(self, error: AshError, status: int | None) -> bytes:
        """Return the answer of a request that failed before its answer began."""

    @abstractmethod
    def _late_failure(self, error: AshError) -> bytes | None:
        """Return the JSON-RPC message that ends an answer that has begun; None if the request's id is not known."""

    # Its turn.

    def _take_turn(self) -> None:
        self._services.turns.take(self._principal.subject, self)

    def begin(self) -> None:
        self._begun = True
        if self._refusal is not None:
            self.fail(self._refusal)
            return
        try:
            self._reach()
        except Exception:
            log.exception("a request to a sandbox failed in the hive itself")
            self.fail(HiveFault("the hive itself failed; its log has the details"))

    def _refuse(self, error: AshError) -> None:
        """Fail when this exchange's turn comes: refusals are work too, and a flood has as many of them as calls."""
        if self._begun:
            self.fail(error)
        else:
            self._refusal = error

    # The caller.

    def fail(self, error: AshError, status: int | None = None) -> None:
        """End the caller's answer with `error` at once; no-op if it has ended."""
        if self._done:
            return
        self._end()
        if not self._reply.begun:
            self._caller.write(self._whole_failure(error, status))
            self._caller.finished()
            return
        rest = self._reply.cut(self._late_failure(error))
        if rest is None:
            self._caller.broken_off()
        else:
            self._caller.write(rest)
            self._caller.finished()

    def caller_left(self) -> None:
        """The caller is gone: close the connection to the sandbox, which is how a stateless call is cancelled."""
        if not self._done:
            self._end()

    def pause(self) -> None:
        """Stop reading the sandbox's answer: the caller is slow."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._paused = False
        self._resume_reading()

    def _resume_reading(self) -> None:
        if self._connection is not None and not self._paused and self._reading is None:
            self._connection.resume()

    # The sandbox.

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        reply = self._reply
        if head is not None and reply.begun and not reply.takes(head):
            self.fail(RemoteProtocolError(f"the sandbox answered HTTP {head.status} without a message"))
            return
        if complete:
            self._connection = None
        out = reply.frame(head, data, complete)
        if out:
            self._caller.write(out)
        if complete:
            self._end()
            self._caller.finished()
        else:
            self._moved_at = self._loop.time()
            if reply.is_stream and self._token() is not None and _PROGRESS in data:
                self._heard_at = self._moved_at
                self._progress = max(self._progress, *(float(found) for found in _PROGRESS_VALUE.findall(data)), 0.0)
        if len(data) > SMALL_BYTES:
            self._count_output(len(data))

    def _count_output(self, size: int) -> None:
        """Count a part of the answer as work; what follows is read in a later turn if the principal has none left.

        A read takes up to 200 KiB, so without turns a principal's answers would fill each turn of the loop.
        """
        turns, owner, work = self._services.turns, self._principal.subject, size / CALL_BYTES
        if self._connection is None:  # that was the last part
            turns.spend(owner, work)
        elif self._reading is None:
            self._reading = reading = _Reading(self)
            turns.take(owner, reading, work)
            if self._reading is reading:  # its turn has not come at once
                reading.is_waiting = True
                self._connection.pause()

    def read_on(self) -> None:
        """Read the rest of the answer: its turn has come."""
        was_waiting = self._reading is not None and self._reading.is_waiting
        self._reading = None
        if was_waiting:
            self._resume_reading()

    def broken(self, error: AshError) -> None:
        self._connection = None
        self._run(partial(self._fail_explained, error))

    # Signs of life.

    def _fail_without_share(self) -> bool:
        """Fail if the caller is a guest whose share is gone, and say whether it was so."""
        if self._principal.share is None or self._services.is_good(self._principal):
            return False
        self.fail(PermissionDenied("the share of this call was revoked or has expired; what it has done is unknown"))
        return True

    def _watch(self) -> None:
        """Have `check_timeout` called from now on."""
        self._moved_at = self._started_at = self._heard_at = self._loop.time()
        self._services.sweeper.watch(self)

    def _tell_if_quiet(self, now: float) -> None:
        """Tell a caller who has heard nothing for `quiet_seconds` that its request goes on."""
        quiet_since = now - self._services.limits.quiet_seconds
        if self._heard_at > quiet_since or self._connection is None or self._paused or not self._may_tell():
            return
        token, seconds = self._token(), now - self._started_at
        if token is not None:
            event = responses.progress_event(token, self._progress + seconds * _STEP, seconds)
        elif self._moved_at > quiet_since:
            return  # what its sandbox sends is sign enough
        else:
            event = responses.QUIET_COMMENT
        out = self._reply.append_event(event)
        if out:
            self._heard_at = now
            self._caller.write(out)

    def _token_line(self) -> bytes:
        """Return the header line that proves to the receiver that the hive asks."""
        route = self._route
        # whoever else listens there must not get what opens a sandbox
        return _TOKEN_LINE % self._services.tokens.mint(route.sandbox_id) if route.endpoint.reaches_runner else b""

    # Beginning and ending.

    def _count(self, sandbox_id: SandboxId | None) -> bool:
        """Enter the call in the ledger; where that may not be now, refuse it and return False."""
        ledger, principal = self._services.ledger, self._principal
        refusal = ledger.refusal(sandbox_id) or self._services.limits.call_refusal(principal, ledger.in_flight)
        if refusal is not None:
            self._refuse(refusal)
            return False
        self._entry = ledger.begin(sandbox_id, principal.subject, self.fail, principal.guests)
        return True

    def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._task = self._services.spawn(self._guarded(work))

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()  # the coroutine is made here: a task cancelled before its first step would never await it
        except Exception:
            log.exception("a request to a sandbox failed in the hive itself")
            self.fail(HiveFault("the hive itself failed; its log has the details"))

    async def _fail_explained(self, error: AshError, status: int | None = None) -> None:
        """Fail with the reason that the sandbox is gone, if the hive can tell it in time, else with `error`."""
        is_certain = isinstance(error, RemoteProtocolError | HiveFault)
        self.fail(error if is_certain else await self._explained(error), status)

    async def _explained(self, error: AshError) -> AshError:
        try:
            async with asyncio.timeout(self._services.limits.explain_timeout_seconds):
                said = await self._services.explain(self._route)
        except TimeoutError:
            log.warning("nobody could say in time why sandbox %s went away", self._route.sandbox_id)
            return error
        # A call that was sent may have run; no explanation may tell the caller that it did not.
        fits = isinstance(said, SandboxError) if isinstance(error, ConnectFailed) else not said.retryable
        return said if fits else error

    def _end(self) -> None:
        """Release the connection, the task, the turn, the timeout and the ledger entry."""
        self._done = True
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        if not self._begun:
            self._services.turns.leave(self._principal.subject, self)
        if self._reading is not None:
            self._services.turns.leave(self._principal.subject, self._reading)
            self._reading = None
        self._services.sweeper.unwatch(self)
        if self._entry is not None:
            self._services.ledger.end(self._entry)
