"""A load generator: requests made of bytes beforehand, over some connections at once, one at a time on each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import httptools

from ash_mcp.errors import AshTimeout, RemoteProtocolError

__all__ = ["Load", "cpu_seconds", "drive"]


_PATIENCE_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """What one run came to."""

    calls: int
    seconds: float
    cpu_seconds: float
    """Of the process that was measured."""

    @property
    def rate(self) -> float:
        return self.calls / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Processor time of the measured process for one call."""
        return self.cpu_seconds / self.calls * 1000


def cpu_seconds(pid: int) -> float:
    """Return the processor time that all threads of a process have used, in the kernel's own nanoseconds."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


async def drive(port: int, requests: Sequence[bytes], pid: int, *, calls: int) -> Load:
    """Send each of `requests` over a connection of its own, again and again, until `calls` are answered in all.

    Raises:
        AshTimeout: They took longer than anything measured here may.
        RemoteProtocolError: One was refused, or answered by something that is no HTTP.
    """
    loop = asyncio.get_running_loop()
    remaining = [calls]
    clients = [_Client(request, remaining) for request in requests]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    used, began = cpu_seconds(pid), time.perf_counter()
    for client in clients:
        client.ask()
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await asyncio.gather(*(client.done for client in clients))
    except TimeoutError as exc:
        raise AshTimeout(f"{calls} calls were not answered within {_PATIENCE_SECONDS:g} s") from exc
    finally:
        for client in clients:
            client.close()
    return Load(calls, time.perf_counter() - began, cpu_seconds(pid) - used)


class _Client(asyncio.Protocol):
    def __init__(self, request: bytes, remaining: list[int]) -> None:
        self._request = request
        self._remaining = remaining
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._whole_length = 0
        """Of an answer that came in one piece: the next one of this length and status is taken for the like of it."""
        self._between = True
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def ask(self) -> None:
        assert self._transport is not None
        if self._remaining[0] > 0:
            self._remaining[0] -= 1
            self._transport.write(self._request)
        elif not self.done.done():
            self.done.set_result(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._between and len(data) == self._whole_length and data.startswith(b"HTTP/1.1 200 "):
            self.ask()  # without a parser that would only slow down who is measured
            return
        first, self._between = self._between, False
        self._parser.feed_data(data)
        self._whole_length = len(data) if first and self._between else 0

    def on_message_complete(self) -> None:
        self._between = True
        status = self._parser.get_status_code()
        if status == 200:
            self.ask()
        elif not self.done.done():
            self.done.set_exception(RemoteProtocolError(f"a call was answered with {status}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RemoteProtocolError("the connection broke under a call"))
