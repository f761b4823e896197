"""An ordinary machine: root inside, users and a writable root of its own, and nothing of it reaches the host."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_hub.backends.base import Instance
from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.machine import CAPABILITIES
from ash_hub.backends.local.machine_base import make_base, without_secrets
from ash_hub.backends.local.settings import DEFAULT_FIRST_USER, DEFAULT_USERS, USERS_EACH
from ash_mcp.errors import ConfigError, StartFailed
from ash_mcp.types import ResourceAmounts, Resources, new_sandbox_id
from tests.hub.backends.local.local_parts import (
    CAPABILITY_MASK,
    MIB,
    SMALL,
    SPEC,
    WAIT_SECONDS,
    Done,
    bash,
    descendants,
    directories,
    ended,
    keeper_pid,
    local_backend,
    needs_isolation,
    python,
    run_inside,
)
from tests.hub.backends.local.machine_parts import needs_machines, needs_users

of_root = pytest.mark.skipif(os.geteuid() != 0, reason="only a hive that root runs takes users of the host for itself")
pytestmark = [pytest.mark.anyio, needs_isolation, needs_machines]


OS_RELEASE = Path("/etc/os-release").read_text() if os.path.exists("/etc/os-release") else ""


def on_the_host(path: str) -> bool:
    return os.path.lexists(path)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True)
class Fleet:
    backend: LocalBackend
    box: Instance


LAUNCHERS = ["bubblewrap", pytest.param("fork", marks=of_root)]
"""What an ordinary user forks is no machine."""


@pytest.fixture(scope="module", params=LAUNCHERS)
async def fleet(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[Fleet]:
    with directories() as root:
        async with local_backend(root, launcher=request.param, **SMALL) as backend:
            yield Fleet(backend, await backend.create(replace(SPEC, id=new_sandbox_id())))


async def users_of(box: Instance) -> tuple[int, int]:
    _, first, count = (await bash(box, "cat /proc/self/uid_map")).out.split()
    return int(first), int(count)


async def test_it_is_root_with_a_list_of_capabilities(fleet: Fleet) -> None:
    status = (await bash(fleet.box, "id -un; cat /proc/self/status")).out
    assert status.startswith("root\n")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {CAPABILITY_MASK}
    assert CAPABILITY_MASK.bit_count() == len(CAPABILITIES) and "SYS_ADMIN" not in CAPABILITIES
    assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"


@of_root
async def test_no_two_sandboxes_of_any_hives_have_a_user_in_common(fleet: Fleet) -> None:
    other = await fleet.backend.create(replace(SPEC, id=new_sandbox_id()))
    with directories() as root:
        async with local_backend(root, **SMALL) as backend:
            foreign = await backend.create(replace(SPEC, id=new_sandbox_id()))
            found = [await users_of(box) for box in (fleet.box, other, foreign)]
    await fleet.backend.delete(other.id, grace_seconds=0)
    assert {count for _, count in found} == {USERS_EACH}
    assert len({first for first, _ in found}) == 3
    last = DEFAULT_FIRST_USER + DEFAULT_USERS - USERS_EACH
    assert all(DEFAULT_FIRST_USER <= first <= last and first % USERS_EACH == 0 for first, _ in found)


async def test_what_it_changes_of_the_system_is_its_own(fleet: Fleet) -> None:
    paths = (
        "/usr/bin/ash-test",
        "/usr/local/lib/ash-test",
        "/etc/ash-test",
        "/opt/ash-test",
        "/ash-test",
        "/var/ash-test",
    )
    assert (
        await bash(fleet.box, f"set -e; for f in {' '.join(paths)}; do echo x >$f; done; rm /usr/bin/env")
    ).code == 0
    assert [path for path in (*paths, "/usr/bin/env") if on_the_host(path)] == ["/usr/bin/env"]
    other = await fleet.backend.create(replace(SPEC, id=new_sandbox_id()))
    try:
        assert (await bash(other, f"ls {' '.join(paths)} 2>/dev/null; ls /usr/bin/env")).out == "/usr/bin/env\n"
    finally:
        await fleet.backend.delete(other.id, grace_seconds=0)


@needs_users
async def test_users_can_be_made_and_become(fleet: Fleet) -> None:
    script = """set -e
    useradd -m joe; echo x >/tmp/note; chown joe /tmp/note; chmod 600 /tmp/note; stat -c %U /tmp/note
    su joe -c 'id -un; cat /tmp/note; touch /usr/bin/y || echo refused; kill -0 1 || echo refused'
    grep -c '^Cap.*0000000000000000$' <(su joe -c 'grep -E "CapPrm|CapEff|CapAmb" /proc/self/status')"""
    done = await bash(fleet.box, script)
    assert done.out.splitlines() == ["joe", "joe", "x", "refused", "refused", "3"], done


async def test_dpkg_installs_a_package(fleet: Fleet) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("this host has no dpkg")
    script = """set -e
    mkdir -p /tmp/pack/DEBIAN /tmp/pack/usr/bin; cd /tmp
    printf '#!/bin/sh\\necho it runs\\n' >pack/usr/bin/ash-it; chmod 755 pack/usr/bin/ash-it
    for field in 'Package: ash-it' 'Version: 1' 'Architecture: all' 'Maintainer: x <x@x>' 'Description: x'
    do echo "$field" >>pack/DEBIAN/control; done
    dpkg-deb -Zgzip -b pack it.deb >/dev/null; dpkg -i it.deb >/dev/null 2>log || cat log
    ash-it; dpkg -s ash-it | grep Status"""
    done = await bash(fleet.box, script)
    assert done.out == "it runs\nStatus: install ok installed\n", done


async def test_a_full_root_is_told_to_who_fills_it_and_ends_nobody(fleet: Fleet) -> None:
    done = await bash(fleet.box, "head -c 100M /dev/zero >/usr/lib/full; stat -c %s /usr/lib/full; rm /usr/lib/full")
    assert "No space left" in done.error and 0 < int(done.out) <= SMALL["root_bytes"]
    assert (await bash(fleet.box, "echo alive")).out == "alive\n"


async def test_who_speaks_for_it_cannot_be_changed(fleet: Fleet) -> None:
    maps = (await python(fleet.box, "print(open('/proc/self/maps').read())")).out
    assert "/usr/" in maps  # a command has the system's own loader
    script = "print(open(f'/proc/{__import__(\"os\").getppid()}/maps').read())"
    runner = (await python(fleet.box, script)).out
    files = set(re.findall(r" (/\S+)$", runner, re.MULTILINE))
    code = {path for path in files if ".so" in path or "/bin/" in path}  # the rest is data of the locale
    assert code and all(path.startswith("/opt/ash/") for path in code), code
    for attempt in (
        "mv /opt /opt2",
        "mv /opt/ash /opt/b",
        "rmdir /opt/ash",
        "umount /opt/ash",
        "touch /opt/ash/init.py",
    ):
        assert (await bash(fleet.box, attempt)).code != 0, attempt
    script = "echo broken >/etc/ld.so.cache; echo /none.so >/etc/ld.so.preload; echo broken >/usr/lib/python3/x.pth"
    assert (await bash(fleet.box, f"{script}; echo alive")).out == "alive\n"
    assert (await bash(fleet.box, "rm /etc/ld.so.preload; echo alive")).out == "alive\n"


async def test_only_the_listener_and_the_log_are_handed_in(fleet: Fleet) -> None:
    done = await bash(fleet.box, "for f in /proc/2/fd/*; do readlink $f; done; readlink /proc/1/fd/*; env")
    assert {line.split(":")[0] for line in done.out.splitlines() if "=" not in line} <= {"pipe", "socket", "/dev/null"}
    assert "ASH_HOLD_FD" not in done.out


@of_root
async def test_a_range_of_users_is_free_again_when_its_keeper_and_all_of_it_are_gone() -> None:
    more: dict[str, Any] = {"first_user": DEFAULT_FIRST_USER - USERS_EACH, "users": USERS_EACH, "max_sandboxes": 1}
    with directories() as root, directories() as elsewhere:
        async with local_backend(root, **more) as backend, local_backend(elsewhere, **more) as other:
            await backend.create(replace(SPEC, id=new_sandbox_id()))
            keeper = keeper_pid(backend)
            inside = descendants(keeper)
            os.kill(keeper, signal.SIGKILL)
            with anyio.fail_after(WAIT_SECONDS):
                await ended(keeper, *inside)
            first, _ = await users_of(await other.create(replace(SPEC, id=new_sandbox_id())))
            assert first == more["first_user"]


async def test_a_folder_above_a_mount_of_the_host_cannot_be_moved(fleet: Fleet) -> None:
    spec = replace(SPEC, id=new_sandbox_id(), mounts={"/data/recipes/one": "/usr/share"})
    box = await fleet.backend.create(spec)
    done = await bash(
        box, "mkdir /data/recipes/own; mv /data /x; mv /data/recipes /data/x; mv /data/recipes/own /data/own"
    )
    assert done.code == 0 and done.error.count("Device or resource busy") == 2, done
    await fleet.backend.delete(box.id, grace_seconds=0)


async def test_its_etc_tells_of_no_user_or_credential_of_the_host(fleet: Fleet) -> None:
    done = await bash(
        fleet.box, "cat /etc/hostname /etc/hosts /etc/shadow; ls /etc/machine-id /etc/ssh /etc/apt/auth.conf"
    )
    assert re.search(rf"\b{re.escape(socket.gethostname())}\b", done.out) is None and "$" not in done.out
    names = (await bash(fleet.box, "cut -d: -f1 /etc/passwd")).out.split()
    assert {"root", "ash", "nobody", "_apt"} <= set(names) and len(set(names) - {"joe"}) == 19
    assert (await bash(fleet.box, "cat /etc/os-release")).out == OS_RELEASE


async def test_a_small_memory_has_a_small_machine(fleet: Fleet) -> None:
    spec = replace(SPEC, id=new_sandbox_id(), resources=Resources(limits=ResourceAmounts(memory="96Mi")))
    small = await fleet.backend.create(spec)
    sizes = (await bash(small, "df -B1 --output=size / /usr /root /tmp | tail -n +2")).out.split()
    await fleet.backend.delete(small.id, grace_seconds=0)
    assert all(0 < int(size) <= 8 * MIB for size in sizes), sizes


async def test_an_operator_can_keep_the_system_read_only() -> None:
    with directories() as root:
        async with local_backend(root, **SMALL, machine=False) as backend:
            box = await backend.create(replace(SPEC, id=new_sandbox_id()))
            assert not backend.describe()["machine"]
            assert (await bash(box, "id -u; touch /usr/x")).out == "1000\n"
            assert not any("read-only" in warning for warning in box.warnings)


@of_root
async def test_a_hive_does_not_start_with_users_that_others_have() -> None:
    with directories() as root:
        with pytest.raises(ConfigError, match="200 sandboxes need 13107200 users"):
            async with local_backend(root, users=USERS_EACH):
                raise AssertionError("it started")


@of_root
async def test_a_host_whose_users_are_all_taken_refuses_a_start_with_the_reason() -> None:
    with directories() as root:
        more: dict[str, Any] = {"first_user": DEFAULT_FIRST_USER - USERS_EACH, "users": USERS_EACH, "max_sandboxes": 1}
        async with local_backend(root, **more) as backend:
            box = await backend.create(replace(SPEC, id=new_sandbox_id()))
            with directories() as elsewhere:
                async with local_backend(elsewhere, **more) as other:
                    with pytest.raises(StartFailed, match="are taken by sandboxes of this host"):
                        await other.create(replace(SPEC, id=new_sandbox_id()))
                    await backend.delete(box.id, grace_seconds=0)
                    assert await other.create(replace(SPEC, id=new_sandbox_id()))


@of_root
def test_a_base_is_the_same_for_the_same_host_and_has_no_secret(tmp_path: Path) -> None:
    one, two = (make_base(tmp_path / "bases", {"/bin": "usr/bin"}) for _ in range(2))
    assert one == two and os.listdir(tmp_path / "bases") == [one.name]
    assert (one / "bin").is_symlink() and stat.S_IMODE((one / "tmp").stat().st_mode) == 0o1777
    assert not (one / "etc/apt/auth.conf").exists() and not (one / "etc/apt/auth.conf.d").exists()


@pytest.mark.parametrize(
    ("name", "content", "given"),
    [
        ("etc/apt/sources.list", b"deb https://user:p@ss@repo.test/ x\n", b"deb https://repo.test/ x\n"),
        ("etc/apt/apt.conf.d/1", b'A "b";\nAcquire::http::Proxy "http://10.0.0.1";\n', b'A "b";\n'),
        ("etc/apt/apt.conf.d/2", b'Acquire::http::Proxy {\n  "x.test" "DIRECT";\n};\n', None),
        ("etc/wgetrc", b"tries = 2\n", b"tries = 2\n"),
        ("etc/wgetrc", b"tries = 2\nhttp_proxy = http://user:pw@10.0.0.1\n", None),
        ("etc/skel/.profile", b"if true; then\nexport https_proxy=http://10.0.0.1\nfi\n", None),
        ("etc/pam.d/su", b"password required pam_unix.so\n", b"password required pam_unix.so\n"),
    ],
)
def test_a_base_tells_nothing_of_the_hosts_way_out(name: str, content: bytes, given: bytes | None) -> None:
    assert without_secrets(name, content) == given


ON_AN_OVERLAY = """
import os, subprocess, sys
from ash_hub.backends.local.keeper.launchers.mount_names import own_mounts
from ash_hub.backends.local.keeper.launchers.staging import Staged, place, set_up, user_namespace
own_mounts()
folder, first = sys.argv[1], int(sys.argv[2])
for name in ("lower", "upper", "work", "seen"):
    os.mkdir(f"{folder}/{name}")
open(f"{folder}/lower/it", "w").close()
where = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
subprocess.run(["mount", "-t", "overlay", "-o", where, "overlay", f"{folder}/seen"], check=True)
stage = place()
set_up(stage, [Staged(f"{folder}/seen", "0", "overlay")], user_namespace(first, 65536), first, None)
print(os.listdir(f"{stage}/0"))
"""


@of_root
def test_a_folder_that_takes_no_idmapped_mount_is_shown_all_the_same() -> None:
    with directories() as folder:  # on a file system that an overlay can write to
        told = [sys.executable, "-c", ON_AN_OVERLAY, str(folder), str(DEFAULT_FIRST_USER)]
        it = subprocess.run(told, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS)
    assert it.stdout == "['it']\n", it.stderr


FORWARDER = """
import asyncio, threading
from ash_recipes.runner.forwarder import serve
threading.Thread(target=lambda: asyncio.run(serve("/run/ash-egress/proxy.sock")), daemon=True).start()
"""


def hosts_of_this_machine() -> list[str]:
    """Return the hosts of this machine's own package registries, from its configuration."""
    said = "".join(path.read_text() for path in Path("/etc/apt").rglob("sources.list*") if path.is_file())
    said += "".join(path.read_text() for path in Path("/etc/apt/sources.list.d").glob("*") if path.is_file())
    for words in (["npm", "config", "get", "registry"], ["pip", "config", "get", "global.index-url"]):
        if shutil.which(words[0]) is not None:
            said += subprocess.run(words, capture_output=True, text=True, check=False, timeout=60).stdout
    # What pip asks where nothing else is set, and what that refers to.
    found = {"pypi.org", "files.pythonhosted.org", *re.findall(r"https?://(?:[^/\s@]*@)?([a-z0-9.-]+)", said)}
    return sorted(found)


def way_to(name: str) -> list[str]:
    """Return policy entries for a host, with its address: a mirror of one's own may have none that is public."""
    try:
        address = socket.getaddrinfo(name, 443, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return []
    return [f"{name}={address}:{port}" for port in (80, 443)]


def answers(name: str) -> bool:
    try:
        with closing(socket.create_connection((name, 443), 3)):
            return True
    except OSError:
        return False


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", LAUNCHERS)
async def test_package_managers_install_through_the_egress_proxy(launcher: str) -> None:
    hosts = hosts_of_this_machine()
    if not any(answers(name) for name in hosts):
        pytest.skip(f"none of {', '.join(hosts)} answers this machine")
    policy = tuple(entry for name in hosts for entry in way_to(name))
    with directories() as root:
        async with local_backend(root, launcher=launcher) as backend:
            spec = replace(SPEC, id=new_sandbox_id(), network=policy, env={"STAND_IN": FORWARDER})
            box = await backend.create(spec)

            async def does(script: str) -> Done:
                prepared = f"set -a; . /etc/environment; set +a; unset PYTHONPATH; {script}"
                return await run_inside(box, "bash", "-c", prepared, seconds=200)

            if shutil.which("apt-get") is not None:
                done = await does(
                    "(apt-get update && apt-get install -y hello) 2>&1; hello; dpkg -s hello | grep ^Status"
                )
                assert done.out.endswith("Hello, world!\nStatus: install ok installed\n"), done
            if on_the_host("/usr/bin/pip"):
                done = await does(
                    "/usr/bin/pip install -q iniconfig; /usr/bin/python3 -c 'import iniconfig; print(iniconfig)'"
                )
                assert "/usr/local/lib/" in done.out, done
            if on_the_host("/usr/bin/npm"):
                done = await does("npm i -g is-odd 2>&1; ls -d $(npm root -g)/is-odd")
                assert done.code == 0, done
