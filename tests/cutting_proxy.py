"""A way to a hive that can be cut, for tests: connections go to the ports in turn, as bytes, until they are cut."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress

__all__ = ["CuttingProxy", "cutting"]


class CuttingProxy:
    """Its connections, and the ports that new ones go to."""

    def __init__(self, ports: Sequence[int]) -> None:
        self.url = ""
        self._next = itertools.cycle(ports)
        self.connections = 0
        """How many came."""
        self._open: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Break off all that is open, as a network does that comes back at once."""
        for writer in list(self._open):
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(OSError, asyncio.CancelledError):
            there = await asyncio.open_connection("127.0.0.1", next(self._next))
            ends = {writer, there[1]}
            self._open |= ends
            ways = [asyncio.ensure_future(_copy(reader, there[1])), asyncio.ensure_future(_copy(there[0], writer))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._open -= ends
                for way in ways:
                    way.cancel()
                for end in ends:
                    end.close()
                await asyncio.gather(*ways, return_exceptions=True)


@asynccontextmanager
async def cutting(ports: Sequence[int]) -> AsyncGenerator[CuttingProxy]:
    """Serve on a port of this machine while the context is open."""
    proxy = CuttingProxy(ports)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(proxy.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
    try:
        yield proxy
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
