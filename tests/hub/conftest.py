"""Fixtures of the hub's tests; what they are made of is in `world.py`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from ash_hub.backends.memory import MemoryBackend
from tests.hub.backends.local.local_parts import directories
from tests.hub.world import MakeWorld, StandIn, World, assemble, serving, watched


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # uvicorn, redis-py and kubernetes-asyncio need it, so the hub runs there alone


@pytest.fixture
def root() -> Iterator[Path]:
    """Where a local backend has its directories."""
    with directories() as path:
        yield path


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncGenerator[MakeWorld]:
    """Build worlds; several in one test share state directory and backend, and the next ends the one before."""
    async with AsyncExitStack() as stack:
        runner = StandIn(tmp_path / "runner.sock")
        await stack.enter_async_context(serving(runner))
        backends = [MemoryBackend(runner.serve)]

        worlds: list[World] = []

        async def make(**settings: Any) -> World:
            for before in worlds:
                before.life.cancel()
            world = assemble(tmp_path, backends[0], runner, settings)
            worlds.append(world)
            await stack.enter_async_context(watched(world))
            return world

        yield make


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    return await make_world()
