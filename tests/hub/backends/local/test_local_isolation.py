"""What a sandbox of this host is like from inside, beside what `ash_hub.testing.escapes` tries in it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import pytest

from ash_hub.backends.base import Instance
from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.plans import HOME, WORKSPACE
from ash_mcp.types import ResourceAmounts, Resources, new_sandbox_id
from tests.hub.backends.local.local_parts import (
    SMALL,
    SPEC,
    WAIT_SECONDS,
    bash,
    descendants,
    directories,
    ended,
    keeper_pid,
    local_backend,
    needs_isolation,
    python,
    run_inside,
    stand_in,
)

pytestmark = [pytest.mark.anyio, needs_isolation]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True)
class Prison:
    backend: LocalBackend
    box: Instance
    root: Path


@pytest.fixture(scope="module", params=["bubblewrap", "fork"])
async def prison(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[Prison]:
    with directories() as root:
        async with local_backend(root, launcher=request.param, machine=False, **SMALL) as backend:
            yield Prison(backend, await backend.create(replace(SPEC, id=new_sandbox_id())), root)


async def test_the_root_has_no_name_of_the_host_or_its_users(prison: Prison) -> None:
    done = await bash(prison.box, "hostname; cat /etc/passwd /etc/hosts /etc/hostname; ls /etc/machine-id; env")
    assert done.out.startswith("sandbox\n")
    assert re.search(rf"\b{re.escape(socket.gethostname())}\b", done.out) is None
    assert [line.split(":")[0] for line in done.out.splitlines() if ":x:" in line and line.count(":") == 6] == [
        "root",
        "ash",
        "nobody",
    ]
    assert "PYTEST_CURRENT_TEST" not in done.out


async def test_processes_of_the_host_are_not_there(prison: Prison) -> None:
    done = await bash(prison.box, "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f; echo; done")
    assert "keeper" not in done.out and "bwrap" not in done.out and "pytest" not in done.out
    assert (await bash(prison.box, "ls -d /proc/[0-9]* | wc -l")).out.strip() < "9"
    assert (await bash(prison.box, f"kill -0 {os.getpid()}")).code != 0 or os.getpid() < 100


async def test_the_first_process_can_be_neither_read_nor_ended(prison: Prison) -> None:
    done = await bash(
        prison.box, "cat /proc/1/environ; head -c 1 /proc/1/mem; readlink /proc/1/exe /proc/1/fd/*; kill -9 1"
    )
    assert done.out == ""
    assert (await bash(prison.box, "echo alive")).out == "alive\n"


async def test_sockets_of_the_host_are_not_there(prison: Prison) -> None:
    control = prison.root / "run"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0ash-test-{os.getpid()}")
        listener.listen()
        code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect(chr(0) + 'ash-test-{os.getpid()}')"
        assert "refused" in (await python(prison.box, code)).error.lower()
    assert (
        await bash(prison.box, f"find / -path /usr -prune -o -path /opt -prune -o -type s -print; ls {control}")
    ).out == ""


async def test_the_listener_does_not_tell_where_it_is(prison: Prison) -> None:
    code = (
        "import glob, os, socket\n"
        "for link in glob.glob('/proc/2/fd/*'):\n"
        "    print(os.readlink(link))\n"
        "print(open('/proc/net/unix').read())"
    )
    out = (await python(prison.box, code)).out
    assert str(prison.root) not in out and prison.root.name not in out


async def test_only_the_listener_and_the_log_are_handed_in(prison: Prison) -> None:
    code = "import os; [print(os.readlink(f'/proc/2/fd/{n}').split(':')[0]) for n in os.listdir('/proc/2/fd')]"
    assert set((await python(prison.box, code)).out.split()) == {"pipe", "socket", "/dev/null"}


async def test_no_privilege_is_left_and_none_can_be_had(prison: Prison) -> None:
    status = (await bash(prison.box, "cat /proc/self/status")).out
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(fields[name], 16) == 0
    assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"
    mounts = (await bash(prison.box, "cat /proc/self/mounts")).out.splitlines()
    assert mounts and all("nosuid" in line.split()[3].split(",") for line in mounts)


async def test_a_spawn_s_own_resources_hold(prison: Prison) -> None:
    amounts = Resources(limits=ResourceAmounts(memory="96Mi", cpu="100m"))
    small = await prison.backend.create(replace(SPEC, id=new_sandbox_id(), resources=amounts))
    done = await python(small, "b = bytearray(128 * 2**20); print(len(b))")
    assert done.out == "" and (done.code == -9 or "MemoryError" in done.error)
    if not any("processor time" in warning for warning in small.warnings):
        code = (
            "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
        )
        assert float((await python(small, code)).out) < 0.4
    await prison.backend.delete(small.id, grace_seconds=0)


async def test_ordinary_programs_are_not_hindered(prison: Prison) -> None:
    code = (
        "import concurrent.futures, multiprocessing, socket, subprocess, threading\n"
        "print(sum(concurrent.futures.ThreadPoolExecutor(4).map(int, '1234')))\n"
        "a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))\n"
        "s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname()); print('tcp')\n"
        "print(multiprocessing.get_context('spawn').Queue is not None, socket.if_nameindex())\n"
        "print(subprocess.run(['git', '--version']).returncode if __import__('shutil').which('git') else 0)"
    )
    done = await python(prison.box, code)
    assert done.code == 0, done.error
    assert "10\nb'x'\ntcp\n" in done.out


async def test_the_system_cannot_be_written(prison: Prison) -> None:
    for path in ("/x", "/usr/x", "/usr/local/x", "/etc/x", "/etc/passwd", "/opt/ash/x", "/opt/ash/init.py", "/dev/x"):
        done = await bash(prison.box, f"echo x >>{path}")
        assert done.code != 0 and "Read-only file system" in done.error, path
    for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/proc/1/comm"):
        assert (await bash(prison.box, f"echo x >{path}")).code != 0, path
    assert (await bash(prison.box, "ls /sys")).code != 0
    assert (await bash(prison.box, "mknod /tmp/vda b 254 0; cat /dev/kmsg /dev/mem /dev/vda /proc/kcore")).out == ""


async def test_its_own_places_can_be_written_and_are_bounded(prison: Prison) -> None:
    places = {WORKSPACE: "workspace", HOME: "home", "/tmp": "tmp", "/dev/shm": "shm"}
    for path, name in places.items():
        script = f"cd {path}; head -c 3M /dev/zero >a; head -c 100M /dev/zero >b; du -cb a b | tail -1; rm a b"
        done = await bash(prison.box, script)
        assert "No space left" in done.error, done
        assert 0 < int(done.out.split()[0]) <= SMALL[f"{name}_bytes"]
    assert (await run_inside(prison.box, "pwd")).out == f"{WORKSPACE}\n"


async def test_open_files_are_bounded(prison: Prison) -> None:
    assert 64 <= int((await bash(prison.box, "ulimit -Hn")).out) <= 4096
    assert (await bash(prison.box, "ulimit -Hc")).out == "0\n"


async def test_a_process_that_hides_does_not_outlive_its_sandbox(prison: Prison) -> None:
    keeper = keeper_pid(prison.backend)
    before = set(descendants(keeper))
    other = await prison.backend.create(replace(SPEC, id=new_sandbox_id()))
    assert (
        await bash(other, "(setsid nohup sh -c 'trap \"\" TERM HUP; sleep 1000' &>/dev/null &) ; sleep 0.1")
    ).code == 0
    inside = set(descendants(keeper)) - before
    assert len(inside) >= 4
    await prison.backend.delete(other.id, grace_seconds=5)
    with anyio.fail_after(WAIT_SECONDS):
        await ended(*inside)


async def test_another_sandbox_is_not_there(prison: Prison) -> None:
    other = await prison.backend.create(replace(SPEC, id=new_sandbox_id()))
    try:
        script = "for d in /workspace /tmp /home/ash /dev/shm; do echo mine >$d/note; done; sleep 30 & exec 0<&-"
        await bash(other, f"({script}) &>/dev/null")
        done = await bash(
            prison.box, "cat /workspace/note /tmp/note /home/ash/note /dev/shm/note; pgrep sleep; ipcs -m"
        )
        assert "mine" not in done.out and done.out.strip().splitlines()[:1] == [
            "------ Shared Memory Segments --------"
        ]
    finally:
        await prison.backend.delete(other.id, grace_seconds=0)


async def test_a_flood_of_output_is_cut_and_hinders_nobody(prison: Prison) -> None:
    flood = replace(stand_in(), arguments=("-c", "import os\nwhile True: os.write(1, b'x' * 65536)"))
    with directories() as root, contextlib.ExitStack():
        async with local_backend(root, log_bytes=4096) as backend:
            backend._runtime = flood  # pyright: ignore[reportPrivateUsage]
            noisy = await backend.create(replace(SPEC, id=new_sandbox_id()))
            backend._runtime = stand_in()  # pyright: ignore[reportPrivateUsage]
            quiet = await backend.create(replace(SPEC, id=new_sandbox_id()))
            with anyio.fail_after(WAIT_SECONDS):
                while len(await backend.logs(noisy.id)) < 4096:
                    await anyio.sleep(0.01)
            assert await backend.logs(noisy.id) == b"x" * 4096
            assert (await bash(quiet, "echo fine")).out == "fine\n"
