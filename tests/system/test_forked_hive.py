"""A sync `Hive` with open connections to a real hive, inherited by worker processes that are forked."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from ash_mcp.sync import Hive, Sandbox

WORKERS = 4
CALLS = 25
SECONDS = 60


def work(box: Sandbox, number: int) -> None:
    for call in range(CALLS):
        assert box.exec(f"echo {number} {call}").stdout == f"{number} {call}\n"


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_parent_and_children_use_it_at_once_and_nobody_hears_anothers_answer(hive_url: str) -> None:
    forking = multiprocessing.get_context("fork")
    with Hive(hive_url) as hive, hive.spawn("echo") as box:
        box.exec("true", check=True)
        workers = [forking.Process(target=work, args=(box, number)) for number in range(WORKERS)]
        for worker in workers:
            worker.start()
        work(box, WORKERS)
        deadline = time.monotonic() + SECONDS
        for worker in workers:
            worker.join(max(deadline - time.monotonic(), 0))
            if worker.is_alive():
                worker.kill()
                worker.join()
        assert [worker.exitcode for worker in workers] == [0] * WORKERS
        work(box, WORKERS)
