"""All launchers, by one set of tests: what a handle tells of the process that a plan describes."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_hub.backends.local import seccomp
from ash_hub.backends.local.forks import fork_order
from ash_hub.backends.local.keeper.launchers import ForkParents, Handle, Launcher, LaunchError, Plan, launcher_of
from ash_hub.backends.local.keeper.launchers.launcher import ExitStatus, LaunchPutOff
from ash_hub.backends.local.keeper.launchers.plan import Mount
from ash_hub.backends.local.keeper.user_ranges import UserRanges
from ash_hub.backends.local.runtime import Runtime
from tests.hub.backends.local import known_host
from tests.hub.backends.local.local_parts import SPEC, WAIT_SECONDS, needs_isolation

pytestmark = pytest.mark.anyio

FACTS = known_host.facts()
CHOICES = {
    "bubblewrap": {"kind": "bubblewrap", "program": FACTS.bubblewrap, "options": sorted(FACTS.options)},
    "unsafe": {"kind": "unsafe"},
}
HOST_PYTHON = os.path.realpath("/usr/bin/python3")
PLAN = Plan(
    command=(),
    python=HOST_PYTHON,
    environment={"PATH": os.defpath, "WORD": "told"},
    mounts=(
        *(Mount("bind", path, path) for path in FACTS.directories),
        *(Mount("link", path, target) for path, target in FACTS.links.items()),
        *(Mount("proc", "/proc"), Mount("devices", "/dev")),
    ),
    system_call_filter=FACTS.seccomp,
)
FORKED = "load = lambda given: None\nmain = lambda: 1"
STARTS = 40
START_SECONDS = 0.02
"""About what a start takes until its command runs."""
ROOT = Path(__file__).parents[4]
DYING = """
import os, signal, time
from dataclasses import replace
from tests.hub.backends.local.test_launchers import CHOICES, PLAN, launcher_of

for number in range({starts}):
    if (keeper := os.fork()) == 0:
        launcher_of(CHOICES[{kind!r}]).launch(replace(PLAN, command=("sleep", "1000"), descriptors=dict(kept={kept})))
        time.sleep(number * {seconds} / {starts})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(keeper, 0)
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


ISOLATED = [pytest.param(name, marks=needs_isolation) for name in ("bubblewrap", "fork")]


@pytest.fixture(params=[*ISOLATED, "unsafe"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@asynccontextmanager
async def launcher(kind: str) -> AsyncGenerator[Launcher]:
    """Yield a launcher that is ready; one that forks has a parent with nothing loaded, and executes the command."""
    if kind != "fork":
        yield launcher_of(CHOICES[kind])
        return
    told: list[Mapping[str, Any]] = []
    parents = ForkParents(lambda name: None, UserRanges(), told.append)
    places = (Mount("tmpfs", "/tmp"), Mount("read_only", "/"))
    config = json.dumps({"server": {}, "env": {}, "workspace": "/", "home": "/"})
    plan = replace(
        PLAN,
        mounts=(*PLAN.mounts, *places),
        environment={**PLAN.environment, "ASH_RUNNER_CONFIG": config},
        system_call_filter=seccomp.for_machine(os.uname().machine, nests=True),
    )
    runtime = Runtime(python=HOST_PYTHON, host_python=HOST_PYTHON, arguments=(), forked=FORKED)
    order = fork_order(
        SPEC, runtime, plan, system_call_filter=plan.system_call_filter, group={}, idle_seconds=60, changes=""
    )
    parents.prepare(order)
    try:
        with anyio.fail_after(WAIT_SECONDS):
            await parents.until_known(order["key"])
        assert [message["why"] for message in told] == [None]
        choice = {"kind": "fork", "key": order["key"], "is_loaded": False, "otherwise": None}
        yield launcher_of(choice, parents)
    finally:
        parents.end()
        await parents.cleared()


@asynccontextmanager
async def launched(kind: str, *command: str, plan: Plan = PLAN) -> AsyncGenerator[Handle]:
    """Launch a command, and leave nothing of it."""
    async with launcher(kind) as made:
        handle = made.launch(replace(plan, command=command))
        try:
            with anyio.fail_after(WAIT_SECONDS):
                yield handle
                handle.signal(signal.SIGKILL)
                await handle.ended()
        finally:
            handle.close()


async def said(handle: Handle) -> str:
    """Return what it has written when it has ended."""
    await handle.ended()
    return os.read(handle.log, 65_536).decode()


async def test_it_is_up_once_its_command_runs_and_its_exit_code_is_known(kind: str) -> None:
    async with launched(kind, "sh", "-c", 'echo "$WORD"; exit 3') as handle:
        assert await handle.up()
        assert await handle.ended() == ExitStatus(code=3)
        assert os.read(handle.log, 100) == b"told\n"


async def test_a_signal_that_killed_the_command_is_named(kind: str) -> None:
    async with launched(kind, "sh", "-c", "kill -USR1 $$") as handle:
        assert await handle.up()
        assert await handle.ended() == ExitStatus(signal=signal.SIGUSR1)


async def test_a_signal_to_the_handle_reaches_the_command(kind: str) -> None:
    script = "trap 'echo heard; exit 5' TERM; echo ready; while :; do sleep 0.01; done"
    async with launched(kind, "sh", "-c", script) as handle:
        assert await handle.up()
        await anyio.wait_readable(handle.log)
        handle.signal(signal.SIGTERM)
        assert await handle.ended() == ExitStatus(code=5)
        assert os.read(handle.log, 100) == b"ready\nheard\n"


async def test_a_kill_ends_what_the_command_left_behind(kind: str) -> None:
    async with launched(kind, "sh", "-c", "sleep 1000 & setsid sleep 1000 & echo started; wait") as handle:
        assert await handle.up()
        await anyio.wait_readable(handle.log)
        assert os.read(handle.log, 100) == b"started\n"
        handle.signal(signal.SIGKILL)
        assert await handle.ended() == ExitStatus(signal=signal.SIGKILL)
        await anyio.wait_readable(handle.log)
        assert os.read(handle.log, 100) == b""  # nobody is left who could write to it


async def until_closed(reading: int) -> None:
    """Return when no process has the other end of a pipe any more."""
    with anyio.fail_after(WAIT_SECONDS):
        await anyio.wait_readable(reading)
    assert os.read(reading, 65_536) == b""


async def test_a_kill_at_any_moment_of_its_start_leaves_nothing(kind: str) -> None:
    async with launcher(kind) as made:
        for number in range(STARTS):
            reading, kept = os.pipe()
            plan = replace(PLAN, command=("sleep", "1000"), descriptors={"kept": kept})
            handle = made.launch(plan)
            os.close(kept)
            await anyio.sleep(number * START_SECONDS / STARTS)
            handle.signal(signal.SIGKILL)
            await handle.ended()
            handle.close()
            await until_closed(reading)
            os.close(reading)


async def test_a_keeper_that_is_killed_at_any_moment_of_a_start_leaves_nothing(kind: str) -> None:
    if kind == "fork":
        pytest.skip("what a killed keeper leaves of forks is tested in test_forks.py")
    reading, kept = os.pipe()
    program = DYING.format(kind=kind, kept=kept, starts=STARTS, seconds=START_SECONDS)
    await anyio.run_process([sys.executable, "-c", program], pass_fds=(kept,), cwd=ROOT)
    os.close(kept)
    await until_closed(reading)
    os.close(reading)


async def test_a_command_that_is_none_is_a_failure_of_its_execution(kind: str) -> None:
    async with launched(kind, "/no/such/program") as handle:
        with pytest.raises(LaunchError, match="could not run /no/such/program: No such file") as failure:
            await handle.up()
        assert failure.value.step == "exec"


async def test_a_first_process_that_cannot_run_is_never_up(kind: str) -> None:
    if kind == "unsafe":
        with pytest.raises(LaunchError, match="could not start /no/python"):
            launcher_of(CHOICES[kind]).launch(replace(PLAN, python="/no/python"))
        return
    if kind == "fork":
        pytest.skip("the first process is the parent's own fork, and needs no program")
    async with launched(kind, "true", plan=replace(PLAN, python="/no/python")) as handle:
        assert not await handle.up()
        assert "/no/python" in await said(handle)


async def test_the_command_inherits_the_descriptors_of_the_plan_and_no_others(kind: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        plan = replace(PLAN, environment={**PLAN.environment, "FD": "@fd:it@"}, descriptors={"it": listener.fileno()})
        async with launched(kind, "sh", "-c", 'readlink /proc/self/fd/"$FD"; ls /proc/$$/fd', plan=plan) as handle:
            assert await handle.up()
            first, *numbers = (await said(handle)).split()
        assert first.startswith("socket:")
        inherited = {int(number) for number in numbers} - {0, 1, 2}
        assert len(inherited) == 1 if kind == "fork" else inherited == {listener.fileno()}


async def test_limits_of_a_process_hold(kind: str) -> None:
    async with launched(kind, "sh", "-c", "ulimit -n", plan=replace(PLAN, rlimits={"NOFILE": 77})) as handle:
        assert await handle.up()
        assert await said(handle) == "77\n"


async def test_it_joins_its_control_group_first(kind: str, tmp_path: Path) -> None:
    entrance = tmp_path / "cgroup.procs"
    entrance.touch()
    async with launched(kind, "true", plan=replace(PLAN, group_entrances=(str(entrance),))) as handle:
        assert await handle.up()
    assert entrance.read_text() == "0"


async def test_a_handle_can_be_closed_twice(kind: str) -> None:
    async with launched(kind, "true") as handle:
        assert await handle.up()
        await handle.ended()
        os.fstat(handle.log)
    handle.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle.log)


def test_a_launcher_that_is_not_known_is_a_failed_launch() -> None:
    with pytest.raises(LaunchError, match="no launcher 'forks'"):
        launcher_of({"kind": "forks"})


@needs_isolation
async def test_a_launch_for_which_too_many_descriptors_are_on_their_way_is_put_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ETOOMANYREFS, "too many references")

    async with launcher("fork") as made:
        with monkeypatch.context() as patched:
            patched.setattr(socket, "send_fds", refuse)
            with pytest.raises(LaunchPutOff, match="all descriptors on their way"):
                made.launch(replace(PLAN, command=("true",)))
        handle = made.launch(replace(PLAN, command=("true",)))
        assert await handle.up()
        await handle.ended()
        handle.close()
