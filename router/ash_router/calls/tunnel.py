"""One WebSocket to a sandbox: its handshake is passed like a request, and then bytes pass both ways as they come.

    queued ──▶ reaching ──▶ asking ──▶ open ──▶ done
       └───────────┴───────────┴────────┴──▶ done, by `fail` or `caller_left`

It counts as an open stream of its principal. It ends when either side closes, with its sandbox, when the hive stops,
when its credential is good no more, and after `idle_stream_seconds` without a byte. What fails before it is open is
answered with a status of its own; what is open can only be closed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable
from typing import Final, Protocol

from ash_mcp.errors import AshError, AshTimeout, HiveFault, RemoteProtocolError, StreamBroken
from ash_router.calls.direct import DirectRequest
from ash_router.calls.passage import Passage, Sender
from ash_router.calls.sandbox_exchange import SMALL_BYTES, Services
from ash_router.http import framing, responses, websocket
from ash_router.http.framing import ResponseHead
from ash_router.http.heads import RequestHead
from ash_router.upstream.connection import Connection

__all__ = ["Opener", "Tunnel"]

log = logging.getLogger(__name__)

_CHECK_SECONDS: Final = 2.0
"""How often it is asked whether the caller's credential is still good; as long as a revoked key may last elsewhere."""
_END: Final = b"\r\n"


class Opener(Sender, Protocol):
    """The connection of a caller that opens a WebSocket."""

    def refusal_now(self) -> AshError | Awaitable[AshError | None] | None:
        """Return why the caller's request would be refused if it came now, or None."""
        ...

    def has_vanished(self) -> bool:
        """Return whether the caller's host gives no sign of life any more."""
        ...


class Tunnel(Passage):
    """A WebSocket between a caller and a sandbox. Arguments are those of `Passage`."""

    _max_kept_bytes = 0
    _is_open = False
    _was_used = False
    """Whether the caller has sent something since that was last noted."""
    _check_at = 0.0
    _is_checking = False

    def __init__(
        self,
        opener: Opener,
        direct: DirectRequest,
        head: RequestHead,
        forwarded_lines: bytes,
        services: Services,
        *,
        paused: bool = False,
    ) -> None:
        super().__init__(opener, direct, head, forwarded_lines, services, paused=paused)
        self._opener = opener

    def start(self) -> None:
        """Count it as a stream; the first `flush` queues it for its turn."""
        if self._enter_stream():
            self._services.tunnels.begin(self._route.sandbox_id, self, self._services.limits.max_streams_per_owner)
            self._check_at = self._loop.time() + _CHECK_SECONDS
            self._watch()

    def stopping(self) -> None:
        self.fail(StreamBroken("the hive stops"))

    # What the caller sends.

    def body(self, data: bytes) -> None:
        self._was_used = True
        super().body(data)

    def flush(self) -> None:
        super().flush()
        if not self._is_open and len(self._pending) > self._services.limits.high_water_bytes:
            self._pause_caller(True)  # it does not wait for the answer to its handshake

    def _send(self, connection: Connection) -> None:
        self._connection = connection
        lines = (self._caller_lines(), self._token_line(), self._forwarded_lines)
        target = self._direct.door.target + self._direct.rest
        host = self._direct.authority or connection.endpoint.authority
        head = websocket.request_head(target, host, *lines)
        connection.send(
            head,
            self,
            more=True,
            on_pressure=self._pause_caller,
            problem_of=self._direct.door.problem_of,
            may_switch=True,
        )
        if self._paused:
            connection.pause()

    def _send_more(self, connection: Connection) -> None:
        if self._is_open:
            super()._send_more(connection)

    # What the sandbox sends.

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        if head is not None and head.status == 101:
            self._opened(head, data)
        elif not self._is_open:
            super().received(head, data, complete)  # it refuses the handshake
        else:
            self._moved_at = self._loop.time()
            self._caller.write(data)
            if complete:
                self._connection = None
                self._close()
            elif len(data) > SMALL_BYTES:
                self._count_output(len(data))

    def _opened(self, head: ResponseHead, first: bytes) -> None:
        problem = websocket.answer_problem(head)
        if problem is not None:
            self.fail(RemoteProtocolError(problem))
            return
        self._is_open = True
        self._moved_at = self._loop.time()
        said = framing.lines_of([responses.FROM_SANDBOX, (responses.NONCE, responses.new_nonce())])
        self._caller.write(b"".join((websocket.accepting_lines(head), said, self._caller.default_lines, _END, first)))
        self._pause_caller(False)
        self.flush()

    # Time.

    def check_timeout(self, now: float) -> None:
        limits = self._services.limits
        if self._was_used:
            self._was_used = False
            self._services.ledger.note_use(self._route.sandbox_id)
        if not self._is_open and self._started_at + limits.handshake_timeout_seconds <= now:
            self.fail(AshTimeout("the sandbox did not answer the WebSocket's handshake in time"))
        elif self._moved_at + (limits.idle_stream_seconds or math.inf) <= now:
            self.fail(AshTimeout("nothing was said for too long"))
        elif self._opener.has_vanished():
            self.fail(StreamBroken("the caller's host has vanished"))
        elif self._is_open and now >= self._check_at and not self._is_checking:
            self._check_at = now + _CHECK_SECONDS
            self._check_credential()

    def _check_credential(self) -> None:
        try:
            refusal = self._opener.refusal_now()
        except Exception:
            self._fail_unchecked()
            return
        if isinstance(refusal, AshError):
            self.fail(refusal)
        elif refusal is not None:
            self._is_checking = True
            self._services.spawn(self._await_refusal(refusal))

    async def _await_refusal(self, refusal: Awaitable[AshError | None]) -> None:
        try:
            error = await refusal
        except Exception:
            self._fail_unchecked()
            return
        finally:
            self._is_checking = False
        if error is not None:
            self.fail(error)

    def _fail_unchecked(self) -> None:
        log.exception("whether a WebSocket's credential is still good could not be checked")
        self.fail(HiveFault("the hive itself failed; its log has the details"))

    # Failing and ending.

    def fail(self, error: AshError, status: int | None = None) -> None:
        if not self._is_open:
            super().fail(error, status)
        elif not self._done:
            self._close()

    def broken(self, error: AshError) -> None:
        if not self._is_open:
            super().broken(error)
            return
        self._connection = None
        self.fail(error)

    def _close(self) -> None:
        self._end()
        self._caller.broken_off()

    def _end(self) -> None:
        super()._end()
        self._services.streams.end(self._principal.subject, self)
        self._services.tunnels.end(self._route.sandbox_id, self)
