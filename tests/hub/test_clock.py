"""Somebody sets the machine's clock while a hive runs."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash_hub.app import open_hive
from ash_hub.clock import even_clock
from ash_hub.settings import HubSettings
from ash_mcp import Hive
from tests.hub.local_parts import needs_isolation


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


def test_it_starts_at_the_time_of_day_and_keeps_its_pace() -> None:
    wall, steady = [1_000_000.0], [50.0]
    clock = even_clock(lambda: wall[0], lambda: steady[0])
    assert clock() == 1_000_000.0
    steady[0] += 7
    wall[0] -= 86_400
    assert clock() == 1_000_007.0


@needs_isolation
@pytest.mark.anyio
@pytest.mark.parametrize("step", [86_400.0 * 3, -86_400.0], ids=["forward", "back"])
async def test_a_clock_that_is_set_ends_no_sandbox(folder: Path, step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    wall = [time.time]
    monkeypatch.setattr("ash_hub.assembly.even_clock", lambda: even_clock(lambda: wall[0]()))
    settings = HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run")
    async with open_hive(settings) as served, Hive(served.url) as hive, hive.spawn("echo", ttl_seconds=3600) as box:
        wall[0] = lambda: time.time() + step
        assert (await box.call("echo", text="still here")).structured == {"text": "still here"}
        await served.sandboxes.expire()
        (info,) = await hive.list()
        assert info.state == "ready" and info.id == box.id
        assert (await hive.extend(box.session, 7200)).expires_at > info.expires_at
