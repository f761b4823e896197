"""`ash up --stdio` without a hive: it starts one in the background, shares it, and finds another when it dies."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from ash_mcp.bridge.hive_face import FACE_FILE
from ash_mcp.paths import HIVE_FILE
from tests.hive_face import read_face
from tests.hive_process import BRIDGE

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Home:
    """Directories of a user who runs no hive yet."""

    def __init__(self, path: Path) -> None:
        self.environ = {
            "ASH_HUB_STATE_DIR": str(path / "state"),
            "ASH_HUB_RUN_DIR": str(path / "run"),
            "ASH_HUB_IDLE_EXIT_SECONDS": "1",
        }
        self._announced = path / "run" / HIVE_FILE

    @property
    def pid(self) -> int:
        return int(json.loads(self._announced.read_text())["pid"])

    @property
    def serves(self) -> bool:
        return self._announced.exists()


@pytest.fixture
def home() -> Iterator[Home]:
    path = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))  # a socket's path must be short
    home = Home(path)
    yield home
    if home.serves:  # asked to end, it takes its keeper along; killed, it would leave it waiting for the next hive
        hive = os.pidfd_open(home.pid)
        signal.pidfd_send_signal(hive, signal.SIGTERM)
        assert select.select([hive], [], [], 20)[0], "the hive did not end"
        os.close(hive)
    shutil.rmtree(path)


@asynccontextmanager
async def _client(home: Home, mode: Any) -> AsyncGenerator[Client]:
    command, *arguments = BRIDGE
    with anyio.fail_after(60):
        parameters = StdioServerParameters(command=command, args=arguments, env=home.environ)
        async with Client(stdio_client(parameters), mode=mode) as client:
            yield client


async def _ended(pid: int) -> None:
    """Wait until a process has ended."""
    descriptor = os.pidfd_open(pid)
    with anyio.fail_after(20):
        await anyio.wait_readable(descriptor)
    os.close(descriptor)


async def test_the_bridge_says_before_there_is_a_hive_what_a_hive_says(hive_url: str) -> None:
    told = await anyio.to_thread.run_sync(read_face, f"{hive_url}/in/nobody")
    assert told == json.loads(FACE_FILE.read_text()), "python -m tests.hive_face writes the file anew"


async def test_two_bridges_start_one_hive_which_ends_when_nobody_uses_it(home: Home) -> None:
    pids: list[int] = []

    async def use(mode: str) -> None:
        async with _client(home, mode) as client:
            assert (await client.call_tool("list", {})).structured_content == {"sandboxes": [], "runs": []}
            pids.append(home.pid)

    async with anyio.create_task_group() as group:
        group.start_soon(use, "legacy")
        group.start_soon(use, "auto")
    assert len(pids) == 2 and len(set(pids)) == 1
    await _ended(pids[0])
    assert not home.serves


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_bridge_outlives_its_hive(home: Home, mode: str) -> None:
    async with _client(home, mode) as client:
        assert not (await client.call_tool("list", {})).is_error
        first = home.pid
        os.kill(first, signal.SIGKILL)
        await _ended(first)
        assert (await client.call_tool("list", {})).structured_content == {"sandboxes": [], "runs": []}
        assert home.pid != first
