"""The sandbox's end of the egress proxy: a TCP port on its own loopback, copied to the proxy.

Programs take a proxy as a URL with a host and a port. The hive's proxy listens on a Unix socket, by which it knows
whose request it is; a proxy that many sandboxes reach by TCP is told so in a first line. Nothing is decided here, so
nothing is lost if what runs in the sandbox tampers with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

__all__ = ["HOST", "PORT", "forwarding", "greeting", "proxy_variables", "serve"]

HOST: Final = "127.0.0.1"
PORT: Final = 3128
_CHUNK: Final = 65_536
_BACKLOG: Final = 512
_CONNECT_SECONDS: Final = 10.0


def proxy_variables(host: str = HOST, port: int = PORT) -> dict[str, str]:
    """Return the environment by which programs find the proxy, and go past it to the sandbox's own servers."""
    url, past = f"http://{host}:{port}", "localhost,127.0.0.1,::1"
    upper = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "NO_PROXY": past}
    return upper | {name.lower(): value for name, value in upper.items()}


def greeting(sandbox_id: str, token: str) -> bytes:
    """Return the first line of a connection to a proxy of many sandboxes."""
    return f"ASH-EGRESS 1 {sandbox_id} {token}\r\n".encode("ascii")


async def serve(socket_path: str, host: str = HOST, port: int = PORT) -> None:
    """Forward until cancelled.

    Raises:
        OSError: The port is taken.
    """
    async with forwarding(socket_path, host, port):
        await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def forwarding(place: str, host: str = HOST, port: int = PORT, first: bytes = b"") -> AsyncGenerator[int]:
    """Forward while the context is open; its value is the port, which 0 lets the system choose.

    Args:
        place: The path of a Unix socket, or `host:port`.
        first: What each connection there begins with.

    Raises:
        OSError: The port is taken.
    """
    open_now: set[asyncio.Task[None]] = set()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_forward(reader, writer, place, first))
        open_now.add(task)
        task.add_done_callback(open_now.discard)

    server = await asyncio.start_server(accepted, host, port, limit=_CHUNK, backlog=_BACKLOG)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in open_now:
            task.cancel()
        if open_now:
            await asyncio.wait(open_now)


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, place: str, first: bytes) -> None:
    open_now = [writer]
    try:
        there_reader, there_writer = await _connected(place)
        open_now.append(there_writer)
        there_writer.write(first)
        await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))
    except OSError:
        # The proxy is away for a moment, or one side broke off: the other sees the same.
        for each in open_now:
            each.transport.abort()
    finally:
        for each in open_now:
            each.close()


async def _connected(place: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if place.startswith("/"):
        return await asyncio.open_unix_connection(place, limit=_CHUNK)
    host, _, port = place.rpartition(":")
    async with asyncio.timeout(_CONNECT_SECONDS):
        return await asyncio.open_connection(host.strip("[]"), int(port), limit=_CHUNK)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
