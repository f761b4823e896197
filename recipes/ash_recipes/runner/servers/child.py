"""A recipe's server in a process of its own, and the one connection that the runner has to it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TextIO, cast
from urllib.parse import urlsplit

import anyio
from anyio.abc import TaskStatus
from mcp.client._transport import Transport
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.shared.exceptions import MCPError
from mcp_types import CONNECTION_CLOSED, Implementation

from ash_recipes.runner.context import Context
from ash_recipes.runner.jobs import stop
from ash_recipes.runner.processes import READ_BYTES, Process, Stream
from ash_recipes.runner.servers.asking import Calls
from ash_recipes.runner.servers.base import StartProblem

__all__ = ["Child", "http_client_of", "stdio_client_of"]

TAIL_BYTES = 4096
PORT_POLL_SECONDS = 0.05

log = logging.getLogger("ash_recipes.runner")

Connect = Callable[[], AbstractAsyncContextManager[Client]]


class Tail:
    """Passes a child's words on to the sandbox's log and keeps the last of them, to say why it ended."""

    def __init__(self) -> None:
        self._last = bytearray()

    def written(self, stream: Stream, data: bytes) -> None:
        del stream
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()
        self._last += data
        del self._last[:-TAIL_BYTES]

    def text(self) -> str:
        lines = self._last.decode("utf-8", "replace").strip().splitlines()
        return "; its last words: " + " | ".join(lines[-8:]) if lines else ""


class Child:
    """Keeps one connection to the recipe's server; a server that has ended is started again by the next use.

    Args:
        connect: Starts the server and yields a client that has shaken hands with it.
    """

    def __init__(self, context: Context, connect: Connect) -> None:
        self._context = context
        self._connect = connect
        self._lock = anyio.Lock()
        self._client: Client | None = None
        self._leave = anyio.Event()
        self._left = anyio.Event()

    async def client(self) -> Client:
        """Return the client of the running server, started if need be.

        Raises:
            StartProblem: It does not start.
        """
        async with self._lock:
            client = self._client
            if client is None:
                # Connections have scopes of their own, which a task must leave in the order it entered them.
                client = await self._context.jobs.tasks.start(self._hold)
                self._client = client
            return client

    def lost(self, client: Client) -> None:
        """Take note that the connection of `client` is of no use any more."""
        if self._client is client:
            self._client = None
            self._leave.set()

    async def restart(self) -> None:
        """End the server and start it again, with the environment of now.

        Raises:
            StartProblem: It does not start.
        """
        await self.aclose()
        await self.client()

    async def aclose(self) -> None:
        """End the server."""
        async with self._lock:
            if self._client is not None:
                self._client = None
                self._leave.set()
                await self._left.wait()

    async def _hold(self, *, task_status: TaskStatus[Client]) -> None:
        leave, left = anyio.Event(), anyio.Event()
        started = False
        try:
            async with self._connect() as client:
                self._leave, self._left = leave, left
                started = True
                task_status.started(client)
                await leave.wait()
        except Exception as exc:
            if not started:
                cause = _cause(exc)
                raise cause if isinstance(cause, StartProblem) else StartProblem(repr(cause)) from exc
            log.warning("the recipe's server ended badly: %s", exc)
        finally:
            left.set()


@asynccontextmanager
async def stdio_client_of(command: Sequence[str], context: Context, cwd: Path, calls: Calls) -> AsyncGenerator[Client]:
    """Start a command that speaks MCP on its stdin and stdout, and connect to it."""
    parameters = StdioServerParameters(
        command=command[0], args=list(command[1:]), env=context.environment.variables(), cwd=cwd
    )
    tail = Tail()
    async with _pipe_into(tail) as errors, AsyncExitStack() as stack:

        def make(mode: str) -> Client:
            return _client(stdio_client(parameters, errors), mode, calls)

        yield await _connected(stack, make, command, tail)


@asynccontextmanager
async def http_client_of(
    command: Sequence[str], url: str, context: Context, cwd: Path, calls: Calls
) -> AsyncGenerator[Client]:
    """Start a command that serves streamable HTTP on loopback, and connect to it once it listens."""
    tail = Tail()
    process = Process(
        list(command), cwd=cwd, env=context.environment.variables(), on_data=tail.written, user=context.user
    )
    async with context.jobs.watched(process):
        try:
            await _wait_for_port(process, urlsplit(url).port or 80, tail)
            async with AsyncExitStack() as stack:
                yield await _connected(stack, lambda mode: _client(url, mode, calls), command, tail)
        finally:
            with anyio.CancelScope(shield=True):
                await stop(process)


def _client(server: Transport | str, mode: str, calls: Calls) -> Client:
    return Client(
        server,
        mode=mode,
        logging_callback=calls.logged,
        elicitation_callback=calls.elicit,
        sampling_callback=calls.sample,
        list_roots_callback=calls.list_roots,
        # Whether a message or a question reaches a caller is that caller's own choice.
        log_level="debug",
        client_info=Implementation(name="ash-runner", version="1"),
        cache=None,
    )


async def _connected(
    stack: AsyncExitStack, make: Callable[[str], Client], command: Sequence[str], tail: Tail
) -> Client:
    """Return a client that has shaken hands, by the handshake that nearly all servers know or without any."""
    for mode in ("legacy", "auto"):
        try:
            return await stack.enter_async_context(make(mode))
        except Exception as exc:
            cause = _cause(exc)
            if isinstance(cause, OSError):
                raise StartProblem(f"{command[0]} cannot be started: {cause.strerror or cause}{tail.text()}") from exc
            if not isinstance(cause, MCPError):
                raise
            if cause.code == CONNECTION_CLOSED:
                raise StartProblem(f"the command ended, or closed its output, at once{tail.text()}") from exc
            refused = cause
    raise StartProblem(f"the command does not speak MCP: {refused}{tail.text()}") from refused


def _cause(exc: BaseException) -> BaseException:
    """Return what task groups on the way have wrapped."""
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    group = cast("BaseExceptionGroup[BaseException]", exc)
    return _cause(group.exceptions[0]) if len(group.exceptions) == 1 else group


@asynccontextmanager
async def _pipe_into(tail: Tail) -> AsyncGenerator[TextIO]:
    """Yield a file to which a child may write its errors; they go to `tail`."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    async def read() -> None:
        while True:
            await anyio.wait_readable(reading)
            data = os.read(reading, READ_BYTES)
            if not data:
                return
            tail.written("stderr", data)

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            with os.fdopen(writing, "w") as errors:
                yield errors
            tasks.cancel_scope.cancel()
    finally:
        os.close(reading)


async def _wait_for_port(process: Process, port: int, tail: Tail) -> None:
    while not process.exited:
        with contextlib.suppress(OSError):
            stream = await anyio.connect_tcp("127.0.0.1", port)
            await stream.aclose()
            return
        await anyio.sleep(PORT_POLL_SECONDS)
    code = await process.wait()
    raise StartProblem(f"the command ended with exit code {code} before it listened on port {port}{tail.text()}")
