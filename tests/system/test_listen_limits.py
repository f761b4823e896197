"""One key at its limit of streams that listen to a real hive, beside another key."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import httpx
import pytest

from ash_hub.app import open_hive
from ash_hub.serving.auth import key_file
from ash_hub.settings import HubSettings
from ash_mcp.types import PrincipalLimits
from tests.system.owners import LEGACY, MODERN, Owner

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("other_era", [LEGACY, MODERN])
@pytest.mark.parametrize("era", [LEGACY, MODERN])
async def test_a_key_at_its_limit_of_streams_is_refused_the_next_until_one_ends(
    folder: Path, era: str, other_era: str
) -> None:
    keys = key_file(folder / "state")
    _, anns = keys.add(subject="ann", limits=PrincipalLimits(streams=1))
    _, bobs = keys.add(subject="bob")
    settings = HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run")
    with anyio.fail_after(30):
        async with open_hive(settings) as hive, httpx.AsyncClient(timeout=30) as client:
            ann, again, bob = Owner(hive, anns, client), Owner(hive, anns, client), Owner(hive, bobs, client)
            for owner in (ann, again, bob):
                await owner.open_session()
            async with AsyncExitStack() as streams:
                first = await streams.enter_async_context(ann.listening(era))
                assert first.status_code == 200
                async with again.listening(other_era) as refused:
                    assert (refused.status_code, refused.headers.get("retry-after")) == (429, "1")
                    await refused.aread()
                error = refused.json()["error"]
                assert error["kind"] == "capacity_exceeded" and error["data"]["limit"] == "key"
                assert "your key allows" in error["message"] and "--max-streams" in error["message"]
                assert (await streams.enter_async_context(bob.listening(era))).status_code == 200
                assert (await again.call("list", {})).status == 200
                await first.aclose()
                status = 429
                while status == 429:  # until the hive has seen the end of the first
                    async with again.listening(other_era) as response:
                        status = response.status_code
                assert status == 200
