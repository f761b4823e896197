"""How soon what one side does reaches the other: events of a sandbox, and a caller's giving up. `-s` shows figures."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_hub.bench.relaying import served
from ash_hub.bench.wire import modern_call
from tests.router.relay_parts import Rig, legacy, modern
from tests.router.sandbox_parts import STREAM_HEAD, Box, chunk, open_script
from tests.router.sessions.test_relay_sessions import message, session

pytestmark = pytest.mark.anyio

EVENTS = 100
ROUNDS = 10
EVENT = b'event: message\r\ndata: {"jsonrpc":"2.0","method":"notifications/progress","params":{"at":%.9f}}\r\n\r\n'


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


def told(what: str, seconds: list[float], median: float) -> None:
    """Print the figure, and refuse what no busy machine explains."""
    ordered = sorted(seconds)
    middle = statistics.median(ordered)
    print(f"{what}: median {middle * 1000:.3f} ms, worst {ordered[-1] * 1000:.3f} ms")  # noqa: T201
    assert middle < median


@pytest.mark.parametrize("door", ["by name", "directly"])
async def test_an_event_is_on_the_callers_wire_when_the_sandbox_has_sent_it(tmp_path: Path, door: str):
    """The relay is a process of its own, so that only its time counts; asked for are 5 ms."""
    seen = asyncio.Semaphore(0)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(STREAM_HEAD)
        for _ in range(EVENTS):
            writer.write(chunk(EVENT % time.perf_counter()))
            await seen.acquire()

    late: list[float] = []
    async with open_script(tmp_path, script) as socket, served("plane", str(socket), "1") as plane:
        headers, name = plane.bearer(), "sb0_steps"
        if door == "directly":
            headers["x-session-id"], name = plane.said["sandbox_id"], "steps"
        reader, writer = await asyncio.open_connection("127.0.0.1", plane.port)
        writer.write(modern_call("tools/call", {"name": name, "arguments": {}}, headers))
        with anyio.fail_after(30):
            for _ in range(EVENTS):
                await reader.readuntil(b'"at":')
                sent_at = float((await reader.readuntil(b"}"))[:-1])
                late.append(time.perf_counter() - sent_at)
                seen.release()
        writer.close()
    told(f"an event, {door}", late, 0.05)


async def test_giving_up_a_stateless_call_stops_the_work_at_once(rig: Rig, box: Box):
    late: list[float] = []
    for _ in range(ROUNDS):
        async with rig.connect() as wire:
            await wire.send(modern("sb1_wait"))
            with anyio.fail_after(10):
                await box.waiting.wait()
            start = time.perf_counter()
        with anyio.fail_after(10):
            await box.cancelled.wait()
        late.append(time.perf_counter() - start)
        box.waiting.clear()
        box.cancelled.clear()
    told("a closed stream", late, 0.5)


async def test_giving_up_a_call_of_the_handshake_era_stops_the_work_at_once(rig: Rig, box: Box):
    late: list[float] = []
    async with session(rig) as (wire, session_id), rig.connect() as other:
        for number in range(1, ROUNDS + 1):
            await wire.send(legacy(message("tools/call", {"name": "sb1_wait"}, number), session_id))
            with anyio.fail_after(10):
                await box.waiting.wait()
            start = time.perf_counter()
            await other.send(legacy(message("notifications/cancelled", {"requestId": number}), session_id))
            with anyio.fail_after(10):
                await box.cancelled.wait()
            late.append(time.perf_counter() - start)
            assert (await other.answer())[0] == 202
            assert (await wire.answer())[0] == 200
            box.waiting.clear()
            box.cancelled.clear()
    told("a cancellation", late, 0.5)
