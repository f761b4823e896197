"""A load balancer without stickiness, for tests: each request goes to the next port."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

__all__ = ["alternating"]

_Turns = Iterator[tuple[str, int]]


@asynccontextmanager
async def alternating(
    ports: Sequence[int], *, host: str = "127.0.0.1", headers: Mapping[str, str] | None = None, own_port: int = 0
) -> AsyncGenerator[int]:
    """Serve on a port of this machine. Each request says that its connection ends with it; so the next comes anew.

    Args:
        host: Where the ports are.
        headers: What a connection's first request is given, but for headers that it has itself.
        own_port: 0 is a free one.
    """
    turns = itertools.cycle([(host, port) for port in ports])
    more = {"connection": "close", **(headers or {})}
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await _pass_one(reader, writer, turns, len(ports), more)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", own_port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks)


async def _pass_one(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, turns: _Turns, attempts: int, more: Mapping[str, str]
) -> None:
    line, own = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)
    has = {each.partition(b":")[0].strip().lower() for each in own.split(b"\r\n")}
    added = b"".join(
        f"{name}: {value}\r\n".encode()
        for name, value in more.items()
        if name == "connection" or name.encode() not in has
    )
    upstream_reader, upstream_writer = await _connect(turns, attempts)
    upstream_writer.write(line + b"\r\n" + added + own)
    copies = [
        asyncio.ensure_future(_copy(reader, upstream_writer)),
        asyncio.ensure_future(_copy(upstream_reader, writer)),
    ]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for copy in copies:
            copy.cancel()
        upstream_writer.close()
        await asyncio.gather(*copies, return_exceptions=True)


async def _connect(turns: _Turns, attempts: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for _ in range(attempts):
        with suppress(OSError):
            return await asyncio.open_connection(*next(turns))
    raise ConnectionRefusedError("no replica listens")


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
