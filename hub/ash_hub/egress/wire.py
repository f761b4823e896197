"""Reading from connections and copying between two of them, within limits on size and time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass

from .lease import Lease
from .limits import Limits, Meter
from .refusal import Refusal

__all__ = ["Clock", "End", "copy", "open_end", "read_head", "read_line"]

_CHUNK = 65_536
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class End:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send_last(self, data: bytes) -> None:
        """Send the last bytes, and give the other side time to read them: closing over unread bytes discards them."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                await self.send(data)
                self.writer.write_eof()
                left = _LINGER_BYTES
                while left > 0 and (data := await self.reader.read(_CHUNK)):
                    left -= len(data)

    async def close(self) -> None:
        """Return when everything written has gone out and the connection is closed."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def abort(self) -> None:
        self.writer.transport.abort()


async def open_end(connection: socket.socket, head_bytes: int) -> End:
    """Wrap a connected socket; it belongs to the result."""
    if connection.family == socket.AF_UNIX:
        return End(*await asyncio.open_unix_connection(sock=connection, limit=head_bytes))
    return End(*await asyncio.open_connection(sock=connection, limit=head_bytes))


async def read_head(end: End) -> bytes | None:
    """Return a head with its empty line; None where the connection ends before its first byte.

    Raises:
        Refusal: It is too long or breaks off.
    """
    await asyncio.sleep(0)  # what has come already is no reason to keep others waiting
    try:
        return await end.reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise Refusal("bad_request", "the head breaks off", status=400) from error
    except asyncio.LimitOverrunError as error:
        raise Refusal("head_too_long", "the head is too long", status=431) from error


async def read_line(end: End) -> bytes:
    """Return a line with its end.

    Raises:
        Refusal: It is too long or breaks off.
    """
    await asyncio.sleep(0)  # as above
    try:
        return await end.reader.readuntil(b"\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise Refusal("bad_request", "the body breaks off or is malformed", status=400) from error


class Clock:
    """Ends an exchange when nothing has moved for too long, or when it has lasted too long.

    Args:
        lease: What has come waits while this does not hold.
    """

    def __init__(self, limits: Limits, meter: Meter, lease: Lease | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._now = loop.time
        self._idle = limits.idle_seconds
        self._last = loop.time() + limits.total_seconds
        self._meter = meter
        self._lease = lease
        self.scope = asyncio.timeout_at(self._next())

    def _next(self) -> float:
        return min(self._now() + self._idle, self._last)

    async def moved(self, count: int) -> None:
        """Count bytes that have come, and return once they may go on."""
        self._meter.add(count)
        if not self.scope.expired():
            self.scope.reschedule(self._next())
        if self._lease is not None:
            await self._lease.held()

    def spent(self) -> str:
        """Name which of the two times is over."""
        return "total_seconds" if self._now() >= self._last else "idle_seconds"


async def copy(source: End, sink: End, clock: Clock, count: int | None = None) -> None:
    """Copy `count` bytes, or all until the end, which is passed on.

    Raises:
        Refusal: Fewer than `count` came.
    """
    left = count
    while left is None or left > 0:
        data = await source.reader.read(_CHUNK if left is None else min(left, _CHUNK))
        if not data:
            if left:
                raise Refusal("bad_request", "the body breaks off", status=400)
            with contextlib.suppress(OSError):
                sink.writer.write_eof()
            return
        await clock.moved(len(data))
        if left is not None:
            left -= len(data)
        await sink.send(data)
