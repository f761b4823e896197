"""Machines of a hive that an ordinary user runs: whose its users are, and what the copy of the system is good for."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ash_hub.backends.base import Instance
from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.subordinates import own_subordinates
from ash_mcp.types import new_sandbox_id
from tests.hub.backends.local.local_parts import (
    MIB,
    SPEC,
    bash,
    directories,
    keeper_pid,
    local_backend,
    main_process,
    needs_isolation,
    python,
)
from tests.hub.backends.local.machine_parts import USERS_OF_THEIR_OWN, needs_machines, needs_users

of_a_user = pytest.mark.skipif(os.geteuid() == 0, reason="it is about what an ordinary user runs")
pytestmark = [pytest.mark.anyio, needs_isolation, needs_machines, of_a_user]

LARGE: dict[str, Any] = {"root_bytes": 256 * MIB, "tmp_bytes": 64 * MIB, "workspace_bytes": 64 * MIB}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def backend() -> AsyncIterator[LocalBackend]:
    with directories() as root:
        async with local_backend(root, **LARGE) as made:
            yield made


@pytest.fixture
async def box(backend: LocalBackend) -> Instance:
    return await backend.create(replace(SPEC, id=new_sandbox_id()))


def user_outside(backend: LocalBackend) -> int:
    """Return who the only sandbox's root is to the host."""
    status = Path(f"/proc/{main_process(backend)}/status").read_text()
    return int(status.split("\nUid:\t")[1].split()[0])


@needs_users
async def test_no_two_sandboxes_of_a_users_hives_have_a_user_in_common() -> None:
    users = own_subordinates()
    assert not isinstance(users, str)
    with directories() as root, directories() as elsewhere:
        async with local_backend(root) as one, local_backend(elsewhere, max_sandboxes=50) as other:
            first = [user_outside(it) for it in (one, other) if await it.create(replace(SPEC, id=new_sandbox_id()))]
            assert all(users.first_user < user < users.first_user + users.size for user in first)
            assert abs(first[0] - first[1]) >= 327 and os.geteuid() not in first


@needs_users
async def test_root_owns_its_directories_and_may_change_what_the_copys_owner_has(box: Instance) -> None:
    script = """set -e
    stat -c %u / /usr /usr/bin /etc /var/lib; stat -c %U /usr/bin/bash
    echo x >>/usr/bin/zdiff; chown root:root /usr/bin/cat; chmod 700 /usr/bin/cat; stat -c %U:%a /usr/bin/cat
    mv /usr/share/perl5 /usr/share/perl6; rm -rf /usr/include; mkdir /usr/include; ls /usr/include | wc -l"""
    done = await bash(box, script)
    assert done.out.split() == ["0"] * 5 + ["bin", "root:700", "0"], done


@needs_users
async def test_programs_choose_users_that_there_are(box: Instance) -> None:
    script = """set -e
    useradd -r one; useradd two; touch /tmp/a /tmp/b; chown one:one /tmp/a; chown two:two /tmp/b
    chown nobody:nogroup /tmp; chown www-data:staff /usr/local; su two -c 'id -un'; stat -c %U /tmp/a /tmp/b"""
    done = await bash(box, script)
    assert done.out.split() == ["two", "one", "two"], done
    assert (await bash(box, "chown 40000 /tmp/a")).code != 0


async def test_a_compiler_and_git_work(box: Instance) -> None:
    if shutil.which("gcc") is None or shutil.which("git") is None:
        pytest.skip("this host has no gcc, or no git")
    script = r"""set -e; cd /workspace
    printf '#include <stdio.h>\nint main(void) { puts("compiled"); }\n' >a.c; gcc -o /usr/local/bin/a a.c; a
    git init -q --bare /srv/one.git; git config --global user.email x@x; git config --global user.name x
    git daemon --base-path=/srv --export-all --enable=receive-pack \
      --reuseaddr --detach --pid-file=/tmp/pid
    until git clone -q git://127.0.0.1/one.git one 2>/dev/null; do :; done
    cd one; echo x >f; git add f; git commit -qm x
    git push -q origin HEAD:main; git ls-remote git://127.0.0.1/one.git | wc -l; kill $(cat /tmp/pid)"""
    done = await bash(box, script)
    assert done.out.split() == ["compiled", "1"], done


async def test_without_subordinates_each_spawn_says_what_fails_and_what_to_do(box: Instance) -> None:
    told = [warning for warning in box.warnings if "there is no other" in warning]
    assert bool(told) is not USERS_OF_THEIR_OWN
    if told:
        assert "usermod --add-subuids" in told[0] or "uidmap" in told[0]
        assert (await bash(box, "touch /tmp/x; chown 1 /tmp/x")).code != 0


async def test_what_it_begins_as_is_not_changed_by_a_sandbox(backend: LocalBackend, box: Instance) -> None:
    await bash(box, "rm -rf /usr/lib /usr/bin /etc")
    other = await backend.create(replace(SPEC, id=new_sandbox_id()))
    assert (await bash(other, "ls /usr/bin/env /etc/passwd")).out == "/etc/passwd\n/usr/bin/env\n"


async def test_the_limit_on_processes_is_for_all_users_of_a_sandbox_together() -> None:
    with directories() as root:
        async with local_backend(root, max_processes=40) as backend:
            if any("number of processes" in warning for warning in backend.describe()["warnings"]):
                pytest.skip("this host cannot limit processes")
            box = await backend.create(replace(SPEC, id=new_sandbox_id()))
            users = "root daemon sys" if USERS_OF_THEIR_OWN else "root"
            script = f"""for user in {users}; do
            setpriv --reuid $user --keep-groups sh -c 'for i in $(seq 30); do sleep 30 & done' >/dev/null 2>&1; done
            set -- /proc/[0-9]*; echo $#"""
            done = await bash(box, script)
            assert 30 < int(done.out) <= 40, done
            assert keeper_pid(backend)


async def test_one_sandbox_takes_a_part_only_of_what_is_counted_for_the_hives_user(box: Instance) -> None:
    script = """
import ctypes, os
inotify_init, taken = ctypes.CDLL(None).inotify_init, 0
for user in (0, 1, 3):
    if (child := os.fork()) == 0:
        try: os.setuid(user)
        except OSError: pass
        count = 0
        while inotify_init() >= 0: count += 1
        print(count, flush=True)
        __import__("time").sleep(3)
        os._exit(0)
for _ in range(3): os.wait()
"""
    taken = [int(word) for word in (await python(box, script)).out.split()]
    assert 0 < sum(taken) <= 16, taken
