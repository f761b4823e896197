"""Snapshots of machines: files as they were, in other sandboxes, with other users, and nothing of them on the host."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from ash_hub.backends.base import Instance, Phase, SnapshotLimits, SnapshotOrder
from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.keeper.launchers.staging import Place, make_places
from ash_hub.backends.local.keeper.snapshots import MOST_LAYERS
from ash_mcp.errors import AshError, CapacityExceeded, Conflict, SnapshotNotFound, StartFailed, Unsupported
from ash_mcp.types import Cause, SnapshotId, new_sandbox_id, new_snapshot_id
from tests.hub.backends.local.local_parts import (
    MIB,
    SMALL,
    SPEC,
    WAIT_SECONDS,
    bash,
    directories,
    keeper_pid,
    local_backend,
    needs_isolation,
    settings_in,
    stand_in,
)
from tests.hub.backends.local.machine_parts import needs_snapshots

pytestmark = [pytest.mark.anyio, needs_isolation, needs_snapshots]

LIMITS = SnapshotLimits(per_owner=8, hive=16, owner_bytes=64 * MIB, hive_bytes=128 * MIB)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=[pytest.param("bubblewrap", marks=pytest.mark.heavy), "fork"])
async def backend(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[LocalBackend]:
    with directories() as root:
        async with local_backend(root, launcher=request.param, **SMALL) as made:
            yield made


@pytest.fixture
async def box(backend: LocalBackend) -> AsyncIterator[Instance]:
    made = await spawned(backend)
    yield made
    await backend.delete(made.id, grace_seconds=0)
    for snapshot in await backend.snapshots():
        await backend.drop_snapshot(snapshot.id)


def on_the_host(path: str) -> bool:
    return os.path.lexists(path)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def spawned(backend: LocalBackend, snapshot: SnapshotId | None = None, **more: Any) -> Instance:
    return await backend.create(replace(SPEC, id=new_sandbox_id(), snapshot=snapshot, **more))


def order(**more: Any) -> SnapshotOrder:
    given: dict[str, Any] = {"owner": "ann", "limits": LIMITS, "seconds": 60.0, "record": {"n": 1}, **more}
    return SnapshotOrder(id=new_snapshot_id(), **given)


async def taken(backend: LocalBackend, box: Instance, **more: Any) -> SnapshotId:
    return (await backend.freeze(box.id, order(**more))).id


MADE = """set -e
mkdir -p /opt/made /workspace/deep/er; echo one >/opt/made/it; echo two >/workspace/deep/er/it; echo three >/root/it
rm /usr/bin/yes; rm -rf /usr/share/doc; mkdir /usr/share/doc; echo four >/usr/share/doc/it
useradd -m joe; chown joe /opt/made/it; chmod 4755 /opt/made/it; ln /opt/made/it /opt/made/twin
"""
SHOWN = """cat /opt/made/it /workspace/deep/er/it /root/it /usr/share/doc/*; ls /usr/bin/yes 2>/dev/null
stat -c '%U %a %h' /opt/made/twin; stat -c %U /usr/bin/env /workspace /root; ls /tmp"""
SEEN = "one\ntwo\nthree\nfour\njoe 4755 2\nroot\nroot\nroot\n"


async def test_a_frozen_sandbox_goes_on_with_its_files_and_without_its_processes(
    backend: LocalBackend, box: Instance
) -> None:
    await bash(box, MADE + "echo x >/tmp/it; sleep 600 >/dev/null 2>&1 & echo")
    before = (await bash(box, "cat /proc/self/uid_map; ls -di /proc/self/root")).out
    snapshot = await backend.freeze(box.id, order())
    assert await backend.get(box.id) == box, "its record and its address are as they were"
    assert (await bash(box, SHOWN)).out == SEEN, "what was in /tmp is not there"
    assert (await bash(box, "cat /proc/self/uid_map")).out == before.splitlines()[0] + "\n"
    assert "sleep" not in (await bash(box, "cat /proc/[0-9]*/comm")).out
    assert 0 < snapshot.size < 4 * MIB and snapshot.layers == 1 and 50 < snapshot.left_seconds <= 60
    assert (await backend.snapshots())[0].record == {"n": 1}


async def test_siblings_have_the_files_each_for_itself_as_its_own_users(backend: LocalBackend, box: Instance) -> None:
    await bash(box, MADE)
    snapshot = await taken(backend, box)
    first, second = await spawned(backend, snapshot), await spawned(backend, snapshot)
    for it in (first, second):
        assert (await bash(it, SHOWN)).out == SEEN
    await bash(first, "echo mine >/workspace/deep/er/it; rm /opt/made/it; su joe -c 'echo j >~/it'; rm -r /root/it")
    assert (await bash(second, SHOWN)).out == (await bash(box, SHOWN)).out == SEEN
    maps = {(await bash(it, "cat /proc/self/uid_map")).out.split()[1] for it in (box, first, second)}
    assert len(maps) == 3
    for it in (first, second):
        await backend.delete(it.id, grace_seconds=0)


async def test_reset_takes_it_back_and_again(backend: LocalBackend, box: Instance) -> None:
    await bash(box, MADE)
    snapshot = await taken(backend, box)
    held: list[int] = []
    for number in range(3):
        assert (await bash(box, f"rm -rf /workspace/* /opt/made /usr/share/doc; echo {number} >/root/it")).code == 0
        await backend.reset(box.id, snapshot)
        assert (await bash(box, SHOWN)).out == SEEN
        held.append(descriptors(keeper_pid(backend)))
    assert held[0] == held[1] == held[2], "what is given up is closed"


async def test_snapshots_stand_on_one_another(backend: LocalBackend, box: Instance) -> None:
    await bash(box, MADE)
    first = await taken(backend, box)
    await bash(box, "rm /opt/made/it; echo 2 >/workspace/two; touch /usr/bin/yes; chmod 700 /workspace; rm /root/it")
    second = await backend.freeze(box.id, order())
    assert second.layers == 2
    await backend.drop_snapshot(first)
    sibling = await spawned(backend, second.id)
    seen = "ls /opt/made /workspace /usr/bin/yes; stat -c %a /workspace; ls /root; cat /workspace/deep/er/it"
    lines = ["/usr/bin/yes", "", "/opt/made:", "twin", "", "/workspace:", "deep", "two", "700", "two"]
    assert (await bash(sibling, seen)).out.splitlines() == lines
    await backend.delete(box.id, grace_seconds=0)
    assert (await bash(sibling, seen)).out.splitlines() == lines, "its first sandbox and its first snapshot are gone"
    await backend.delete(sibling.id, grace_seconds=0)


async def test_a_live_one_copies_what_there_is_and_ends_nothing(backend: LocalBackend, box: Instance) -> None:
    await bash(box, MADE)
    await taken(backend, box)
    script = """rm /opt/made/it; rm -r /usr/share/doc; mkdir /usr/share/doc; echo 5 >/usr/share/doc/five
    ln -s / /workspace/root; truncate -s 8M /workspace/sparse; setfattr -n user.a -v b /workspace/deep 2>/dev/null
    cd /workspace/deep; for i in $(seq 30); do mkdir $(printf 'x%.0s' $(seq 250)); cd x*; done; echo deep >it
    sleep 600 >/dev/null 2>&1 & mkfifo /workspace/pipe; ln /opt/made/twin /opt/made/other; chown joe /workspace/pipe"""
    assert (await bash(box, script)).code == 0
    snapshot = await backend.freeze(box.id, order(live=True))
    assert snapshot.layers == 2 and 0 < snapshot.size < MIB
    assert "sleep" in (await bash(box, "cat /proc/[0-9]*/comm")).out
    await bash(box, "rm -r /workspace/*")
    sibling = await spawned(backend, snapshot.id)
    seen = """ls /opt/made /usr/share/doc /workspace; stat -c '%U %h' /opt/made/other; cd /workspace
    stat -c '%F %U' pipe; stat -c %s sparse; readlink root; cd deep; for i in $(seq 30); do cd x*; done; cat it"""
    lines = ["/opt/made:", "other", "twin", "", "/usr/share/doc:", "five", "", "/workspace:", "deep", "pipe", "root"]
    lines += ["sparse", "joe 2", "fifo joe", str(8 * MIB), "/", "deep"]
    assert (await bash(sibling, seen)).out.splitlines() == lines
    await backend.delete(sibling.id, grace_seconds=0)


async def test_too_many_on_one_another_are_refused(backend: LocalBackend, box: Instance) -> None:
    many = replace(LIMITS, per_owner=99, hive=99)
    with anyio.fail_after(60):
        held = [await taken(backend, box, limits=many) for _ in range(MOST_LAYERS)]
        with pytest.raises(CapacityExceeded, match="stands on 32 snapshots"):
            await taken(backend, box, limits=many)
    await backend.reset(box.id, held[5])
    assert (await backend.freeze(box.id, order(limits=many))).layers == 7


async def test_what_is_over_a_limit_is_refused_and_its_sandbox_goes_on(backend: LocalBackend, box: Instance) -> None:
    sleeper = "sleep 600 >/dev/null 2>&1 & until grep -q sleep /proc/$!/comm; do :; done"
    await bash(box, f"head -c 3M /dev/zero >/workspace/big; {sleeper}")
    for limits, why in (
        (replace(LIMITS, owner_bytes=2 * MIB), "owner_bytes"),
        (replace(LIMITS, hive_bytes=2 * MIB), "hive_bytes"),
        (replace(LIMITS, per_owner=0), "per_owner"),
        (replace(LIMITS, hive=0), "hive"),
    ):
        with pytest.raises(CapacityExceeded, match=why):
            await taken(backend, box, owner="bob", limits=limits)
    assert "sleep" in (await bash(box, "cat /proc/[0-9]*/comm")).out


async def test_what_it_writes_has_the_same_bound_after_each(backend: LocalBackend, box: Instance) -> None:
    await bash(box, "head -c 5M /dev/zero >/workspace/first")
    snapshot = await taken(backend, box)
    for _ in range(2):
        done = await bash(box, "head -c 100M /dev/zero >/workspace/more; stat -c %s /workspace/more")
        assert "No space left" in done.error and 5 * MIB < int(done.out) <= SMALL["workspace_bytes"]
        done = await bash(box, "head -c 100M /dev/zero >/usr/more; stat -c %s /usr/more")
        assert "No space left" in done.error and 0 < int(done.out) <= SMALL["root_bytes"]
        await backend.reset(box.id, snapshot)


async def test_its_time_is_bounded(backend: LocalBackend, box: Instance) -> None:
    snapshot = await taken(backend, box, seconds=0.05)
    with anyio.fail_after(WAIT_SECONDS):
        while await backend.snapshots():
            await anyio.sleep(0.01)
    with pytest.raises(SnapshotNotFound):
        await backend.reset(box.id, snapshot)
    with pytest.raises(SnapshotNotFound):
        await spawned(backend, snapshot)
    assert (await bash(box, "echo alive")).out == "alive\n"


HOSTILE = """
mkdir -p /workspace/d; ln -s / /workspace/root; ln -s /proc/self/root/../../etc /opt/out
mknod /workspace/whiteout c 0 0 && echo 'whiteout made'
mknod /workspace/null c 1 3 || mknod /opt/sda b 8 0 || echo 'no device'
cp /bin/bash /workspace/suid; chmod 6755 /workspace/suid
python3 - <<'P'
import os
for name in ("opaque", "redirect", "metacopy", "whiteout", "origin"):
    for space in ("user", "trusted"):
        for path in ("/workspace/d", "/opt"):
            try: os.setxattr(path, f"{space}.overlay.{name}", b"y" if name == "opaque" else b"/etc/shadow")
            except OSError: pass
            else: print(space, name)
P
long=$(printf 'x%.0s' $(seq 255)); cd /workspace; for i in $(seq 30); do mkdir $long && cd $long; done
ln -sf /oldroot/tmp/ash-evil /etc/ld.so.preload
"""


async def test_hostile_layers_do_nothing(backend: LocalBackend, box: Instance) -> None:
    done = await bash(box, HOSTILE)
    assert "no device" in done.out and "trusted" not in done.out, done
    snapshot = await taken(backend, box)
    sibling = await spawned(backend, snapshot)
    for it in (box, sibling):
        done = await bash(it, "stat -c '%F' /etc/ld.so.preload; ls /workspace/d; readlink /workspace/root")
        assert done.out == "regular empty file\n/\n", done
        assert (await bash(it, "grep -E ' / | /usr | /workspace ' /proc/self/mounts")).out.count("nosuid,nodev") == 3
        assert (await bash(it, "su nobody -s /bin/sh -c '/workspace/suid -p -c id -u'")).out != "0\n"
    assert not on_the_host("/tmp/ash-evil")
    await backend.delete(sibling.id, grace_seconds=0)


async def test_a_directory_where_the_hive_has_a_file_ends_the_sandbox_and_no_snapshot(
    backend: LocalBackend, box: Instance
) -> None:
    await bash(box, "echo good >/workspace/it")
    good = await taken(backend, box)
    assert (await bash(box, "rm /etc/ld.so.preload; mkdir /etc/ld.so.preload")).code == 0
    why = r"/etc/ld\.so\.preload is a directory, and the hive has a file there|walls could not be made"
    with pytest.raises(StartFailed, match=why):
        await taken(backend, box)
    gone = await backend.get(box.id)
    assert gone is not None and gone.phase is Phase.ENDED and gone.exit is not None
    assert gone.exit.cause is Cause.HIVE and "did not start anew" in gone.exit.message
    assert [it.id for it in await backend.snapshots() if it.id != good] == []
    with pytest.raises(Conflict):
        await backend.reset(box.id, good)
    other = await spawned(backend, good)
    assert (await bash(other, "cat /workspace/it")).out == "good\n"
    await backend.delete(other.id, grace_seconds=0)


async def test_a_delete_does_not_wait_for_a_restart(backend: LocalBackend) -> None:
    box = await spawned(backend)
    async with anyio.create_task_group() as group:

        async def freeze() -> None:
            with pytest.raises((Conflict, StartFailed)):
                await taken(backend, box)

        group.start_soon(freeze)
        await anyio.lowlevel.checkpoint()
        with pytest.raises(Conflict):
            await taken(backend, box)
        await backend.delete(box.id, grace_seconds=0)
    assert await backend.get(box.id) is None
    assert await backend.snapshots() == []


async def test_snapshots_outlive_their_hub_and_their_sandbox(anyio_backend: str) -> None:
    with directories() as root:
        async with local_backend(root, **SMALL) as backend:
            box = await spawned(backend)
            await bash(box, MADE)
            snapshot = await taken(backend, box)
            await backend.delete(box.id, grace_seconds=0)
            keeper = keeper_pid(backend)
            await backend.__aexit__(None, None, None)
            async with LocalBackend(settings_in(root, **SMALL), runtime=stand_in()) as later:
                assert keeper_pid(later) == keeper
                assert [it.id for it in await later.snapshots()] == [snapshot]
                again = await spawned(later, snapshot)
                assert (await bash(again, SHOWN)).out == SEEN
                await later.delete(again.id, grace_seconds=0)
                await later.drop_snapshot(snapshot)
            await backend.__aenter__()


async def test_nothing_is_left_of_them_after_the_kill_of_their_keeper() -> None:
    large: dict[str, Any] = SMALL | {"workspace_bytes": 64 * MIB, "memory_bytes": 256 * MIB}

    def tmpfs_bytes() -> int:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Shmem:"))

    with directories() as root:
        async with local_backend(root, **large) as backend:
            box = await spawned(backend)
            before = tmpfs_bytes()
            await bash(box, "head -c 48M /dev/zero >/workspace/big")
            await taken(backend, box)
            assert tmpfs_bytes() - before > 40 * MIB
            os.kill(keeper_pid(backend), signal.SIGKILL)
            with anyio.fail_after(WAIT_SECONDS):
                while tmpfs_bytes() - before > 20 * MIB:
                    await anyio.sleep(0.02)
            assert await backend.snapshots() == []


@pytest.mark.heavy
async def test_a_keeper_that_ends_while_sandboxes_are_reset_leaves_none() -> None:
    with directories() as root:
        async with local_backend(root, **SMALL) as backend:
            for number in range(6):
                boxes = [await spawned(backend) for _ in range(3)]
                snapshot = await taken(backend, boxes[0])
                keeper = os.pidfd_open(keeper_pid(backend))
                async with anyio.create_task_group() as group:

                    async def again(box: Instance, snapshot: SnapshotId = snapshot) -> None:
                        with pytest.raises(AshError):
                            while True:
                                await backend.reset(box.id, snapshot)

                    for box in boxes:
                        group.start_soon(again, box)
                    await anyio.sleep(0.1 + 0.03 * number)
                    signal.pidfd_send_signal(keeper, signal.SIGTERM)
                    with anyio.fail_after(WAIT_SECONDS):
                        await anyio.wait_readable(keeper)
                os.close(keeper)
                for box in boxes:
                    await backend.delete(box.id, grace_seconds=0)


def test_no_link_leads_away_from_where_something_is_mounted(tmp_path: Path) -> None:
    stage, outside = tmp_path / "stage", tmp_path / "outside"
    for made in (stage / "etc", outside):
        made.mkdir(parents=True)
    (stage / "link").symlink_to(outside)
    (stage / "etc" / "file").symlink_to(outside / "file")
    with pytest.raises(OSError, match="'link' of /link/deep is no directory any more"):
        make_places([Place(str(stage), "link/deep", is_directory=True)])
    make_places([Place(str(stage), "etc/file", is_directory=False), Place(str(stage), "new/deep", is_directory=True)])
    assert not os.path.lexists(stage / "etc" / "file") and (stage / "new" / "deep").is_dir()
    assert list(outside.iterdir()) == []


async def test_without_machines_there_are_none() -> None:
    with directories() as root:
        async with local_backend(root, machine=False, **SMALL) as backend:
            assert "ASH_HUB_BACKEND__MACHINE" in (backend.no_snapshots() or "")
            box = await spawned(backend)
            with pytest.raises(Unsupported):
                await taken(backend, box)
