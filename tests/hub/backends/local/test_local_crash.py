"""What happens to sandboxes when their hub or their keeper is gone."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE

import anyio
import pytest
from anyio.abc import Process

from ash_hub.backends.base import Exit, Instance, Phase
from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.backend import KEEPER_DIED
from ash_hub.backends.local.paths import hive_paths
from ash_mcp.errors import ConfigError
from ash_mcp.types import Cause, SandboxId, new_sandbox_id
from tests.hub.backends.local.local_parts import (
    SPEC,
    WAIT_SECONDS,
    bash,
    descendants,
    ended,
    hive_groups,
    keeper_pid,
    leftovers,
    local_backend,
    main_process,
    needs_isolation,
    settings_in,
    stand_in,
)

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, needs_isolation]


@dataclass
class Hub:
    process: Process
    keeper: int
    processes: list[int]
    ids: list[SandboxId]


@asynccontextmanager
async def another_hub(
    root: Path, *, grace_seconds: float = 0.0, count: int = 1, leaves: bool = False, shared: bool = False
) -> AsyncGenerator[Hub]:
    command = [sys.executable, "-m", "tests.hub.local_hub", str(root), str(grace_seconds), str(count)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    async with await anyio.open_process(
        [*command, *["leave"] * leaves, *["shared"] * shared],
        stdout=PIPE,
        stderr=None,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        assert process.stdout is not None
        try:
            with anyio.fail_after(WAIT_SECONDS):
                report = b""
                while not report.endswith(b"\n"):
                    report += await process.stdout.receive()
            said = json.loads(report)
            yield Hub(process, said["keeper"], said["processes"], [SandboxId(it) for it in said["ids"]])
        finally:
            if process.returncode is None:
                process.kill()


async def test_a_killed_hub_takes_everything_with_it_when_there_is_no_grace(root: Path) -> None:
    async with another_hub(root, count=2) as hub:
        assert len(hub.processes) >= 6
        hub.process.kill()
        with anyio.fail_after(2):
            await ended(hub.keeper, *hub.processes)
    assert leftovers(settings_in(root)) == []
    assert hive_groups(settings_in(root)) == []
    assert not hive_paths(settings_in(root)).directory.exists()


async def test_a_new_hub_adopts_within_the_grace(root: Path) -> None:
    async with another_hub(root, grace_seconds=30, count=2) as hub:
        hub.process.kill()
        await hub.process.wait()
        async with local_backend(root) as backend:
            assert keeper_pid(backend) == hub.keeper
            found = {instance.id: instance for instance in await backend.list()}
            assert set(found) == set(hub.ids)
            adopted = found[hub.ids[1]]
            assert adopted.phase is Phase.RUNNING
            assert dict(adopted.labels) == {"number": "1"} and dict(adopted.record) == {"owner": "local"}
            assert (await bash(adopted, "echo still here")).out == "still here\n"
            assert await backend.logs(adopted.id) == b"up\n"


async def test_the_keeper_ends_when_the_grace_is_over(root: Path) -> None:
    async with another_hub(root, grace_seconds=0.3) as hub:
        hub.process.kill()
        await hub.process.wait()
        assert descendants(hub.keeper) == hub.processes
        with anyio.fail_after(5):
            await ended(hub.keeper, *hub.processes)
    assert leftovers(settings_in(root)) == []


async def test_a_hub_that_leaves_keeps_its_sandboxes_for_the_next(root: Path) -> None:
    async with another_hub(root, leaves=True) as hub:
        await hub.process.wait()
        async with local_backend(root) as backend:
            assert keeper_pid(backend) == hub.keeper
            assert [instance.id for instance in await backend.list()] == hub.ids
    with anyio.fail_after(5):
        await ended(hub.keeper)


async def test_a_keeper_without_a_hub_ends_with_its_last_sandbox(root: Path) -> None:
    async with another_hub(root, leaves=True) as hub:
        await hub.process.wait()
        os.kill(hub.processes[-1], signal.SIGKILL)
        with anyio.fail_after(5):
            await ended(hub.keeper)
    assert not hive_paths(settings_in(root)).directory.exists()


async def test_a_killed_keeper_takes_its_sandboxes_with_it_and_the_hub_says_so(root: Path) -> None:
    async with local_backend(root) as backend:
        made = [await backend.create(replace(SPEC, id=new_sandbox_id())) for _ in range(2)]
        events = backend.watch()
        keeper = keeper_pid(backend)
        processes = descendants(keeper)
        os.kill(keeper, signal.SIGKILL)
        with anyio.fail_after(1):
            await ended(keeper, *processes)
            told = [(await anext(events)).instance for _ in made]
        assert {it.id for it in told if it} == {it.id for it in made}
        assert all(it and it.phase is Phase.ENDED and it.exit == KEEPER_DIED for it in told)


async def test_a_new_keeper_is_started_when_it_is_needed_and_clears_up_after_the_old_one(root: Path) -> None:
    async with local_backend(root) as backend:
        lost = await backend.create(replace(SPEC, id=new_sandbox_id()))
        events = backend.watch()
        os.kill(keeper_pid(backend), signal.SIGKILL)
        with anyio.fail_after(WAIT_SECONDS):
            await anext(events)
        assert leftovers(settings_in(root)) != []
        created = await backend.create(replace(SPEC, id=new_sandbox_id()))
        assert (await bash(created, "echo new")).out == "new\n"
        assert not [name for name in leftovers(settings_in(root)) if lost.id in name]
        assert [(it.id, it.phase) for it in await backend.list()] == [
            (lost.id, Phase.ENDED),
            (created.id, Phase.RUNNING),
        ]


async def test_a_stopped_hub_loses_no_end(root: Path) -> None:
    async with another_hub(root, grace_seconds=30, count=2) as hub:
        hub.process.send_signal(signal.SIGSTOP)
        first = hub.processes.index(max(hub.processes))
        os.kill(hub.processes[first], signal.SIGKILL)
        hub.process.kill()
        await hub.process.wait()
        async with local_backend(root) as backend:
            ended: list[Instance] = []
            with anyio.fail_after(5):
                while not ended:  # the new hub may be there before the keeper has seen the end
                    await anyio.sleep(0.01)
                    ended = [instance for instance in await backend.list() if instance.phase is Phase.ENDED]
            assert [instance.exit for instance in ended] == [Exit("killed by SIGKILL", Cause.AGENT)]
            assert len(await backend.list()) == 2


async def test_a_second_hub_on_the_same_state_directory_is_refused(root: Path) -> None:
    async with local_backend(root) as backend:
        created = await backend.create(replace(SPEC, id=new_sandbox_id()))
        with pytest.raises(ConfigError, match=rf"process {os.getpid()}\).*ASH_HUB_STATE_DIR"):
            async with LocalBackend(settings_in(root), runtime=stand_in()):
                raise AssertionError("the second hub got in")
        assert (await bash(created, "echo unharmed")).out == "unharmed\n"


async def test_the_main_process_tells_how_it_ended(root: Path) -> None:
    async with local_backend(root) as backend:
        for number, told in ((signal.SIGKILL, "killed by SIGKILL"), (signal.SIGTERM, "killed by SIGTERM")):
            created = await backend.create(replace(SPEC, id=new_sandbox_id()))
            events = backend.watch()
            os.kill(main_process(backend), number)
            with anyio.fail_after(1):
                event = await anext(events)
            assert event.instance is not None and event.instance.exit == Exit(told, Cause.AGENT)
            await backend.delete(created.id)


async def test_a_keeper_that_is_told_to_end_leaves_nothing(root: Path) -> None:
    async with local_backend(root) as backend:
        await backend.create(replace(SPEC, id=new_sandbox_id()))
        keeper = keeper_pid(backend)
        processes = descendants(keeper)
        os.kill(keeper, signal.SIGTERM)
        with anyio.fail_after(2):
            await ended(keeper, *processes)
        assert leftovers(settings_in(root)) == []
        assert hive_groups(settings_in(root)) == []


@needs_isolation
async def test_why_sandboxes_of_a_dead_keeper_ended_can_be_written_down(root: Path) -> None:
    async with local_backend(root) as backend:
        created, events = await backend.create(replace(SPEC, id=new_sandbox_id())), backend.watch()
        os.kill(keeper_pid(backend), signal.SIGKILL)
        with anyio.fail_after(WAIT_SECONDS):
            dead = (await anext(events)).instance
        assert dead is not None and (dead.phase, dead.exit) == (Phase.ENDED, KEEPER_DIED)
        await backend.annotate(created.id, {"ending": "process_died"}, revision=created.revision)
        found = await backend.get(created.id)
        assert found is not None and found.record == {"ending": "process_died"}
        await backend.delete(created.id)
        assert await backend.get(created.id) is None
