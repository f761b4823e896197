"""The sandbox's end of the egress proxy: a TCP port on its own loopback, copied to the proxy's Unix socket.

Programs take a proxy as a URL with a host and a port; the hive's proxy listens on a Unix socket, by which it knows
whose request it is. Nothing is decided here, so nothing is lost if what runs in the sandbox tampers with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

__all__ = ["HOST", "PORT", "forwarding", "proxy_variables", "serve"]

HOST: Final = "127.0.0.1"
PORT: Final = 3128
_CHUNK: Final = 65_536
_BACKLOG: Final = 512


def proxy_variables(host: str = HOST, port: int = PORT) -> dict[str, str]:
    """Return the environment by which programs find the proxy, and go past it to the sandbox's own servers."""
    url, past = f"http://{host}:{port}", "localhost,127.0.0.1,::1"
    upper = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "NO_PROXY": past}
    return upper | {name.lower(): value for name, value in upper.items()}


async def serve(socket_path: str, host: str = HOST, port: int = PORT) -> None:
    """Forward until cancelled.

    Raises:
        OSError: The port is taken.
    """
    async with forwarding(socket_path, host, port):
        await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def forwarding(socket_path: str, host: str = HOST, port: int = PORT) -> AsyncGenerator[int]:
    """Forward while the context is open; its value is the port, which 0 lets the system choose.

    Raises:
        OSError: The port is taken.
    """
    open_now: set[asyncio.Task[None]] = set()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_forward(reader, writer, socket_path))
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


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
    open_now = [writer]
    try:
        there_reader, there_writer = await asyncio.open_unix_connection(path, limit=_CHUNK)
        open_now.append(there_writer)
        await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))
    except OSError:
        # The proxy is away for a moment, or one side broke off: the other sees the same.
        for each in open_now:
            each.transport.abort()
    finally:
        for each in open_now:
            each.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
