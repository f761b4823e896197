"""The thread of a sync `Hive`: Ctrl-C reaches what runs in it, and it never outlives its program."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest

from ash_mcp import sync
from tests.ash_mcp.twin import TwinHive

USED_AND_LEFT_OPEN = """
import os, signal, httpx
from ash_mcp import AshError
from ash_mcp.sync import Hive

hive = Hive(transport=httpx.MockTransport(lambda request: httpx.Response(404)))

def use():
    try:
        hive.list()
    except AshError:
        print("used", flush=True)

use()
"""

FORKED = """
child = os.fork()
signal.alarm(25)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
use()
"""


@pytest.fixture(autouse=True)
def interrupted_by_sigint() -> Iterator[None]:
    """A shell starts what it runs beside itself with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_once(twin: TwinHive, tool: str) -> None:
    """Have SIGINT come to the main thread while a call of `tool` is under way."""

    def script(request: httpx.Request) -> None:
        if tool.encode() in request.content:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            twin.scripts.appendleft(script)

    twin.scripts.append(script)


def test_ctrl_c_in_a_read_has_stopped_the_streams_command_when_it_is_raised(twin: TwinHive):
    with sync.Hive(transport=twin.transport) as hive, hive.spawn() as box:
        stream = box.stream("exec sleep 300")
        interrupt_once(twin, "ash_job_read")
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert twin.seen[-1].arguments["tool"] == "ash_job_signal"
        assert box.exec("echo on").stdout == "on\n"


def test_ctrl_c_in_a_block_destroys_its_sandbox(twin: TwinHive):
    with sync.Hive(transport=twin.transport) as hive:
        with pytest.raises(KeyboardInterrupt), hive.spawn() as box:
            interrupt_once(twin, "ash_exec")
            box.exec("sleep 1")
        assert hive.list() == []


@pytest.mark.parametrize("program", [USED_AND_LEFT_OPEN, USED_AND_LEFT_OPEN + FORKED], ids=["one", "forked"])
def test_program_that_never_closes_its_hive_ends(program: str):
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]  # newer Pythons warn of the fork
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (run.returncode, run.stderr) == (0, "")
    assert set(run.stdout.split()) == {"used"}


def test_hive_that_is_forgotten_takes_its_thread_along(twin: TwinHive):
    before = set(threading.enumerate())
    hive = sync.Hive(transport=twin.transport)
    hive.list()
    del hive
    gc.collect()
    assert not {thread.name for thread in set(threading.enumerate()) - before if "worker" not in thread.name}
