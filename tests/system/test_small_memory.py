"""Sandboxes with the least memory: they start, and a full disk is told to the command and kills nobody."""

from __future__ import annotations

import anyio.to_thread
import pytest

from ash_hub.backends.amounts import LEAST_MEMORY
from ash_hub.backends.local.keeper import cgroups
from ash_mcp import Hive
from ash_mcp.errors import ConfigError
from tests.hub.backends.local.local_parts import needs_isolation
from tests.system.crash_parts import home

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, needs_isolation]

MIB = 1024 * 1024
FILL = """
for place in /workspace /home/ash /tmp /dev/shm; do
  head -c 8G /dev/zero > $place/ballast && echo "$place has no end"
done
du -cb /workspace /home/ash /tmp /dev/shm | tail -1 | cut -f1
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("recipe", ["echo", "general"])
@pytest.mark.parametrize("memory_mib", [LEAST_MEMORY // MIB, 512])
async def test_a_full_disk_is_told_and_kills_nobody(recipe: str, memory_mib: int) -> None:
    with home() as place:
        async with Hive(await anyio.to_thread.run_sync(place.start)) as hive:
            box = await hive.spawn(recipe, resources={"limits": {"memory": f"{memory_mib}Mi"}})
            done = await box.exec(FILL, timeout_seconds=60)
            assert done.stderr.count("No space left on device") == 4 and "has no end" not in done.stdout, done
            if "memory" in cgroups.usable()[1]:  # else files count against nothing but their own bound
                assert int(done.stdout) < (memory_mib - 80) * MIB
            again = await box.exec("rm /workspace/ballast; echo here > /workspace/x; cat /workspace/x")
            assert again.stdout == "here\n"
        assert place.stop_hub() == 0


async def test_less_is_refused_by_name() -> None:
    with home() as place:
        async with Hive(await anyio.to_thread.run_sync(place.start)) as hive:
            with pytest.raises(ConfigError, match=r"64Mi is too small, .*: give at least 96Mi"):
                await hive.spawn("general", resources={"limits": {"memory": "64Mi"}})
        assert place.stop_hub() == 0
