"""A sandbox that may go out has its way out when it is there, or it is not there at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ash_hub.backends.local import LocalBackend
from ash_mcp.errors import StartFailed
from ash_mcp.types import new_sandbox_id
from tests.hub.backends.local.local_parts import SPEC, bash, keeper_pid, local_backend, needs_isolation, proxies
from tests.hub.backends.local.test_egress_local import asked, spawned
from tests.hub.egress.egress_parts import error_of

pytestmark = [pytest.mark.anyio, needs_isolation]

IN_FLIGHT = """
import os, resource, socket, sys
most = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
file, held = os.open("/dev/null", os.O_RDONLY), []
while True:
    held.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
    try:
        while True:
            socket.send_fds(held[-1][0], [b"x"], [file] * 253, socket.MSG_DONTWAIT)
    except BlockingIOError:
        pass
    except OSError as error:
        print(error.errno, flush=True)
        break
sys.stdin.read()
"""
"""Sends descriptors that nobody receives, as many as a process with so many open files may."""


@contextmanager
def in_flight(most: int) -> Generator[None]:
    words = [sys.executable, "-I", "-S", "-c", IN_FLIGHT, str(most)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdin is not None and sender.stdout is not None
        assert sender.stdout.readline() == "109\n"  # too many references
        yield
        sender.stdin.close()


async def is_served(backend: LocalBackend) -> bool:
    return error_of(await asked(await spawned(backend), "http://127.0.0.1/"))["reason"] == "loopback"


async def test_without_a_proxy_that_answers_a_spawn_fails_and_a_later_one_works(root: Path) -> None:
    async with local_backend(root, start_timeout_seconds=1.0) as backend:
        assert await is_served(backend)
        (proxy,) = proxies(keeper_pid(backend))
        os.kill(proxy, signal.SIGSTOP)
        try:
            with pytest.raises(StartFailed, match="no way out within 1 s: the egress proxy does not answer") as failed:
                await spawned(backend)
            assert failed.value.retryable and not failed.value.trainable and failed.value.data["step"] == "egress"
            without = await backend.create(replace(SPEC, id=new_sandbox_id()))
            assert (await bash(without, "echo here")).out == "here\n"
        finally:
            os.kill(proxy, signal.SIGCONT)
        assert await is_served(backend)


def require_ordinary() -> None:
    if os.geteuid() == 0:
        pytest.skip("the kernel does not count what root has in flight")


@pytest.fixture
def few_files() -> Generator[int]:
    """Give this process, and the keeper that it starts, no more open files than a sandbox has; returns the most."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_what_sandboxes_have_in_flight_takes_no_way_out_from_others(root: Path, few_files: int) -> None:
    require_ordinary()
    async with local_backend(root, open_files=1024) as backend:
        with in_flight(1024):
            assert await is_served(backend)
        sandbox = await backend.create(replace(SPEC, id=new_sandbox_id()))
        assert int((await bash(sandbox, "ulimit -Hn")).out) == 1024
    async with local_backend(root, open_files=few_files) as backend:
        sandbox = await backend.create(replace(SPEC, id=new_sandbox_id()))
        assert int((await bash(sandbox, "ulimit -Hn")).out) == few_files // 2


async def test_while_no_descriptor_can_be_handed_over_a_spawn_fails_and_a_later_one_works(
    root: Path, few_files: int
) -> None:
    require_ordinary()
    async with local_backend(root, start_timeout_seconds=1.0) as backend:
        with in_flight(few_files):
            with pytest.raises(StartFailed, match="Too many references") as failed:
                await spawned(backend)
            assert failed.value.retryable and not failed.value.trainable
        assert await is_served(backend)
