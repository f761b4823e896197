"""A disk that is full, a directory that cannot be written, no descriptor left: a clear error, and nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import pytest

from ash_mcp import Hive
from ash_mcp.errors import AshError, StartFailed
from tests.hive_process import ASH
from tests.hub.backends.local.local_parts import needs_isolation
from tests.system.crash_parts import Home, home

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, needs_isolation]

SMALL_BYTES = 4 * 1024 * 1024
SPARE_DESCRIPTORS = 8
SECONDS = 60


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def mounted(folder: Path, *options: str) -> None:
    """Mount a small file system, or skip where this user may not."""
    words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={SMALL_BYTES},mode=700", *options]), "ash-test", folder]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system here")


@contextmanager
def small_home() -> Generator[Home]:
    """A hive's home whose state and run directory are small file systems."""
    with home() as place:
        folders = [place.folder / name for name in ("state", "run")]
        with ExitStack() as stack:
            for folder in folders:
                folder.mkdir(mode=0o700)
                mounted(folder)
                stack.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
            yield place
            for hub in place.hubs:
                hub.kill()
                hub.communicate()
            keeper = place.keeper()
            if keeper is not None:
                os.kill(keeper, 15)


def fill(place: Home) -> list[Path]:
    ballast = [place.folder / name / "ballast" for name in ("state", "run")]
    for file in ballast:
        with pytest.raises(OSError, match="No space left"):
            file.write_bytes(b"x" * (2 * SMALL_BYTES))
    return ballast


def refused_start(place: Home) -> str:
    """Start a hub that cannot, and return what it says."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ASH_")}
    own = {"ASH_HUB_STATE_DIR": str(place.folder / "state"), "ASH_HUB_RUN_DIR": str(place.folder / "run")}
    done = subprocess.run(
        (*ASH, "up", "--port", "0"),
        env={**clean, **own},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode in (1, 2) and done.stdout == "", done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_state_directory_that_is_a_file_is_named() -> None:
    with home() as place:
        (place.folder / "state").write_text("mine")
        said = refused_start(place)
        assert str(place.folder / "state") in said and "ASH_HUB_STATE_DIR" in said
        assert (place.folder / "state").read_text() == "mine"


@pytest.mark.parametrize("name", ["state", "run"])
def test_a_directory_that_cannot_be_written_is_named(name: str) -> None:
    with home() as place, ExitStack() as stack:
        folder = place.folder / name
        folder.mkdir(mode=0o500)
        if os.geteuid() == 0:  # modes do not hold root
            mounted(folder, "ro")
            stack.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
        elif name == "run":
            pytest.skip("a hive opens a run directory of its own user again; only root can mount one read-only")
        said = refused_start(place)
        assert str(folder) in said and f"ASH_HUB_{name.upper()}_DIR" in said


def test_a_first_start_on_a_full_disk_leaves_nothing_half_written() -> None:
    with small_home() as place:
        ballast = fill(place)
        said = refused_start(place)
        assert "No space left" in said and str(place.folder) in said, said
        for file in ballast:
            file.unlink()
        place.start()
        assert place.stop_hub() == 0


async def test_a_full_disk_refuses_what_it_cannot_keep_and_loses_nothing() -> None:
    with small_home() as place:
        url = await anyio.to_thread.run_sync(place.start)
        async with Hive(url) as hive:
            box = await hive.spawn("echo", session="first")
            ballast = fill(place)
            with pytest.raises(StartFailed, match="No space left"):
                await hive.spawn("general", session="second")
            assert (await box.call("echo", text="unharmed")).structured == {"text": "unharmed"}
            assert [str(info.session) for info in await hive.list()] == ["first"]
        place.kill_hub()
        said = await anyio.to_thread.run_sync(refused_start, place)
        assert "No space left" in said and str(place.folder) in said
        for file in ballast:
            file.unlink()
        for file in (place.folder / "state" / "toolsets").iterdir():
            json.loads(file.read_text())  # none was cut short
        async with Hive(await anyio.to_thread.run_sync(place.start)) as hive:
            assert [info.id for info in await hive.list()] == [box.id]
            assert (await (await hive.attach("first")).call("echo", text="x")).structured == {"text": "x"}
            async with hive.spawn("general"):
                pass
        assert place.stop_hub() == 0
        assert place.keeper() is None


def cpu_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def free_descriptors(pid: int) -> list[int]:
    """Return the lowest numbers that a process may still give to descriptors."""
    held = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    allowed = resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
    return [number for number in range(min(allowed, len(held) + SPARE_DESCRIPTORS + 1)) if number not in held]


def limit_descriptors(pid: int) -> tuple[int, int]:
    """Leave a process a few descriptors more than it has, and return what it was allowed before."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free_descriptors(pid)[SPARE_DESCRIPTORS], before[1]))
    return before


async def take_descriptors(pid: int, url: str, held: ExitStack) -> None:
    """Connect until a hub has no descriptor left; connections that it has no room for it closes."""
    address = (urlsplit(url).hostname or "", urlsplit(url).port or 0)
    with anyio.fail_after(SECONDS):
        while free_descriptors(pid):
            held.enter_context(socket.create_connection(address))
            await anyio.sleep(0.01)


async def test_a_hub_without_descriptors_neither_spins_nor_loses_anything() -> None:
    with home() as place:
        url = await anyio.to_thread.run_sync(place.start)
        async with Hive(url) as hive:
            box = await hive.spawn("echo", session="first")
            hub = place.hubs[-1].pid
            before = limit_descriptors(hub)
            with ExitStack() as held:
                with anyio.fail_after(SECONDS), pytest.raises(AshError) as refused:
                    while True:
                        await take_descriptors(hub, url, held)
                        # one that the hub lets go just then serves the spawn
                        async with hive.spawn("echo"):
                            pass
                assert "Traceback" not in str(refused.value)
                used, began = cpu_seconds(hub), time.monotonic()
                await anyio.sleep(1.0)
                assert (cpu_seconds(hub) - used) / (time.monotonic() - began) < 0.5
            with anyio.fail_after(SECONDS):
                while not await spawned(url):
                    await anyio.sleep(0.1)
            resource.prlimit(hub, resource.RLIMIT_NOFILE, before)
        async with Hive(url) as hive:
            assert box.id in [info.id for info in await hive.list()]
            assert (await (await hive.attach("first")).call("echo", text="x")).structured == {"text": "x"}
        assert place.stop_hub() == 0
        assert place.remains() == []


async def spawned(url: str) -> bool:
    try:
        async with Hive(url) as hive, hive.spawn("echo"):
            return True
    except AshError:
        return False


async def test_a_keeper_without_descriptors_refuses_a_spawn_and_goes_on() -> None:
    with home() as place:
        url = await anyio.to_thread.run_sync(place.start)
        async with Hive(url) as hive:
            box = await hive.spawn("echo", session="first")
            keeper = place.known_keeper()
            before = limit_descriptors(keeper)
            made = 0
            with pytest.raises(AshError) as refused:
                for made in range(4 * SPARE_DESCRIPTORS):
                    await hive.spawn("echo", session=f"more{made}")
            assert refused.value.kind == "start_failed" and "Too many open files" in str(refused.value)
            assert len(await hive.list()) == 1 + made
            used, began = cpu_seconds(keeper), time.monotonic()
            await anyio.sleep(1.0)
            assert (cpu_seconds(keeper) - used) / (time.monotonic() - began) < 0.5
            resource.prlimit(keeper, resource.RLIMIT_NOFILE, before)
            assert (await box.call("echo", text="x")).structured == {"text": "x"}
            async with hive.spawn("echo"):
                pass
        assert place.stop_hub() == 0
        assert place.remains() == []
