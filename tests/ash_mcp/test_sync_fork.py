"""A sync `Hive` that a fork inherits, as trainers' worker processes do."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ash_mcp import LocalProtocolError, sync
from tests.ash_mcp.twin import TwinHive

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

SECONDS = 30


@pytest.fixture
def hive(twin: TwinHive) -> Iterator[sync.Hive]:
    with sync.Hive(transport=twin.transport) as hive:
        yield hive


def in_a_child(work: Callable[[], object]) -> int:
    """Do `work` in a forked process and return its exit code: 0, 1 when it failed, negative when it hung."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_hive_that_was_used_before_the_fork_works_in_the_child_and_in_the_parent(hive: sync.Hive):
    with hive.spawn() as box:

        def work() -> None:
            assert [info.id for info in hive.list()] == [box.id]
            assert box.exec("echo from the child").stdout == "from the child\n"
            hive.aclose()
            hive.aclose()

        for _ in range(2):
            assert in_a_child(work) == 0
            assert box.exec("echo from the parent").stdout == "from the parent\n"


def test_child_of_a_child_works_too(hive: sync.Hive):
    hive.list()

    def work() -> None:
        hive.list()
        assert in_a_child(hive.list) == 0

    assert in_a_child(work) == 0


def test_fork_while_another_thread_uses_the_hive_leaves_no_lock_behind(hive: sync.Hive):
    hive.list()
    ended = threading.Event()

    def busy() -> None:
        while not ended.is_set():
            hive.list()

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            assert in_a_child(hive.list) == 0
    finally:
        ended.set()
        for thread in threads:
            thread.join(SECONDS)
    assert hive.list() == []


def test_hive_that_was_closed_before_the_fork_is_closed_in_the_child(hive: sync.Hive):
    hive.list()
    hive.aclose()

    def work() -> None:
        with pytest.raises(LocalProtocolError, match="closed"):
            hive.list()

    assert in_a_child(work) == 0


def test_child_may_leave_the_block_of_its_parents_hive(twin: TwinHive):
    with sync.Hive(transport=twin.transport) as hive:
        hive.list()
        assert in_a_child(lambda: hive.__exit__(None, None, None)) == 0
        began = time.monotonic()
        assert hive.list() == []
        assert time.monotonic() - began < SECONDS
