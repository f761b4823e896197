"""Sandboxes for the relay's tests: real MCP servers, and scripts that say exactly what a hostile one would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import anyio
import uvicorn
from fastmcp import Context, FastMCP

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'event: message\r\ndata: {"jsonrpc":"2.0","method":"notifications/progress"}\r\n\r\n'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Server(uvicorn.Server):
    """A uvicorn that leaves signals alone and starts and stops at once, not at the next tick."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._up = asyncio.Event()
        self._over = asyncio.Event()
        self.graceful = False

    def stop(self) -> None:
        self._over.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._over.wait()

    async def shutdown(self, sockets: Any = None) -> None:
        if self.graceful:
            await super().shutdown(sockets)
            return
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            cast("Any", connection).transport.abort()
        await self.lifespan.shutdown()

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._up.set()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        task = asyncio.ensure_future(self.serve())
        try:
            with anyio.fail_after(10):
                await self._up.wait()
            yield
        finally:
            self.stop()
            await task


def config(app: Any, **more: Any) -> uvicorn.Config:
    settings: dict[str, Any] = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 2, "ws": "none"}
    return uvicorn.Config(app, **(settings | more))


def box_server() -> tuple[FastMCP, Box]:
    """A sandbox's MCP server, and what its tools saw."""
    server = FastMCP("box")
    box = Box()

    @server.tool
    def add(a: int, b: int) -> int:
        box.ran.append("add")
        return a + b

    @server.tool(name="echo")
    def echo(value: Any = None) -> dict[str, Any]:
        return {"value": value}

    @server.prompt
    def greet(name: str) -> str:
        return f"hello {name}"

    @server.tool
    async def steps(ctx: Context) -> str:
        await ctx.report_progress(1, 2, "one")
        await ctx.info("half way")
        await ctx.report_progress(2, 2, "two")
        return "done"

    @server.tool
    async def wait() -> str:
        box.waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            box.cancelled.set()
            raise
        return "never"

    return server, box


@dataclass
class Box:
    """What happened inside a sandbox."""

    ran: list[str] = field(default_factory=list[str])
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    heads: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    socket: Path = Path()

    def posted(self, method: str = "POST") -> list[dict[str, str]]:
        return [head for head in self.heads if head[":method"] == method]


@asynccontextmanager
async def open_box(
    directory: Path, name: str = "box", server: FastMCP | None = None, **more: Any
) -> AsyncGenerator[Box]:
    """A real FastMCP server on a Unix socket."""
    usual, box = box_server()
    inner = (server or usual).http_app(path="/mcp", host_origin_protection=False, **more)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen = {key.decode(): value.decode("latin-1") for key, value in scope["headers"]}
            box.heads.append({":method": scope["method"], **seen})
        await inner(scope, receive, send)

    box.socket = directory / f"{name}.sock"
    async with Server(config(app, uds=str(box.socket))).running():
        yield box


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def open_script(directory: Path, script: Script, name: str = "script") -> AsyncGenerator[Path]:
    """A sandbox that runs `script` on every connection."""
    socket = directory / f"{name}.sock"
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await script(reader, writer)
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass  # the relay hung up, or the test is over
        finally:
            writer.close()

    async with AsyncExitStack() as stack:
        server = await asyncio.start_unix_server(serve, socket, limit=2**22)
        stack.callback(server.close)
        yield socket
        for task in tasks:
            task.cancel()


async def read_request(reader: asyncio.StreamReader) -> tuple[dict[str, str], bytes]:
    """Read one request as a sandbox would: its headers and its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
    headers = {":method": head[0].split()[0], **dict(line.lower().split(": ", 1) for line in head[1:])}
    return headers, await reader.readexactly(int(headers["content-length"]))


def says(response: bytes, *, then_close: bool = False) -> Script:
    """A script that gives one fixed answer to every request."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(response)
            await writer.drain()
            if then_close:
                return

    return script


def response(body: bytes, *, status: str = "200 OK", more: str = "", kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body
