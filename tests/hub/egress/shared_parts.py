"""Parts of the tests of a cluster's egress proxy: its process, connections to it, and servers to tunnel to."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ash_hub.egress.signing import greeting, token
from ash_hub.egress.starting import standing_command
from tests.hub.egress.egress_parts import WAIT_SECONDS

CONNECTIONS: Final = 64
"""What the proxy serves at once."""


@dataclass
class Shared:
    key: bytes
    port: int
    health: int
    process: asyncio.subprocess.Process
    opened: list[asyncio.StreamWriter] = field(default_factory=list[asyncio.StreamWriter])

    async def line(self, **expected: Any) -> Mapping[str, Any]:
        """Return the next line of the proxy that has these values."""
        assert self.process.stdout is not None
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                found: dict[str, Any] = json.loads(await self.process.stdout.readline())
                if expected.items() <= found.items():
                    return found

    async def ask(self, sandbox: str, request: bytes, *, first: bytes | None = None) -> bytes:
        reader, _ = await self.connect(sandbox, request, first=first)
        async with asyncio.timeout(WAIT_SECONDS):
            with suppress(ConnectionError):
                return await reader.read()
            return b""

    async def connect(
        self, sandbox: str, request: bytes, *, first: bytes | None = None, address: str = "127.0.0.1"
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0))
        self.opened.append(writer)
        writer.write((greeting(sandbox, token(self.key, sandbox)) if first is None else first) + request)
        return reader, writer

    async def is_ready(self) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.health)
        writer.write(b"GET /readyz HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(WAIT_SECONDS):
            answer = await reader.read()
        writer.close()
        return answer.startswith(b"HTTP/1.1 200 ")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@asynccontextmanager
async def shared_proxy(folder: Path, *, hive: str, key: bytes, drain_seconds: float = 0) -> AsyncGenerator[Shared]:
    """Run the proxy as a pod does; it must end in order when it is told to.

    Args:
        hive: Where it asks, `host:port`.
    """
    (folder / "key").write_text(key.hex())
    ports = free_port(), free_port()
    config = {
        "listen": f"127.0.0.1:{ports[0]}",
        "health": f"127.0.0.1:{ports[1]}",
        "hive": hive,
        "key": str(folder / "key"),
        "connections": CONNECTIONS,
        "drain_seconds": drain_seconds,
    }
    (folder / "egress.json").write_text(json.dumps(config))
    process = await asyncio.create_subprocess_exec(
        *standing_command(folder / "egress.json"), stdout=asyncio.subprocess.PIPE, env={"PATH": os.defpath}
    )
    shared = Shared(key, *ports, process)
    try:
        await shared.line(ready=True)
        yield shared
        process.terminate()
        async with asyncio.timeout(WAIT_SECONDS):
            assert await process.wait() == 0
    finally:
        for writer in shared.opened:
            writer.transport.abort()
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def tunnel_server() -> AsyncGenerator[str]:
    """Say back what comes, at the `address:port` that is given. An address, since under a name TLS must ask for it."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def passes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, first: bool = False) -> bool:
    async with asyncio.timeout(WAIT_SECONDS):
        try:
            if first:
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            writer.write(b"ping")
            return await reader.readexactly(4) == b"ping"
        except (ConnectionError, asyncio.IncompleteReadError):
            return False
