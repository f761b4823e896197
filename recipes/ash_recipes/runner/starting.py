"""Answers while the recipe's server starts.

In a thread of its own, since the import of a recipe holds the main one: its objects belong to that thread and to the
loop that serves them later. A connection gets its proof, if it asks for one, then one answer, and is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
import socket
import threading
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from ash_recipes.runner.config import RunnerConfig
from ash_recipes.runner.health import HEALTH_PATH, STARTING, Health
from ash_recipes.runner.listener import BACKLOG
from ash_recipes.runner.problems import Problem, refusal
from ash_recipes.runner.proof import NONCE_HEADER, PROOF_PATH, prove
from ash_recipes.runner.tokens import TokenCheck

__all__ = ["StartingServer", "polling_loop"]

MAX_HEAD_BYTES: Final = 65_536
MAX_OPEN: Final = 256
"""Connections at once; more are closed."""
READ_SECONDS: Final = 10.0
"""For a head."""
LINGER_SECONDS: Final = 1.0
"""For the rest of a request that was answered: bytes that nobody has read would take the answer with them."""
DRAIN_SECONDS: Final = 10.0
"""For the connections that are open when the recipe's server has started."""


def polling_loop() -> asyncio.AbstractEventLoop:
    """Return a loop that does not stand on epoll.

    The kernel bounds what all processes of a host's user watch with it, and another sandbox may have used that up.
    Where uvloop is refused a watch it aborts.
    """
    return asyncio.SelectorEventLoop(selectors.PollSelector())


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    headers: dict[bytes, bytes | None]
    """None for one that came more than once."""


class StartingServer:
    """Serves until `hand_over`."""

    def __init__(self, config: RunnerConfig, listener: socket.socket) -> None:
        self._config = config
        self._listener = listener.dup()
        self._tokens = TokenCheck.of(config)
        self._health = Health("starting")
        self._open: set[asyncio.Task[None]] = set()
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="starting", daemon=True)

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()
        self._serving.wait()

    def hand_over(self, health: Health) -> None:
        """Accept no more, and tell those who wait how the recipe's server is."""
        self._loop.call_soon_threadsafe(self._end, health)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=polling_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._known = asyncio.Event()
        server = await asyncio.start_server(self._accepted, sock=self._listener, limit=MAX_HEAD_BYTES, backlog=BACKLOG)
        self._serving.set()
        await self._known.wait()
        server.close()
        if self._open:
            await asyncio.wait(self._open, timeout=DRAIN_SECONDS)

    def _end(self, health: Health) -> None:
        self._health = health
        self._known.set()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_OPEN:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._converse(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, ValueError, asyncio.LimitOverrunError, EOFError):
            request = await _read_head(reader)
            if (request.method, request.path) == ("GET", PROOF_PATH):
                writer.write(_response(*self._prove(request), last=False))
                request = await _read_head(reader)
            writer.write(_response(*await self._answer(request), last=True))
            writer.write_eof()
            async with asyncio.timeout(LINGER_SECONDS):
                while await reader.read(MAX_HEAD_BYTES):
                    pass
        writer.close()

    def _prove(self, request: _Request) -> tuple[int, dict[str, Any]]:
        try:
            return 200, prove(self._config, request.headers.get(NONCE_HEADER))
        except Problem as exc:
            return exc.http_status, exc.to_json()

    async def _answer(self, request: _Request) -> tuple[int, dict[str, Any]]:
        admitted = self._tokens.admits(request.headers.get(b"ash-token"))
        if (request.method, request.path) == ("GET", HEALTH_PATH):
            if admitted:  # the hive asks once, and waits
                await self._known.wait()
            return self._health.answer(self._config, admitted=admitted)
        if not admitted:
            return 401, refusal("unauthenticated", "a good Ash-Token is needed")
        return 503, STARTING


async def _read_head(reader: asyncio.StreamReader) -> _Request:
    """Read a request's head.

    Raises:
        ValueError: It is not one.
    """
    async with asyncio.timeout(READ_SECONDS):
        head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    method, target, _ = first.decode("ascii").split(" ")
    headers: dict[bytes, bytes | None] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.lower()] = None if name.lower() in headers else value.strip()
    return _Request(method, target.partition("?")[0], headers)


def _response(status: int, shape: dict[str, Any], *, last: bool) -> bytes:
    body = json.dumps(shape).encode()
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(["connection: close"] if last else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
