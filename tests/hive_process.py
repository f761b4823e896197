"""A real hive as a process of its own, for tests that need no twin. `ASH_TEST_URL` names one that runs already."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import anyio

from ash_mcp.bridge.background import HiveFiles, UserHive

__all__ = ["ASH", "BRIDGE", "hive_in", "running_hive"]

ASH: Final[tuple[str, ...]] = (sys.executable, "-m", "ash_mcp.cli")
BRIDGE: Final[tuple[str, ...]] = (*ASH, "up", "--stdio")
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 20.0


@contextmanager
def running_hive() -> Generator[str]:
    """Give the URL of a hive that serves, and end it; what it wrote is shown if it does not start."""
    url = os.environ.get("ASH_TEST_URL")
    if url:
        yield url
        return
    home = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))  # a socket's path must be short
    try:
        with hive_in(home) as (url, _):
            yield url
    finally:
        shutil.rmtree(home)


@contextmanager
def hive_in(home: Path) -> Generator[tuple[str, int]]:
    """Serve a hive whose files are all below `home`, its state in `home/state`, and give its URL and process id."""
    home.mkdir(exist_ok=True)
    files = HiveFiles(home / "run", home / "log")
    environ = {**os.environ, "ASH_HUB_STATE_DIR": str(home / "state"), "ASH_HUB_RUN_DIR": str(files.run_dir)}
    log = home / "output"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            (*ASH, "up", "--port", "0"), env=environ, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        ) as hive,
    ):
        try:
            yield _wait_until_up(hive, UserHive(files=files), log), hive.pid
        finally:
            _stop(hive)


def _wait_until_up(hive: subprocess.Popen[bytes], announced: UserHive, log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and hive.poll() is None:
        url = anyio.run(announced.find)
        if url is not None:
            return url
        time.sleep(0.05)
    raise AssertionError(f"the hive did not start: {log.read_text(errors='replace')[-4000:]}")


def _stop(hive: subprocess.Popen[bytes]) -> None:
    hive.terminate()
    try:
        hive.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        hive.kill()
        raise
