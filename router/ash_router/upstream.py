"""Connections to sandboxes: pooled while idle, over a Unix socket or TCP."""

from __future__ import annotations

import asyncio

from ash_mcp.errors import AshError, AshTimeout, ConnectFailed, RemoteProtocolError
from ash_mcp.types import SandboxId
from ash_router._framing import Headers, ResponseHead
from ash_router.connection import Connection
from ash_router.rounds import Rounds
from ash_router.routes import Route

__all__ = ["Answer", "Upstreams"]


class Upstreams:
    """The connections of this process to its sandboxes.

    Args:
        max_idle: How many idle connections one sandbox may have.
        idle_seconds: How long one is kept; shorter than any server's own patience, so that we close first.
        silent_seconds: After which the other side's host must have given a sign of life; None trusts it.
    """

    def __init__(
        self,
        *,
        connect_timeout_seconds: float,
        max_idle: int,
        idle_seconds: float,
        max_head_bytes: int,
        max_headers: int,
        silent_seconds: int | None = None,
    ) -> None:
        self._silent_seconds = silent_seconds
        self._connect_timeout = connect_timeout_seconds
        self._max_idle = max_idle
        self._idle_seconds = idle_seconds
        self._max_head_bytes = max_head_bytes
        self._max_headers = max_headers
        # By id and generation and never by address: an address may belong to another sandbox tomorrow.
        self._idle: dict[tuple[SandboxId, int], list[Connection]] = {}
        self._open: set[Connection] = set()
        self._rounds = Rounds(idle_seconds / 4)

    def idle(self, route: Route) -> Connection | None:
        """Take an idle connection that is still good, or None."""
        kept = self._idle.get((route.sandbox_id, route.generation))
        while kept:
            connection = kept.pop()
            if connection.alive and connection.idle_since + self._idle_seconds > asyncio.get_running_loop().time():
                return connection
            connection.close()
        return None

    async def connect(self, route: Route) -> Connection:
        """Open a new connection.

        Raises:
            ConnectFailed: Nobody listens there, or not in time. Nothing was sent.
        """
        try:
            async with asyncio.timeout(self._connect_timeout):
                connection = await self._dial(route)
        except (OSError, TimeoutError) as exc:
            raise _unreachable(route) from exc
        if connection.closed:
            raise _unreachable(route)
        if self._silent_seconds is not None:
            connection.expect_life(self._silent_seconds)
        self._open.add(connection)
        return connection

    async def request(self, route: Route, data: bytes, *, timeout_seconds: float, max_bytes: int) -> Answer:
        """Send a request of our own and return its whole, bounded answer.

        Raises:
            TransportError: It could not be sent, or the answer did not come in time or in full.
            RemoteProtocolError: The answer is too long or not one.
        """
        answer = Answer(max_bytes)
        connection = self.idle(route) or await self.connect(route)
        connection.send(data, answer)
        try:
            async with asyncio.timeout(timeout_seconds):
                await answer.done.wait()
        except TimeoutError as exc:
            raise AshTimeout(f"sandbox {route.session} did not answer within {timeout_seconds:g} s") from exc
        finally:
            if not answer.complete:
                connection.close()
        if answer.error is not None:
            raise answer.error
        return answer

    def forget(self, sandbox_id: SandboxId) -> None:
        """Close the idle connections to a sandbox that has ended."""
        for key in [key for key in self._idle if key[0] == sandbox_id]:
            for connection in self._idle.pop(key):
                connection.close()

    def close(self) -> None:
        """Close every connection."""
        self._rounds.close()
        for key in list(self._idle):
            self.forget(key[0])
        for connection in list(self._open):
            connection.close()

    async def _dial(self, route: Route) -> Connection:
        def new() -> Connection:
            return Connection(
                (route.sandbox_id, route.generation),
                self._release,
                max_head_bytes=self._max_head_bytes,
                max_headers=self._max_headers,
            )

        endpoint = route.endpoint
        if endpoint.unix is not None:
            _, connection = await asyncio.get_running_loop().create_unix_connection(new, endpoint.unix)
        else:
            assert endpoint.host is not None and endpoint.port is not None
            _, connection = await asyncio.get_running_loop().create_connection(new, endpoint.host, endpoint.port)
        return connection

    def _release(self, connection: Connection, reusable: bool) -> None:
        if connection not in self._open:
            return
        kept = self._idle.get(connection.key)
        if reusable and (kept is None or len(kept) < self._max_idle):
            connection.idle_since = asyncio.get_running_loop().time()
            if kept is None:
                kept = self._idle[connection.key] = []
                self._rounds.enter(self)
            kept.append(connection)
            return
        self._open.discard(connection)
        connection.close()
        if kept is not None and connection in kept:
            kept.remove(connection)

    def look(self, now: float) -> None:
        """Close what has been idle for so long that its sandbox may do so."""
        for key, kept in list(self._idle.items()):
            for connection in [one for one in kept if one.idle_since + self._idle_seconds <= now]:
                kept.remove(connection)
                connection.close()
            if not kept:
                del self._idle[key]
        if not self._idle:
            self._rounds.leave(self)


def _unreachable(route: Route) -> ConnectFailed:
    return ConnectFailed(f"sandbox {route.session} cannot be reached; try again, or spawn another")


class Answer:
    """A `Sink` that keeps a whole, bounded response."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.done = asyncio.Event()
        self.status = 0
        self.headers: Headers = ()
        self.body = bytearray()
        self.complete = False
        self.error: AshError | None = None

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        if head is not None:
            self.status, self.headers = head.status, head.headers
        if self.error is not None:
            return
        self.body += data
        self.complete = complete
        if len(self.body) > self._max_bytes:
            self.error = RemoteProtocolError("the sandbox's answer is longer than it may be")
        if complete or self.error is not None:
            self.done.set()

    def broken(self, error: AshError) -> None:
        self.error = error
        self.done.set()
