"""One owner at its worst beside another, at a hive in a process of its own whose sandboxes are stand-ins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import pytest

from ash_hub.bench.callers import Run, percentile, run_callers
from ash_hub.bench.load import cpu_seconds
from ash_hub.bench.relaying import Served, served
from ash_hub.bench.wire import connected, modern_call
from ash_mcp.types import Endpoint

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, pytest.mark.alone]

FLOOD = 250
"""Calls of one owner in flight; the bound is 256."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncGenerator[Served]:
    socket = str(tmp_path / "standin.sock")
    async with served("standin", socket), served("crowd", socket, "5", "ann", "bob") as hive:
        yield hive


def calls(hive: Served, owner: str, count: int) -> list[bytes]:
    bearer = {"authorization": f"Bearer {hive.said['tokens'][owner]}"}
    names = [f"sb{number % 5 + 1}_tool_{number % 20}" for number in range(count)]
    return [modern_call("tools/call", {"name": name, "arguments": {}}, bearer) for name in names]


async def test_a_flood_keeps_no_new_connection_of_another_waiting(hive: Served) -> None:
    latencies: list[float] = []

    async def come(request: bytes) -> None:
        began = time.perf_counter()
        async with connected(Endpoint(host="127.0.0.1", port=hive.port)) as wire:
            assert not (await wire.exchange(request)).message()["result"]["isError"]
        latencies.append(time.perf_counter() - began)

    with anyio.fail_after(40):
        used = cpu_seconds(hive.pid)
        flood = asyncio.create_task(run_callers(hive.port, hive.pid, 2.5, calls(hive, "ann", FLOOD)))
        while cpu_seconds(hive.pid) < used + 0.5:  # until the flood is what the hive does
            await asyncio.sleep(0.02)
        async with anyio.create_task_group() as group:
            for request in calls(hive, "bob", 64):
                group.start_soon(come, request)
        (run,) = await flood
    # accepted one in a turn of the loop, the last of them would wait for 64 turns
    assert len(latencies) == 64
    assert max(latencies) < 24 * percentile(run.latencies, 0.5)


async def test_equal_callers_get_about_the_same_and_a_lone_one_of_another_owner_more(hive: Served) -> None:
    with anyio.fail_after(40):
        quiet, flood = await run_callers(hive.port, hive.pid, 2.0, calls(hive, "bob", 1), calls(hive, "ann", FLOOD))
    assert flood.spread < 2
    assert min(quiet.completions) > 2 * median_of(flood)


def median_of(run: Run) -> int:
    return sorted(run.completions)[len(run.completions) // 2]
