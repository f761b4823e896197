"""Fixtures of the SDK's tests.

`hive` is a hive of whatever kind: the twin, or with `ASH_TEST_URL` a real one that runs there. Tests of behaviour take
only that; tests of faults take `twin` too and are skipped where there is none.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ash_mcp import Hive, Sandbox
from tests.ash_mcp.twin import TwinHive


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    for name in ("ASH_URL", "ASH_TOKEN", "ASH_SCOPE", "ASH_TIMEOUT_SECONDS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def twin(tmp_path: Path) -> Iterator[TwinHive]:
    if "ASH_TEST_URL" in os.environ:
        pytest.skip("faults can be played only on the twin")
    twin = TwinHive(tmp_path)
    yield twin
    twin.close()


@pytest.fixture
async def hive(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Hive]:
    url = os.environ.get("ASH_TEST_URL")
    made = Hive(url) if url else Hive(transport=request.getfixturevalue("twin").transport)
    async with made as hive:
        yield hive


@pytest.fixture
async def box(hive: Hive) -> AsyncIterator[Sandbox]:
    async with hive.spawn() as box:
        yield box
