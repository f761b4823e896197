"""Snapshots from outside: the SDK, the tools and the command line, over a real hive whose sandboxes are machines."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator

import anyio
import anyio.to_thread
import pytest

from ash_mcp import Hive, SandboxReset, SnapshotNotFound
from ash_mcp.errors import AshError
from ash_mcp.sync import Hive as SyncHive
from tests.hive_process import ASH
from tests.hub.backends.local.local_parts import needs_isolation
from tests.hub.backends.local.machine_parts import needs_snapshots
from tests.system.crash_parts import home

pytestmark = [
    pytest.mark.anyio,
    needs_isolation,
    needs_snapshots,
    pytest.mark.heavy,
]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def url(anyio_backend: str) -> AsyncIterator[str]:
    with home() as place:
        yield await anyio.to_thread.run_sync(place.start)
        assert place.stop_hub() == 0


@pytest.fixture
async def hive(url: str) -> AsyncIterator[Hive]:
    async with Hive(url) as hive:
        yield hive
        await hive.destroy_all()
        await hive.remove_snapshots(*await hive.snapshots())


SHOW = "cat /workspace/it /usr/it 2>&1; echo $A$S"


async def test_a_sandbox_is_taken_back_with_its_environment_and_calls_in_flight_fail(hive: Hive) -> None:
    box = await hive.spawn("general", network="none", env={"A": "a"}, secrets={"S": "s"})
    await box.exec("echo one >/workspace/it; echo two >/usr/it", check=True)
    session, snapshot = box.session, await box.snapshot()
    assert (await box.exec(SHOW)).stdout == "one\ntwo\nas\n"
    job = await box.background("sleep 600")
    await box.exec("rm /usr/it; echo other >/workspace/it")
    async with anyio.create_task_group() as group:

        async def sleep() -> None:
            with pytest.raises(SandboxReset) as ended:
                await box.exec("touch /workspace/begun; sleep 600")
            assert not ended.value.retryable

        group.start_soon(sleep)
        with anyio.fail_after(20):
            while not await box.files.exists("begun"):
                await anyio.sleep(0.02)
        await box.reset(snapshot)
    assert (await box.exec(SHOW)).stdout == "one\ntwo\nas\n" and box.session == session
    with pytest.raises(AshError, match="no job"):
        await job.read()
    assert (await box.call("terminal-controller_execute_command", command="ls")).text


async def test_forks_have_its_files_environment_and_tools(hive: Hive) -> None:
    box = await hive.spawn("general", network="none", env={"A": "a"}, secrets={"S": "s"})
    await box.exec("echo one >/workspace/it; echo two >/usr/it", check=True)
    forks = (await hive.fork(box, 2)).check()
    for it in forks:
        assert (await it.exec(SHOW)).stdout == "one\ntwo\nas\n"
        assert await it.tools() == await box.tools()
        await it.exec("rm /workspace/it /usr/it", check=True)
    assert (await box.exec(SHOW)).stdout == "one\ntwo\nas\n"
    assert await hive.snapshots() == []
    taken = await box.snapshot()
    await box.destroy()
    async with hive.spawn(snapshot=taken) as other:
        assert (await other.exec(SHOW)).stdout == "one\ntwo\n\n"
    assert list(await hive.remove_snapshots(taken.id)) == [taken.id]
    with pytest.raises(SnapshotNotFound):
        await hive.spawn(snapshot=taken)


def ash(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "ASH_URL": url}
    return subprocess.run((*ASH, *words), env=environ, capture_output=True, text=True, timeout=60)


def test_the_command_line_does_all_of_it(url: str) -> None:
    with SyncHive(url) as hive, hive.spawn("general", network="none", session="mine") as box:
        box.files.write("it", "one")
        taken = json.loads(ash(url, "snapshot", "new", "mine", "--json", "-e", "A=a").stdout)["snapshot_id"]
        assert box.exec("cat it; echo $A").stdout == "onea\n"
        assert taken in ash(url, "snapshot", "list").stdout
        box.files.write("it", "two")
        assert ash(url, "reset", "mine", taken).returncode == 0
        assert box.files.read("it") == "one"
        made = json.loads(ash(url, "spawn", "--snapshot", taken, "--network", "none", "--json").stdout)
        assert hive.attach(made["session"]).files.read("it") == "one"
        forked = json.loads(ash(url, "fork", "mine", "--count", "1", "--json").stdout)["made"]
        assert hive.attach(forked[0]["session"]).files.read("it") == "one"
        assert hive.fork(box, 1).check()[0].files.read("it") == "one"
        assert ash(url, "snapshot", "remove", taken, "snap-none").returncode == 1
        assert "No snapshots" in ash(url, "snapshot", "list").stderr
        hive.destroy_all()


async def test_a_hub_that_is_killed_loses_none() -> None:
    with home() as place:
        async with Hive(await anyio.to_thread.run_sync(place.start)) as hive:
            box = await hive.spawn("general", network="none")
            await box.files.write("it", "one")
            taken = await box.snapshot()
            await box.destroy()
        await anyio.to_thread.run_sync(place.kill_hub)
        async with Hive(await anyio.to_thread.run_sync(place.start)) as hive:
            assert [it.id for it in await hive.snapshots()] == [taken.id]
            async with hive.spawn(snapshot=taken, network="none") as box:
                assert await box.files.read("it") == "one"
        assert place.stop_hub() == 0
