"""A TCP proxy that stands for distance: what it passes comes later, and a test may cut it and heal it."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Final, Literal

__all__ = ["Cut", "DelayingProxy", "delaying"]

Cut = Literal["closed", "silent"]
"""What a cut is to those at both ends. closed: their connections end, and new ones are refused. silent: nothing comes,
new connections are not answered, and what was sent meanwhile arrives after the cut, as TCP would send it again."""

_CHUNK_BYTES: Final = 65_536
_MOST_CHUNKS: Final = 1024
"""On the way in one direction of one connection; who sends more has to wait."""


class DelayingProxy:
    """Listens on a loopback port, which it keeps over cuts, and passes everything on to another."""

    def __init__(
        self,
        target: int,
        *,
        delay_seconds: float,
        jitter_seconds: float = 0.0,
        seed: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        self.delay_seconds = delay_seconds
        """Of each direction; a test may change it at any time."""
        self.jitter_seconds = jitter_seconds
        """Up to so much more, drawn for each chunk; chunks stay in order."""
        self._target = (host, target)
        self._chance = random.Random(seed)
        self._passing = asyncio.Event()
        self._passing.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._place = _bound(0)  # never listens: it keeps the port while nobody does
        self.port: int = self._place.getsockname()[1]

    async def cut(self, how: Cut) -> None:
        """Let nothing pass until `heal`."""
        self._passing.clear()
        if how == "closed":
            await self.aclose()

    async def heal(self) -> None:
        """Pass everything on, from now on or again."""
        self._passing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, sock=_bound(self.port))

    async def aclose(self) -> None:
        """Refuse new connections and end all others."""
        if self._server is not None:
            self._server.close()
            self._server = None
        ending = list(self._connections)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def release(self) -> None:
        """Give the port back."""
        self._place.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        try:
            await self._passing.wait()
            with suppress(OSError):
                await self._pass_both_ways(reader, writer)
        except asyncio.CancelledError:
            pass  # cut; asyncio's server would log it
        finally:
            writer.transport.abort()

    async def _pass_both_ways(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        tasks = [asyncio.ensure_future(each) for each in (self._pass(reader, back), self._pass(there, writer))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            back.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on one direction until its end, which comes late as well."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MOST_CHUNKS)
        giving = asyncio.ensure_future(self._give(chunks, writer))
        try:
            due, data = 0.0, b"-"
            while data:
                data = await reader.read(_CHUNK_BYTES)
                late = self.delay_seconds + self._chance.random() * self.jitter_seconds
                due = max(due, asyncio.get_running_loop().time() + late)
                await chunks.put((due, data))
            await giving
        finally:
            giving.cancel()

    async def _give(self, chunks: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due, data = await chunks.get()
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            await self._passing.wait()
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def delaying(
    target: int, *, delay_seconds: float, jitter_seconds: float = 0.0, host: str = "127.0.0.1"
) -> AsyncGenerator[DelayingProxy]:
    """Serve while the context is open, on a free port of this machine, what listens at the port `target` of `host`."""
    proxy = DelayingProxy(target, delay_seconds=delay_seconds, jitter_seconds=jitter_seconds, host=host)
    try:
        await proxy.heal()
        yield proxy
    finally:
        await proxy.aclose()
        proxy.release()


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound
