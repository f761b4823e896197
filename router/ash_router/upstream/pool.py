"""The pool of connections to endpoints, over Unix sockets or TCP."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from typing import Final

from ash_mcp.errors import AshError, AshTimeout, ConnectFailed, RemoteProtocolError
from ash_mcp.types import Endpoint, SandboxId
from ash_router.bounds import epoll_watches
from ash_router.bounds.deadlines import TimeoutSweeper
from ash_router.http.framing import Headers, ResponseHead, response_problem
from ash_router.upstream.connection import Connection
from ash_router.upstream.inner_ports import MAX_ANSWER_BYTES, SECONDS, opening, problem_in
from ash_router.upstream.proof import Challenge, SandboxKeys

__all__ = ["Answer", "ConnectionPool", "address_uncertain", "open_connection"]

log = logging.getLogger(__name__)

PROOF_SECONDS: Final = 30.0
"""For a proof: longer than for a connection, which the kernel makes, since a tool may hold up the sandbox's loop."""
MAX_PROOF_BYTES: Final = 1024
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS})
"""Errors of the kernel whose cause is this host, not the sandbox."""


class ConnectionPool:
    """Opens connections and keeps idle ones for reuse, by endpoint; closes those that were idle or silent too long.

    Args:
        max_idle: How many idle connections one endpoint may have.
        idle_seconds: How long one is kept; shorter than any server's own patience, so that we close first.
        silent_seconds: How long a host on TCP may give no sign of life where its network stack owes one.
        keys: Keys with which sandboxes on TCP prove themselves; None where no endpoint needs a proof.
        stale: Says why the news of sandboxes is not fresh now, or None. Meanwhile those without a runner are not
            dialled: an address may have come to belong to somebody else, whom they could not be told from.
        problem_of: As with `Connection`.
        mint: Makes the token of a sandbox, for connections to ports inside it.
    """

    def __init__(
        self,
        *,
        connect_timeout_seconds: float,
        max_idle: int,
        idle_seconds: float,
        max_head_bytes: int,
        max_headers: int,
        silent_seconds: int,
        keys: SandboxKeys | None = None,
        stale: Callable[[], str | None] = lambda: None,
        problem_of: Callable[[ResponseHead], str | None] = response_problem,
        mint: Callable[[SandboxId], bytes] | None = None,
    ) -> None:
        self._mint = mint
        self._stale = stale
        self._problem_of = problem_of
        self._silent_seconds = silent_seconds
        self._keys = keys
        self._connect_timeout = connect_timeout_seconds
        self._max_idle = max_idle
        self._idle_seconds = idle_seconds
        self._max_head_bytes = max_head_bytes
        self._max_headers = max_headers
        self._idle: dict[Endpoint, list[Connection]] = {}
        self._open: set[Connection] = set()
        self._sweeper = TimeoutSweeper(min(idle_seconds, silent_seconds) / 4)

    def take_idle(self, endpoint: Endpoint) -> Connection | None:
        """Take an idle connection out of the pool; None if there is no usable one."""
        kept = self._idle.get(endpoint)
        while kept:
            connection = kept.pop()
            if connection.alive and connection.idle_since + self._idle_seconds > asyncio.get_running_loop().time():
                return connection
            connection.close()
        return None

    def has_idle(self, endpoint: Endpoint) -> bool:
        """Say whether a connection is idle that is still good."""
        return any(connection.alive for connection in self._idle.get(endpoint, ()))

    def put_back(self, connection: Connection) -> None:
        """Put back a connection on which nothing was sent."""
        self._release(connection, True)

    async def connect(self, endpoint: Endpoint) -> Connection:
        """Open a new connection.

        Raises:
            ConnectFailed: Nothing listens there, the proof failed, it took too long, or the address may belong to
                another server now. Nothing of the caller was sent.
            PortClosed: Nobody listens on the port inside the sandbox.
            Unsupported: The sandbox's runner is too old to lead to ports.
        """
        if not endpoint.has_runner and (why := self._stale()) is not None:
            raise address_uncertain(why)
        connection = await open_connection(
            endpoint, lambda: self._new(endpoint), self._keys, timeout_seconds=self._connect_timeout
        )
        if endpoint.unix is None:
            connection.expect_life(self._silent_seconds)
        if endpoint.inner_port is not None:
            await self._hand_over(connection, endpoint.inner_port)
        self._open.add(connection)
        self._sweeper.watch(self)
        return connection

    async def _hand_over(self, connection: Connection, port: int) -> None:
        """Have the runner make a connection one to a port inside the sandbox."""
        sandbox = connection.endpoint.sandbox
        assert self._mint is not None and sandbox is not None, "a pool that dials ports has the tokens of sandboxes"
        answer, is_open = Answer(MAX_ANSWER_BYTES), False
        try:
            connection.send(opening(connection.endpoint.authority, port, self._mint(sandbox)), answer)
            async with asyncio.timeout(SECONDS):
                await answer.done.wait()
            if answer.error is not None:
                raise ConnectFailed("the sandbox broke off before it was asked anything; try again") from answer.error
            problem = problem_in(answer.status, bytes(answer.body), port)
            if problem is not None:
                raise problem
            is_open = not connection.closed
        except TimeoutError as exc:
            raise ConnectFailed("the sandbox did not answer in time; nothing was sent, try again") from exc
        finally:
            if not is_open:
                connection.close()
        if not is_open:
            raise ConnectFailed(f"the server on port {port} of the sandbox closed the connection at once; try again")

    async def request(self, endpoint: Endpoint, data: bytes, *, timeout_seconds: float, max_bytes: int) -> Answer:
        """Send one of the hive's own requests and return its whole, bounded answer.

        Raises:
            TransportError: It could not be sent, or the answer did not come in time or in full.
            RemoteProtocolError: The answer is too long or not one.
        """
        answer = Answer(max_bytes)
        connection = self.take_idle(endpoint) or await self.connect(endpoint)
        connection.send(data, answer)
        try:
            async with asyncio.timeout(timeout_seconds):
                await answer.done.wait()
        except TimeoutError as exc:
            raise AshTimeout(f"the sandbox did not answer within {timeout_seconds:g} s") from exc
        finally:
            if not answer.complete:
                connection.close()
        if answer.error is not None:
            raise answer.error
        return answer

    def forget(self, is_over: Callable[[Endpoint], bool]) -> None:
        """Close the idle connections to endpoints whose server has ended."""
        for endpoint in [endpoint for endpoint in self._idle if is_over(endpoint)]:
            for connection in self._idle.pop(endpoint):
                connection.close()

    def close(self) -> None:
        """Close every connection."""
        self._sweeper.close()
        self._idle.clear()
        for connection in list(self._open):
            connection.close()

    def _new(self, endpoint: Endpoint) -> Connection:
        return Connection(
            endpoint,
            self._release,
            max_head_bytes=self._max_head_bytes,
            max_headers=self._max_headers,
            problem_of=self._problem_of,
        )

    def _release(self, connection: Connection, reusable: bool) -> None:
        if connection not in self._open:
            return
        endpoint = connection.endpoint
        kept = self._idle.get(endpoint)
        # how long a server inside keeps a connection is unknown
        if reusable and endpoint.reaches_runner and (0 if kept is None else len(kept)) < self._max_idle:
            connection.idle_since = asyncio.get_running_loop().time()
            if kept is None:
                self._idle[endpoint] = [connection]
            else:
                kept.append(connection)
            return
        self._open.discard(connection)
        connection.close()
        if kept is not None and connection in kept:
            kept.remove(connection)

    def check_timeout(self, now: float) -> None:
        """Close connections that were idle for `idle_seconds`, and those to a silent host."""
        for endpoint, kept in list(self._idle.items()):
            for connection in [one for one in kept if one.idle_since + self._idle_seconds <= now]:
                kept.remove(connection)
                connection.close()
            if not kept:
                del self._idle[endpoint]
        for connection in [one for one in self._open if one.endpoint.unix is None]:
            connection.break_if_silent(self._silent_seconds)
        if not self._open:
            self._sweeper.unwatch(self)


def address_uncertain(why: str) -> ConnectFailed:
    """Return the error for a sandbox without a runner whose address may belong to another server by now."""
    return ConnectFailed(
        "the sandbox has no runner that could prove to be the sandbox, and the hive cannot see now whether its "
        f"address is still its own ({why}); nothing was sent, try again"
    )


async def open_connection(
    endpoint: Endpoint, new: Callable[[], Connection], keys: SandboxKeys | None, *, timeout_seconds: float
) -> Connection:
    """Open a connection, and have the other side prove itself where it must.

    Args:
        timeout_seconds: For the connection; a proof has a time of its own.

    Raises:
        ConnectFailed: Nothing listens there, it is another server, it took too long, or this host has no room. Its
            cause has the kernel's errno where there was no connection.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            connection = await _dial(endpoint, new)
    except TimeoutError as exc:
        exc.errno = errno.ETIMEDOUT  # as where the kernel's own patience ends
        raise _unreachable(exc) from exc
    except OSError as exc:
        raise _unreachable(exc) from exc
    if connection.closed:
        raise _unreachable()
    if endpoint.must_prove:
        assert keys is not None, "a pool that dials sandboxes has their keys"
        await _require_proof(connection, Challenge(keys, endpoint))
    return connection


async def _require_proof(connection: Connection, challenge: Challenge) -> None:
    answer = Answer(MAX_PROOF_BYTES)
    is_proved = False
    try:
        connection.send(challenge.request, answer)
        async with asyncio.timeout(PROOF_SECONDS):
            await answer.done.wait()
        is_proved = answer.complete and challenge.is_answered(answer.status, bytes(answer.body)) and connection.alive
    except TimeoutError as exc:
        raise ConnectFailed("the sandbox did not answer in time; nothing was sent, try again") from exc
    finally:
        if not is_proved:
            connection.close()
    if not is_proved:
        log.warning("the server at %s did not prove to be %s", connection.endpoint.authority, connection.endpoint)
        raise ConnectFailed(
            "whoever listens at the sandbox's address did not prove to be the sandbox; nothing was sent, try again"
        )


async def _dial(endpoint: Endpoint, new: Callable[[], Connection]) -> Connection:
    loop = asyncio.get_running_loop()
    if endpoint.unix is not None:
        ours = epoll_watches.connected(endpoint.unix)
        _, connection = await loop.create_unix_connection(new, sock=ours)
    else:
        assert endpoint.host is not None and endpoint.port is not None
        _, connection = await loop.create_connection(new, endpoint.host, endpoint.port)
    return connection


def _unreachable(error: Exception | None = None) -> ConnectFailed:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return ConnectFailed(
            "the sandbox cannot be reached now: the hive's host has no room for another connection "
            f"({error.strerror}); try again"
        )
    return ConnectFailed("the sandbox cannot be reached; try again, or spawn another")


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
            message = f"the sandbox's answer is larger than {self._max_bytes} bytes"
            self.error = RemoteProtocolError(message, limit=self._max_bytes)
        if complete or self.error is not None:
            self.done.set()

    def broken(self, error: AshError) -> None:
        self.error = error
        self.done.set()
