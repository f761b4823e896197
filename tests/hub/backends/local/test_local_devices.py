"""Device nodes of a sandbox: usable as anywhere, not changeable, and the host sees nothing of how that is done."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.keeper.launchers.mount_names import DEVICES
from ash_mcp.types import new_sandbox_id
from tests.hub.backends.local import known_host
from tests.hub.backends.local.local_parts import (
    SPEC,
    WAIT_SECONDS,
    bash,
    descendants,
    directories,
    ended,
    keeper_pid,
    local_backend,
    needs_isolation,
)

pytestmark = [
    pytest.mark.anyio,
    needs_isolation,
    pytest.mark.skipif(not known_host.facts().seals, reason="this host lets nobody bind device nodes read-only"),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def backend() -> AsyncIterator[LocalBackend]:
    with directories() as root:
        async with local_backend(root) as entered:
            yield entered


def mounts_on_devices() -> list[str]:
    """Return what is mounted on device nodes where this process is, as everything else of the host sees it."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4] in DEVICES]


async def test_every_node_is_read_and_written(backend: LocalBackend) -> None:
    box = await backend.create(replace(SPEC, id=new_sandbox_id()))
    script = """
echo x >/dev/null && echo y >>/dev/zero && head -c 2 /dev/zero /dev/urandom /dev/random >/tmp/bytes && echo fine
echo x >/dev/full || echo full
script --quiet --command 'echo typed >/dev/tty' /dev/null </dev/null"""
    done = await bash(box, script)
    assert done.out.split() == ["fine", "full", "typed"], done
    for name in DEVICES:
        assert "Read-only file system" in (await bash(box, f"chmod 666 {name}")).error


async def test_the_host_has_no_mount_of_it_while_a_sandbox_runs_or_after_its_keeper_was_killed(
    backend: LocalBackend,
) -> None:
    before = mounts_on_devices(), {path: os.stat(path) for path in DEVICES}
    await backend.create(replace(SPEC, id=new_sandbox_id()))
    assert mounts_on_devices() == before[0]
    keeper = keeper_pid(backend)
    processes = descendants(keeper)
    os.kill(keeper, signal.SIGKILL)
    with anyio.fail_after(WAIT_SECONDS):
        await ended(keeper, *processes)
    assert mounts_on_devices() == before[0]
    assert all(os.access(path, os.W_OK) and os.stat(path).st_mode == before[1][path].st_mode for path in DEVICES)
