"""A recipe's server in a process of its own, and the one connection that the runner has to it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import anyio
from anyio.abc import TaskStatus
from mcp.client.client import Client
from mcp.client.session import LoggingFnT
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.shared.exceptions import MCPError
from mcp_types import Implementation

from ash_recipes.runner.context import Context
from ash_recipes.runner.processes import Process, Stream
from ash_recipes.runner.servers.base import StartProblem

__all__ = ["Child", "Tail", "http_client", "stdio_connection"]

TAIL_BYTES = 4096
PORT_POLL_SECONDS = 0.05
START_SECONDS = 600.0
"""The hive gives up on a start long before; this only bounds a child that nobody waits for."""

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
            if self._client is None:
                # Connections have scopes of their own, which a task must leave in the order it entered them.
                self._client = await self._context.jobs.tasks.start(self._hold)
            return self._client

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
                raise _start_problem(exc) from exc
            log.warning("the recipe's server ended badly: %s", exc)
        finally:
            left.set()


def _start_problem(exc: BaseException) -> StartProblem:
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    return exc if isinstance(exc, StartProblem) else StartProblem(str(exc) or type(exc).__name__)


@asynccontextmanager
async def stdio_connection(
    command: Sequence[str], context: Context, cwd: Path, logged: LoggingFnT
) -> AsyncIterator[Client]:
    """Start a command that speaks MCP on its stdin and stdout, and connect to it."""
    parameters = StdioServerParameters(
        command=command[0], args=list(command[1:]), env=context.environment.variables(), cwd=cwd
    )
    tail = Tail()
    async with _pipe_into(tail) as errors:
        async with _first_that_connects(lambda mode: Client(stdio_client(parameters, errors), **mode), logged, tail) as client:
            yield client


@asynccontextmanager
async def http_client(
    command: Sequence[str], port: int, path: str, context: Context, cwd: Path, logged: LoggingFnT
) -> AsyncIterator[Client]:
    """Start a command that serves streamable HTTP on loopback, and connect to it once it listens."""
    tail = Tail()
    process = Process(list(command), cwd=cwd, env=context.environment.variables(), on_data=tail.written)
    async with context.jobs.watched(process):
        await _wait_for_port(process, port, tail)
        url = f"http://127.0.0.1:{port}{path}"
        async with _first_that_connects(lambda mode: Client(url, **mode), logged, tail) as client:
            yield client
    process.forget()


async def _wait_for_port(process: Process, port: int, tail: Tail) -> None:
    with anyio.move_on_after(START_SECONDS):
        while not process.exited:
            with contextlib.suppress(OSError):
                stream = await anyio.connect_tcp("127.0.0.1", port)
                await stream.aclose()
                return
            await anyio.sleep(PORT_POLL_SECONDS)
        raise StartProblem(f"the command ended with exit code {await process.wait()} before it listened{tail.text()}")
    raise StartProblem(f"the command did not listen on port {port} in time{tail.text()}")
