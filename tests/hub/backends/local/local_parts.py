"""Parts of the tests of the local backend: a hive in a directory of its own, and a stand-in for the runner."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_hub.backends.base import Instance
from ash_hub.backends.local import LocalBackend, LocalSettings
from ash_hub.backends.local.keeper import cgroups
from ash_hub.backends.local.paths import hive_paths
from ash_hub.backends.local.runtime import Runtime, find_runtime
from ash_hub.backends.local.settings import DEFAULT_FIRST_USER
from ash_hub.testing.conformance import BackendUnderTest
from ash_hub.testing.escapes import Prison
from ash_mcp.types import SandboxId, SandboxSpec
from tests.hub.backends.local import known_host

SPEC = SandboxSpec(id=SandboxId("sbx-unused"), recipe="stand-in", server={"python": "none:none"}, installed=True)
WAIT_SECONDS = 10.0
MIB = 1024 * 1024
SMALL: dict[str, Any] = {
    "memory_bytes": 128 * MIB,
    "max_processes": 64,
    "cpu": 0.5,
    "open_files": 1024,
    "workspace_bytes": 8 * MIB,
    "home_bytes": 4 * MIB,
    "tmp_bytes": 6 * MIB,
    "shm_bytes": 2 * MIB,
    "root_bytes": 8 * MIB,
}
"""Settings under which sandboxes soon meet their limits."""

_FAILURE = known_host.isolation_problem()
needs_isolation = pytest.mark.skipif(_FAILURE is not None, reason=f"sandboxes cannot be isolated here: {_FAILURE}")

SYSTEMS = "ASH_TEST_SYSTEMS"
"""The variable that names where tests by an ordinary user keep a copy of the system; without it they have none."""
LEFT_OUT = (
    *("/usr/lib/modules", "/usr/lib/firmware", "/usr/lib/debug", "/usr/lib/jvm", "/usr/lib/google-cloud-sdk"),
    *("/usr/lib/postgresql", "/usr/local/go", "/usr/share/doc", "/usr/share/locale", "/usr/share/man", "/usr/src"),
)
"""What of the system is large and of no use to a test."""
COPY_SECONDS = 600.0


CAPABILITY_MASK = 0x405FB
"""The kernel's bits of those that a machine has."""

STAND_IN = """
import json, os, socket, subprocess, threading
program = json.loads(os.environ["ASH_RUNNER_CONFIG"])["env"].get("STAND_IN")
if program: exec(program)
listener = socket.socket(fileno=int(os.environ["ASH_LISTEN_FD"]))
print("up", flush=True)
def serve(connection):
    with connection, connection.makefile("rw") as lines:
        done = subprocess.run(
            json.loads(lines.readline()), stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True
        )
        answer = {"code": done.returncode, "out": done.stdout.decode(errors="replace")}
        json.dump(answer | {"error": done.stderr.decode(errors="replace")}, lines)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
"""Listens as the runner does, and runs each command that a connection sends it; or is the program of `STAND_IN`."""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    error: str


async def run_inside(instance: Instance, *command: str, seconds: float = WAIT_SECONDS) -> Done:
    """Run a command in a sandbox of the stand-in."""
    assert instance.endpoint is not None and instance.endpoint.unix is not None
    with anyio.fail_after(seconds):
        # not anyio's stream: it breaks the loop when its reader is cancelled in the turn in which an answer arrives
        reader, writer = await asyncio.open_unix_connection(instance.endpoint.unix)
        with closing(writer):
            writer.write(json.dumps(command).encode() + b"\n")
            data = await reader.read()
    answer: dict[str, Any] = json.loads(data)
    return Done(**answer)


async def bash(instance: Instance, script: str) -> Done:
    return await run_inside(instance, "bash", "-c", script)


async def python(instance: Instance, code: str) -> Done:
    return await run_inside(instance, "python3", "-c", code)


def stand_in() -> Runtime:
    # as open to others inside as one that bubblewrap starts
    main = f"def main():\n    import ctypes; ctypes.CDLL(None).prctl(4, 1)\n    exec({STAND_IN!r}, {{}})"
    forked = f"def load(given): return None\n{main}"
    return replace(find_runtime(), arguments=("-P", "-s", "-c", STAND_IN), forked=forked)


@contextmanager
def directories() -> Generator[Path]:
    """Yield a directory with a path short enough for sockets, and remove it."""
    path = Path(tempfile.mkdtemp(prefix="ash-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def settings_in(root: Path, **more: Any) -> LocalSettings:
    """Return settings for a hive that starts its sandboxes by bubblewrap, unless another launcher is named."""
    places = {"state_dir": root / "state", "run_dir": root / "run", "log_dir": root / "log"}
    usual: dict[str, Any] = {"launcher": "bubblewrap"}
    if os.geteuid() != 0:  # a copy of the whole system is for the tests that are about it
        systems = os.environ.get(SYSTEMS)
        usual |= {"machine": systems is not None, "system_without": LEFT_OUT}
        usual |= {} if systems is None else {"system_dir": Path(systems)}
    return LocalSettings.model_validate({**usual, **places, **more})


@asynccontextmanager
async def local_backend(
    root: Path, *, hive_ports: Sequence[int] = (), shared: str | None = None, **more: Any
) -> AsyncGenerator[LocalBackend]:
    """Enter a backend, and end its sandboxes at the end: nothing may be left of it."""
    settings = settings_in(root, **more)
    async with LocalBackend(settings, runtime=stand_in(), hive_ports=hive_ports, shared=shared) as backend:
        try:
            with anyio.fail_after(COPY_SECONDS):
                await backend.machine_known()
            yield backend
        finally:
            for instance in await backend.list():
                await backend.delete(instance.id, grace_seconds=0)
            for snapshot in await backend.snapshots():
                await backend.drop_snapshot(snapshot.id)
    assert leftovers(settings) == []
    assert (said := hive_paths(settings).log_file.read_text()) == "", f"the keeper complained: {said}"
    assert not hive_paths(settings).directory.exists()


def prison_of(backend: LocalBackend, root: Path) -> Prison:
    """Return what attempts to escape need to know of a backend with the limits of `SMALL`."""
    warnings = " ".join(backend.describe()["warnings"])
    bounds: dict[str, Any] = {
        "memory_bytes": SMALL["memory_bytes"],
        "open_files": SMALL["open_files"],
        "hive_bytes": 8 * MIB,
        "kernel": [],
        "egress_proxy": "/run/ash-egress/proxy.sock",
    }
    if "number of processes" not in warnings:
        bounds["processes"] = SMALL["max_processes"]
    if "processor time" not in warnings:
        bounds["cpu"] = SMALL["cpu"]
    if "memory is limited for each process only" not in warnings:
        bounds["inodes"] = SMALL["memory_bytes"] // 512
    if "/usr are shared" not in warnings:
        bounds["own_files"] = True
    machine = backend.describe()["machine"]
    if machine:
        # An ordinary user's are numbered from 1 on, as seen by it; with no users of their own they are root alone.
        lowest = DEFAULT_FIRST_USER if os.geteuid() == 0 else int("there is no other" not in warnings)
        bounds |= {"machine": lowest, "capabilities": CAPABILITY_MASK}
    else:
        bounds |= {"read_only_system": True, "one_user": True}
    if "disk space" not in warnings:
        places = {"/workspace": "workspace", "/tmp": "tmp", "/dev/shm": "shm"}
        places |= {"/root": "home", "/var": "root", "/usr": "root"} if machine else {"/home/ash": "home"}
        bounds["places"] = {place: SMALL[f"{name}_bytes"] for place, name in places.items()}

    async def run(instance: Instance, command: Sequence[str]) -> Done:
        return await run_inside(instance, *command, seconds=60)

    return Prison(
        run=run,
        bounds=bounds,
        serve=lambda spec, program: replace(spec, env={"STAND_IN": program}),
        hive_bytes=lambda: memory_of(os.getpid(), keeper_pid(backend), *proxies(keeper_pid(backend))) + disk_of(root),
        run_dir=str(hive_paths(settings_in(root)).directory),
        hidden_paths=list(stand_in().binds.values()) if known_host.facts().overlays else [],
    )


@asynccontextmanager
async def under_test(**more: Any) -> AsyncGenerator[BackendUnderTest]:
    with directories() as root:
        async with local_backend(root, shared="tested", **(SMALL | more)) as backend:

            async def die(sandbox_id: SandboxId) -> None:
                instance = await backend.get(sandbox_id)
                assert instance is not None
                os.kill(main_process(backend), signal.SIGKILL)

            async def left() -> list[str]:
                return leftovers(settings_in(root)) + sandbox_processes(backend)

            yield BackendUnderTest(
                backend=backend,
                spec=SPEC,
                fail=lambda spec: replace(spec, mounts={"/proc/nowhere/at/all": "/usr"}),
                die=die,
                another=lambda: LocalBackend(settings_in(root, **(SMALL | more)), runtime=stand_in(), shared="tested"),
                leftovers=left,
                prison=prison_of(backend, root),
            )


def leftovers(settings: LocalSettings) -> list[str]:
    """Name the sockets, directories and control groups of sandboxes."""
    paths = hive_paths(settings)
    found = [str(path) for name in ("s", "w", "e") for path in sorted((paths.directory / name).glob("*"))]
    return found + [str(path) for group in hive_groups(settings) for path in group.glob("sbx-*")]


def hive_groups(settings: LocalSettings) -> list[Path]:
    """Return the control groups of the hive itself."""
    name = hive_paths(settings).name
    memberships, mounts = Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text()
    own, legacy = cgroups.find(memberships, mounts)
    return [path for parent in {own, *legacy.values()} - {None} if (path := Path(str(parent), name)).is_dir()]


def keeper_pid(backend: LocalBackend) -> int:
    pid = backend.describe()["keeper"]
    assert isinstance(pid, int)
    return pid


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def proxies(keeper: int) -> list[int]:
    """Return the egress proxies among a keeper's children."""
    return [pid for pid in children(keeper) if b"egress.main" in command_line(pid)]


def memory_of(*pids: int) -> int:
    """Return how many bytes of memory processes hold together."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


def disk_of(root: Path) -> int:
    """Return how many bytes the files below a directory take."""
    return sum(path.lstat().st_blocks * 512 for path in root.rglob("*"))


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


def fork_parents(keeper: int) -> list[int]:
    """Return the launchers of fork parents among a keeper's children."""
    return [pid for pid in children(keeper) if b"launchers.fork" in command_line(pid)]


def sandbox_launchers(keeper: int) -> list[int]:
    """Return the keeper's children of which each is one sandbox; what is forked is further below."""
    others = {*proxies(keeper), *fork_parents(keeper)}
    return [pid for pid in children(keeper) if pid not in others]


def sandbox_processes(backend: LocalBackend) -> list[str]:
    """Name what runs below the keeper, without what stays for the next sandbox."""
    keeper = backend.describe()["keeper"]
    if keeper is None:
        return []
    return [f"process {pid}" for pid in descendants(keeper) if not is_forker(pid)]


def is_forker(pid: int) -> bool:
    """Say whether a process is a fork parent or its helper, or has ended; what was forked is one namespace deeper."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    # One without a command is ending: it has let go of its memory.
    return not command or (b"launchers.fork" in command and len(status["NSpid"].split()) < 3)


def lives(pid: int) -> bool:
    """Say whether a process has not ended; one that only waits for the host's first process to reap it has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def main_process(backend: LocalBackend) -> int:
    """Return the runner's process of the only sandbox: the launcher's child's child."""
    keeper = keeper_pid(backend)
    launchers = set(children(keeper)).difference(proxies(keeper))
    for parent in fork_parents(keeper):
        launchers.discard(parent)
        launchers.update(children(parent))
    found = [child for launcher in launchers for child in children(launcher) if not is_forker(child)]
    (first,) = found
    (runner,) = children(first)
    return runner


async def ended(*pids: int) -> None:
    """Return when every process is gone."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            await anyio.wait_readable(descriptor)
        finally:
            os.close(descriptor)
