"""Copies of the host's system: what is in one, which are made and which go, and when none is made."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ash_hub.backends.local.keeper.launchers.plan import Subordinate
from ash_hub.backends.local.keeper.used_directories import hold, remove_unused
from ash_hub.backends.local.machine_base import base_entries
from ash_hub.backends.local.ordinary_host import tried
from ash_hub.backends.local.own_system import COPY_COMMAND, SystemProblem, make_copy
from tests.hub.backends.local.local_parts import WAIT_SECONDS, directories

ALONE = Subordinate()
_PROBLEM = tried(ALONE)
needs_namespaces = pytest.mark.skipif(_PROBLEM is not None, reason=f"no copy can be made here: {_PROBLEM}")
GIB = 1 << 30


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def all_but(*paths: str) -> tuple[str, ...]:
    """Return what is to be left out so that of /usr only these directories of it are copied."""
    kept = [f"/usr/{path}" for path in paths]
    return ("/var/lib/dpkg", *(entry.path for entry in os.scandir("/usr") if entry.path not in kept))


async def copy(place: Path, name: str, *paths: str, most: int = GIB) -> Path:
    return await make_copy(place, name, ALONE, base_entries({"/bin": "usr/bin"}), all_but(*paths), most)


@needs_namespaces
@pytest.mark.anyio
async def test_a_copy_has_the_paths_that_are_not_left_out_and_an_etc_of_its_own() -> None:
    with directories() as place:
        made = await copy(place, "one", "games", "lib64")
        assert sorted(os.listdir(made / "usr")) == ["games", "lib64"]
        assert sorted(os.listdir(made / "usr/lib64")) == sorted(os.listdir("/usr/lib64"))
        assert all(
            os.stat(made / name).st_mtime == os.stat(f"/{name}").st_mtime for name in ("usr/games", "usr/lib64")
        )
        assert (made / "bin").is_symlink() and (made / "etc/passwd").read_text().startswith("root:x:0:0:")
        assert await copy(place, "one", "games", "lib64") == made
        assert {entry for entry in os.listdir(place) if entry != ".lock"} == {"one"}


@needs_namespaces
@pytest.mark.anyio
async def test_a_copy_that_nobody_uses_goes_when_another_is_made() -> None:
    with directories() as place:
        used = hold(str(await copy(place, "used", "games")))
        await copy(place, "unused", "games")
        await copy(place, "new", "games")
        assert set(os.listdir(place)) == {".lock", "used", "new"}
        os.close(used)


@needs_namespaces
@pytest.mark.anyio
async def test_a_system_that_is_too_large_is_not_copied() -> None:
    with directories() as place:
        with pytest.raises(SystemProblem, match="ASH_HUB_BACKEND__SYSTEM_BYTES"):
            await copy(place, "one", "sbin", most=1)
        assert os.listdir(place) == [".lock"]


@needs_namespaces
@pytest.mark.anyio
async def test_a_place_that_cannot_be_written_is_named() -> None:
    with pytest.raises(SystemProblem, match="/proc/nowhere"):
        await copy(Path("/proc/nowhere"), "one", "games")


def started(place: Path, **more: Any) -> subprocess.Popen[bytes]:
    order: dict[str, Any] = {"place": str(place), "name": "one", "entries": [], "users": [0, 0, 0, 0]}
    order |= {"without": all_but("games"), "most_bytes": GIB, "spare_bytes": 0, **more}
    process = subprocess.Popen(COPY_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode() + b"\n")
    process.stdin.flush()
    return process


@needs_namespaces
def test_a_full_disk_is_told_before_anything_is_copied() -> None:
    with directories() as place:
        said, _ = started(place, spare_bytes=1 << 60).communicate(timeout=WAIT_SECONDS)
        assert "MiB free: make room" in json.loads(said.splitlines()[-1])["problem"]


@needs_namespaces
def test_who_waits_for_another_copy_gives_up_with_its_hive() -> None:
    with directories() as place, (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said, _ = started(place).communicate(timeout=WAIT_SECONDS)  # closes its standard input
        assert json.loads(said) == {"problem": "the hive has ended"}
        assert os.listdir(place) == [".lock"]


def test_the_youngest_of_the_unused_stay_and_what_is_just_being_made(tmp_path: Path) -> None:
    for age, name in enumerate(("young", "old", "older", "keep", ".new-x")):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / ".new-y").mkdir()
    remove_unused(tmp_path, "keep", spare=1, fresh_seconds=60)
    assert set(os.listdir(tmp_path)) == {"young", "keep", ".new-y"}


def test_what_is_held_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    held = hold(str(tmp_path / "it"))
    remove_unused(tmp_path, "")
    assert os.listdir(tmp_path) == ["it"]
    os.close(held)
    remove_unused(tmp_path, "")
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        hold(str(tmp_path / "it"))


def test_directories_that_another_removes_at_the_same_time_are_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("keep", "a", "b"):
        (tmp_path / name).mkdir()
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        path.rmdir()
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    remove_unused(tmp_path, "keep")
    assert os.listdir(tmp_path) == ["keep"]
