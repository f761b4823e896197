"""Every credential at every spelling of every door to a sandbox: one table, for any hive, local and on a cluster."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.kubernetes.conftest import opened
from tests.kubernetes.pod_parts import environment_of, serving
from tests.system.door_table import TRICKS, Table, check, doors_of, open_table

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(
    scope="module",
    params=[pytest.param("local", marks=pytest.mark.heavy), pytest.param("kubernetes", marks=pytest.mark.kubernetes)],
)
async def table(request: pytest.FixtureRequest) -> AsyncGenerator[Table]:
    home = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))  # a socket's path must be short
    try:
        async with AsyncExitStack() as stack:
            environment = stack.enter_context(pytest.MonkeyPatch.context())
            if request.param == "kubernetes":
                for name, value in environment_of(await stack.enter_async_context(opened())).items():
                    environment.setenv(name, value)
            url = await stack.enter_async_context(serving(home))
            yield await stack.enter_async_context(open_table(url, home / "state"))
    finally:
        shutil.rmtree(home)


@pytest.mark.parametrize("trick", TRICKS)
async def test_a_door_opens_to_whom_it_is_for_and_its_path_leads_nowhere_else(table: Table, trick: str):
    for door in doors_of(trick):
        await check(table, trick, door)
