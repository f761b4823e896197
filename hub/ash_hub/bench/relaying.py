"""Cost of the data plane, beside an ASGI relay and FastMCP's own proxy."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream

from ash_hub.bench.load import Load, drive
from ash_hub.bench.rows import Row, median
from ash_hub.bench.wire import connected, handshake, legacy_call, modern_call
from ash_mcp.errors import StartFailed
from ash_mcp.types import Endpoint

__all__ = ["Served", "measure_proxy", "measure_relay", "measure_routes", "served"]

CONNECTIONS: Final = 16
_ROUNDS: Final = 5
_MANY_ROUTES: Final = 10_000
_START_SECONDS: Final = 60.0
_ECHO: Final = {"name": "echo", "arguments": {"text": "hello"}}


@dataclass(frozen=True, slots=True)
class Served:
    """A process that serves for a measurement."""

    pid: int
    said: dict[str, Any]

    @property
    def port(self) -> int:
        return self.said["port"]

    def bearer(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.said['token']}"}


@asynccontextmanager
async def served(*arguments: str) -> AsyncGenerator[Served]:
    """Run one of `servers.py` while the context is open.

    Raises:
        StartFailed: It said nothing in time; its words are in the message.
    """
    command = [sys.executable, "-m", "ash_hub.bench.servers", *arguments]
    async with await anyio.open_process(command, env=dict(os.environ)) as process:
        assert process.stdout is not None and process.stderr is not None and process.stdin is not None
        try:
            with anyio.fail_after(_START_SECONDS):
                line = await BufferedByteReceiveStream(process.stdout).receive_until(b"\n", 65_536)
        except (TimeoutError, anyio.IncompleteRead) as exc:
            process.kill()
            words = b"".join([part async for part in process.stderr])[-2000:].decode(errors="replace")
            raise StartFailed(f"{arguments[0]} did not start: {words}", step="bench") from exc
        try:
            yield Served(process.pid, json.loads(line))
        finally:
            await process.stdin.aclose()
            with anyio.move_on_after(5, shield=True):
                await process.wait()


@asynccontextmanager
async def _constant_socket(stack: AsyncExitStack) -> AsyncGenerator[str]:
    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="ash-bench-", dir="/tmp"))
    socket = str(Path(home) / "constant.sock")
    async with served("constant", socket):
        yield socket


async def _loads(calls: int, **ways: tuple[Served, Sequence[bytes]]) -> dict[str, Load]:
    """Drive each way in turns, a little at a time, and return the middle run of each by its processor time."""
    each = max(CONNECTIONS, calls // _ROUNDS)
    runs: dict[str, list[Load]] = {name: [] for name in ways}
    for name, (server, requests) in ways.items():
        await drive(server.port, requests, server.pid, calls=CONNECTIONS * 2)  # so that all is warm
        assert name in runs
    for _ in range(_ROUNDS):
        for name, (server, requests) in ways.items():
            runs[name].append(await drive(server.port, requests, server.pid, calls=each))
    return {name: _middle(found) for name, found in runs.items()}


def _middle(runs: Sequence[Load]) -> Load:
    middle = median([run.cpu_ms for run in runs])
    return min(runs, key=lambda run: abs(run.cpu_ms - middle))


async def _in_sessions(server: Served) -> list[bytes]:
    """Open a session of the handshake era for each connection, and return a call in each."""
    requests: list[bytes] = []
    for _ in range(CONNECTIONS):
        async with connected(Endpoint(host="127.0.0.1", port=server.port)) as wire:
            inside = await handshake(wire, server.bearer())
            requests.append(legacy_call("tools/call", {**_ECHO, "name": "sb0_echo"}, inside))
    return requests


async def measure_relay(calls: int) -> Sequence[Row]:
    """Many calls at once to something that answers at once: what is left is the relay.

    Each connection sends the same head again and again, as a caller in a loop does; a head that differs from the one
    before it is admitted anew, which costs more.
    """
    async with AsyncExitStack() as stack:
        socket = await stack.enter_async_context(_constant_socket(stack))
        plane = await stack.enter_async_context(served("plane", socket, "10"))
        by_id = modern_call("tools/call", _ECHO, {"x-session-id": plane.said["sandbox_id"], **plane.bearer()})
        by_name = modern_call("tools/call", {**_ECHO, "name": "sb0_echo"}, plane.bearer())
        ways: dict[str, tuple[Served, Sequence[bytes]]] = {
            "direct": (plane, [by_id] * CONNECTIONS),
            "named": (plane, [by_name] * CONNECTIONS),
            "legacy": (plane, await _in_sessions(plane)),
            "bare": (await stack.enter_async_context(served("bare", socket)), [by_id] * CONNECTIONS),
        }
        if importlib.util.find_spec("aiohttp") is not None:
            asgi = await stack.enter_async_context(served("asgi", socket))
            ways["asgi"] = (asgi, [modern_call("tools/call", _ECHO, {})] * CONNECTIONS)
        found = await _loads(calls, **ways)
    asgi_run = found.get("asgi")
    note = "" if asgi_run is not None else " (install aiohttp for the other side)"
    return [
        Row(
            what=f"X-Session-ID relay against ASGI and aiohttp{note}",
            unit="calls/s",
            hive=found["direct"].rate,
            direct=asgi_run.rate if asgi_run is not None else None,
            samples=found["direct"].calls,
            goal="4x",
        ),
        Row(
            what=f"the same, processor time a call{note}",
            unit="ms",
            hive=found["direct"].cpu_ms,
            direct=asgi_run.cpu_ms if asgi_run is not None else None,
            samples=found["direct"].calls,
            goal="0.25x",
        ),
        _cpu_row("the same, against bytes passed on unread", found["direct"], found["bare"], goal="the floor is 1x"),
        _cpu_row("namespaced call, 2026-07-28, processor time", found["named"], found["bare"], goal="0.1 ms"),
        _cpu_row("namespaced call, 2025-11-25, processor time", found["legacy"], found["bare"], goal="0.3 ms"),
    ]


def _cpu_row(what: str, load: Load, other: Load, *, goal: str) -> Row:
    return Row(what=what, unit="ms", hive=load.cpu_ms, direct=other.cpu_ms, samples=load.calls, goal=goal)


async def measure_routes(calls: int) -> Sequence[Row]:
    """A call where there are many routes, beside one where there are few."""
    async with AsyncExitStack() as stack:
        socket = await stack.enter_async_context(_constant_socket(stack))
        few = await stack.enter_async_context(served("plane", socket, "10"))
        many = await stack.enter_async_context(served("plane", socket, str(_MANY_ROUTES)))
        found = await _loads(
            calls,
            **{
                name: (plane, [modern_call("tools/call", {**_ECHO, "name": "sb5_echo"}, plane.bearer())] * CONNECTIONS)
                for name, plane in (("few", few), ("many", many))
            },
        )
    return [
        _cpu_row(f"processor time a call, {_MANY_ROUTES} routes against 10", found["many"], found["few"], goal="1.1x")
    ]


async def measure_proxy(calls: int) -> Sequence[Row]:
    """The same tool of the same FastMCP server, through FastMCP's own proxy and through the data plane."""
    what = "namespaced call against create_proxy, processor time"
    if importlib.util.find_spec("fastmcp") is None:
        return [Row(what=f"{what} (install fastmcp)", unit="ms", hive=math.nan, samples=0)]
    async with AsyncExitStack() as stack:
        tools = await stack.enter_async_context(served("tools"))
        proxy = await stack.enter_async_context(served("proxy", f"http://127.0.0.1:{tools.port}/mcp"))
        plane = await stack.enter_async_context(served("plane", f"tcp:{tools.port}", "10"))
        named = modern_call("tools/call", {**_ECHO, "name": "sb0_echo"}, plane.bearer())
        ours = (await _loads(calls, plane=(plane, [named] * CONNECTIONS)))["plane"]
        theirs = [modern_call("tools/call", {**_ECHO, "name": "sb0_echo"}, {})] * CONNECTIONS
        await drive(proxy.port, theirs, proxy.pid, calls=CONNECTIONS)  # so that all is warm
        slow = await drive(proxy.port, theirs, proxy.pid, calls=max(2 * CONNECTIONS, calls // 50))
    return [_cpu_row(what, ours, slow, goal="1/700")]
