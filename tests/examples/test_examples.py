"""The examples run as they are, against a real hive."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from ash_mcp.sync import Hive
from tests.example_runs import EXAMPLES, run_example
from tests.hub.backends.local.machine_parts import needs_snapshots


def test_the_sdk_quickstart_runs(hive_url: str) -> None:
    said = run_example(hive_url, "sdk_quickstart")
    assert "exit code 0: 'hello you\\nLinux\\n'" in said
    assert "1. look around\n2. tidy up\n" in said
    assert said.endswith("and gone again\n")


@pytest.mark.heavy
def test_the_parallel_rollouts_tell_their_failures_apart(hive_url: str) -> None:
    said = run_example(hive_url, "parallel_rollouts", "4")
    assert said == "right: 1\ntoo slow: 1\nwrong: 2\n4 of 4 rollouts to learn from, mean reward 0.25\n"


@pytest.mark.heavy
def test_held_rollouts_come_to_their_end(hive_url: str) -> None:
    said = run_example(hive_url, "held_rollouts", "4")
    assert said.endswith("4 of 4 rollouts are done, and nothing of them is left\n")


@pytest.mark.heavy
def test_rollouts_whose_process_is_killed_leave_nothing_after_the_lease(hive_url: str) -> None:
    short = (EXAMPLES / "held_rollouts.py").read_text().replace("LEASE_SECONDS = 30.0", "LEASE_SECONDS = 3.0")
    with (
        Hive(hive_url) as hive,
        subprocess.Popen(
            [sys.executable, "-c", short, "40"], env={**os.environ, "ASH_URL": hive_url}, stdout=subprocess.PIPE
        ) as trainer,
    ):
        assert trainer.stdout is not None
        assert b"is done" in trainer.stdout.readline()
        deadline = time.monotonic() + 30
        while True:  # until it is killed while one of its sandboxes is in use, which nobody else destroys
            trainer.send_signal(signal.SIGSTOP)
            if any(info.state == "ready" for info in hive.list()):
                break
            trainer.send_signal(signal.SIGCONT)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        trainer.kill()
        trainer.wait()
        deadline = time.monotonic() + 30
        while hive.list() or hive.runs():
            assert time.monotonic() < deadline, [info.session for info in hive.list()]
            time.sleep(0.2)
        ended = [info for info in hive.list(include_ended=True) if info.run == "rollouts"]
        reasons = {info.reason for info in ended if info.reason is not None}
    assert reasons & {"run_ended"} and reasons <= {"run_ended", "destroyed", "start_failed"}


@pytest.mark.heavy
@needs_snapshots
def test_rollouts_go_back_to_where_they_began(hive_url: str) -> None:
    said = run_example(hive_url, "reset_rollouts", "2", "2")
    assert said.endswith("2 of 2 rollouts are done, and 4 episodes began from the same files\n")


@pytest.mark.heavy
@pytest.mark.timeout(300)
@needs_snapshots
def test_rollouts_that_are_killed_while_they_reset_leave_nothing_after_the_lease(hive_url: str) -> None:
    short = (EXAMPLES / "reset_rollouts.py").read_text().replace("LEASE_SECONDS = 30.0", "LEASE_SECONDS = 4.0")
    with (
        Hive(hive_url) as hive,
        subprocess.Popen(
            [sys.executable, "-c", short, "100"], env={**os.environ, "ASH_URL": hive_url}, stdout=subprocess.PIPE
        ) as trainer,
    ):
        assert trainer.stdout is not None
        for _ in range(3):
            assert b"is done" in trainer.stdout.readline()
        assert hive.snapshots()
        trainer.kill()
        trainer.wait()
        deadline = time.monotonic() + 30
        while hive.list() or hive.runs() or hive.snapshots():
            assert time.monotonic() < deadline, [*hive.list(), *hive.snapshots()]
            time.sleep(0.2)


@pytest.mark.heavy
@pytest.mark.parametrize("options", [(), ("--stdio", "--legacy")])
def test_the_mcp_sdks_client_runs(hive_url: str, options: tuple[str, ...]) -> None:
    said = run_example(hive_url, "mcp_sdk_client", *options)
    assert ("protocol 2025-11-25" if options else "protocol 2026-07-28") in said
    assert "hello from Linux\n" in said
    assert said.endswith("is gone\n")


@pytest.mark.heavy
def test_fastmcps_client_runs(hive_url: str) -> None:
    said = run_example(hive_url, "fastmcp_client")
    assert "hello from Linux\n" in said
    assert said.endswith("is gone\n")


@pytest.mark.heavy
def test_the_demo_shows_how_long_each_step_takes(hive_url: str) -> None:
    said = run_example(hive_url, "demo", "3")
    assert said.startswith("3 at once, ")
    for step in ("spawn", "connect", "first call", "destroy"):
        assert re.search(rf"│ {step} +│ +\d+\.\d{{3}} │ +\d+\.\d{{3}} │ +\d+\.\d{{3}} │", said), said


def test_the_readme_lists_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f"({example.name})" in readme
