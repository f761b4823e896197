"""A hive that is stopped for a while, until its keeper cuts it off: it joins again and has lost no sandbox."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from pydantic import SecretStr

from ash_hub.backends.local.keeper.control import MOST_UNREAD_BYTES
from ash_hub.backends.local.link import KeeperLink
from ash_hub.backends.local.paths import hive_paths
from ash_hub.chosen_backend import shared_by_replicas
from ash_hub.settings import HubSettings
from ash_mcp import Hive
from tests.hub.backends.local.local_parts import needs_isolation
from tests.redis_server import RedisServer
from tests.system.crash_parts import Home, home

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.heavy, needs_isolation]

FOR_EVER = 1e12
"""On the steady clock, in seconds."""
PADDING_BYTES = 1024 * 1024
JOINED_AGAIN = "the connection to the keeper was lost, and is there again"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def connections(pid: int) -> int:
    """Return how many sockets a process holds."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += os.readlink(link).startswith("socket:")
    return count


@asynccontextmanager
async def another_replica(place: Home, redis: RedisServer) -> AsyncGenerator[KeeperLink]:
    """Join the keeper as a replica of the hive that does nothing by itself."""
    shared = shared_by_replicas(HubSettings(redis_url=SecretStr(redis.url)))
    link = await KeeperLink.open(hive_paths(place.settings).control, shared=shared)
    heard: list[Mapping[str, Any]] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(link.run, heard.append)
        try:
            yield link
        finally:
            await link.aclose()


async def cut_off(place: Home, link: KeeperLink, sandbox_id: str) -> None:
    """Have the keeper tell of changed records until it no longer waits for a hub that reads none of it."""
    (view,) = [view for view in link.hello["sandboxes"] if view["id"] == sandbox_id]
    keeper = place.known_keeper()
    before, told, revision = connections(keeper), 0, view["revision"]
    while connections(keeper) == before:
        assert told <= 2 * MOST_UNREAD_BYTES, "the hive was not cut off"
        padded = {**view["record"], "padding": "x" * PADDING_BYTES}
        await link.request("annotate", id=sandbox_id, record=padded, revision=revision, until=FOR_EVER)
        told, revision = told + PADDING_BYTES, revision + 1
    assert told > MOST_UNREAD_BYTES
    await link.request("annotate", id=sandbox_id, record=view["record"], revision=revision, until=FOR_EVER)


async def test_a_hive_that_was_stalled_and_cut_off_joins_again_and_loses_no_sandbox(redis: RedisServer) -> None:
    with home(ASH_HUB_REDIS_URL=redis.url) as place:
        async with Hive(await anyio.to_thread.run_sync(place.start)) as hive:
            kept, noisy, gone = [await hive.spawn("echo") for _ in range(3)]
            hub = place.hubs[-1].pid
            async with another_replica(place, redis) as link:
                os.kill(hub, signal.SIGSTOP)
                try:
                    with anyio.fail_after(30):
                        await cut_off(place, link, noisy.id)
                        await link.request("stop", id=gone.id, grace_seconds=0.0)
                    assert JOINED_AGAIN not in place.said()
                finally:
                    os.kill(hub, signal.SIGCONT)
                with anyio.fail_after(10):
                    while {info.session for info in await hive.list()} != {kept.session, noisy.session}:
                        await anyio.sleep(0.05)
                assert JOINED_AGAIN in place.said()
                for box in (kept, noisy):
                    assert (await box.call("echo", text="unharmed")).structured == {"text": "unharmed"}
                async with hive.spawn("echo") as fresh:
                    assert (await fresh.call("echo", text="x")).structured == {"text": "x"}
            assert {info.session for info in await hive.list()} == {kept.session, noisy.session}
        assert place.stop_hub() == 0
        assert place.remains() == []
