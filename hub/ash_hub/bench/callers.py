"""Callers that go on for a time, and streams that stay open: each call's latency, and who got how many."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import httptools

from ash_hub.bench.load import cpu_seconds
from ash_mcp.errors import AshTimeout, RemoteProtocolError

__all__ = ["Run", "holding", "percentile", "repeating", "resident_kib", "run_callers"]

_PATIENCE_SECONDS: Final = 60.0
_OPENING_AT_ONCE: Final = 50


@dataclass(frozen=True, slots=True)
class Run:
    """What some callers came to in one time."""

    latencies: tuple[float, ...]
    """In seconds, sorted."""
    completions: tuple[int, ...]
    """Of each caller."""
    cpu_seconds: float
    """Of the measured process."""
    resident_kib: int
    """Of the measured process, at the end and with every connection open."""

    @property
    def cpu_ms(self) -> float:
        return self.cpu_seconds / max(1, len(self.latencies)) * 1000

    @property
    def spread(self) -> float:
        """How many calls the luckiest caller got for one of the unluckiest's."""
        return max(self.completions) / max(1, min(self.completions))


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value that `share` of the sorted ones do not exceed."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def resident_kib(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


async def run_callers(port: int, pid: int, seconds: float, *groups: Sequence[bytes]) -> list[Run]:
    """Have a caller for each request of each group repeat it for `seconds`, all at the same time.

    Raises:
        AshTimeout: The last answers did not come.
        RemoteProtocolError: A call was refused.
    """
    callers = [[_Caller(request) for request in group] for group in groups]
    everyone = [caller for group in callers for caller in group]
    try:
        await _connect(port, everyone)
        used, until = cpu_seconds(pid), time.perf_counter() + seconds
        for caller in everyone:
            caller.begin(until)
        async with asyncio.timeout(seconds + _PATIENCE_SECONDS):
            await asyncio.gather(*(caller.done for caller in everyone))
        used, resident = cpu_seconds(pid) - used, resident_kib(pid)
    except TimeoutError as exc:
        raise AshTimeout(f"calls were not answered within {_PATIENCE_SECONDS:g} s") from exc
    finally:
        for caller in everyone:
            caller.close()
    return [_summed(group, used, resident) for group in callers]


@asynccontextmanager
async def holding(port: int, requests: Sequence[bytes]) -> AsyncGenerator[None]:
    """Keep a stream open for each request while the context is open, all of them begun.

    Raises:
        AshTimeout: Not all began.
        RemoteProtocolError: One was refused.
    """
    streams = [_Caller(request, stays=True) for request in requests]
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            for first in range(0, len(streams), _OPENING_AT_ONCE):
                some = streams[first : first + _OPENING_AT_ONCE]
                await _connect(port, some)
                for stream in some:
                    stream.begin(0.0)
                await asyncio.gather(*(stream.done for stream in some))
        yield
    except TimeoutError as exc:
        raise AshTimeout(f"{len(requests)} streams did not begin within {_PATIENCE_SECONDS:g} s") from exc
    finally:
        for stream in streams:
            stream.close()


@asynccontextmanager
async def repeating(port: int, requests: Sequence[bytes]) -> AsyncGenerator[None]:
    """Repeat each request on a connection of its own while the context is open."""
    callers = [_Caller(request) for request in requests]
    try:
        await _connect(port, callers)
        for caller in callers:
            caller.begin(math.inf)
        yield
    finally:
        for caller in callers:
            caller.close()


async def _connect(port: int, callers: Sequence[_Caller]) -> None:
    loop = asyncio.get_running_loop()
    for caller in callers:
        await loop.create_connection(lambda caller=caller: caller, "127.0.0.1", port)


def _summed(callers: Sequence[_Caller], used: float, resident: int) -> Run:
    latencies = sorted(latency for caller in callers for latency in caller.latencies)
    return Run(tuple(latencies), tuple(len(caller.latencies) for caller in callers), used, resident)


class _Caller(asyncio.Protocol):
    """One connection that repeats its request; with `stays` it asks once and is done when the answer begins."""

    def __init__(self, request: bytes, *, stays: bool = False) -> None:
        self._request = request
        self._stays = stays
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._until = self._sent_at = 0.0
        self.latencies: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self, until: float) -> None:
        self._until = until
        self._ask()

    def close(self) -> None:
        self.done.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _ask(self) -> None:
        assert self._transport is not None
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        if self._stays and self._parser.get_status_code() == 200:
            self._end()

    def on_body(self, body: bytes) -> None:
        if b'"isError":true' in body or b'"isError": true' in body:
            self._fail(f"a call failed: {body[-300:]!r}")

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        self.latencies.append(now - self._sent_at)
        status = self._parser.get_status_code()
        if status != 200:
            self._fail(f"a call was answered with {status}")
        elif self._stays or now >= self._until:
            self._end()
        else:
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the connection broke")

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(RemoteProtocolError(why))
