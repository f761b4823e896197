"""`ash bench --neighbour`: a sandbox's calls while another sandbox does its worst.

Each load runs in a sandbox of its own beside a quiet one, whose calls are timed before, during and after it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from subprocess import DEVNULL
from typing import Any

import anyio

from ash_mcp import Hive
from ash_mcp.sandbox import Sandbox

__all__ = ["LOADS", "Row", "line_of", "measure", "row_to_json"]

LOADS: Mapping[str, str] = {
    "cpu": "for i in $(seq 8); do (while :; do :; done) & done; wait",
    "memory": "while :; do python3 -c \"a = []\nwhile True: a.append(bytearray(b'x') * (1 << 22))\"; done",
    "forks": "while :; do for i in $(seq 400); do sleep 1 & done; wait; done",
    "disk": "while :; do head -c 2G /dev/zero >/workspace/f; rm -f /workspace/f; done",
    "output": "yes 'as much as it can'",
}
"""Commands for bash, by what they use."""
_WARM_UP_CALLS = 20
_SETTLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One load: milliseconds of a neighbour's call, quiet and under it."""

    load: str
    quiet_median: float
    loaded_median: float
    quiet_slowest: float
    """The 99th of a hundred."""
    loaded_slowest: float
    samples: int
    """Calls that were answered under the load."""

    @property
    def ratio(self) -> float:
        """Median under the load over the quiet median."""
        return self.loaded_median / self.quiet_median


async def measure(url: str, seconds: float) -> list[Row]:
    """Time calls for `seconds` under each load, and as long in quiet around it."""
    async with Hive(url) as hive, hive.spawn("echo") as quiet:
        await _times(quiet, calls=_WARM_UP_CALLS)
        return [await _row(url, hive, quiet, load, seconds) for load in LOADS]


async def _row(url: str, hive: Hive, quiet: Sandbox, load: str, seconds: float) -> Row:
    silent = await _times(quiet, seconds=seconds / 2)
    async with _loaded(url, hive, load):
        loaded = await _times(quiet, seconds=seconds)
    silent += await _times(quiet, seconds=seconds / 2)
    return Row(
        load, statistics.median(silent), statistics.median(loaded), _slowest(silent), _slowest(loaded), len(loaded)
    )


@asynccontextmanager
async def _loaded(url: str, hive: Hive, load: str) -> AsyncGenerator[None]:
    async with hive.spawn("echo") as hostile, anyio.create_task_group() as group:
        if load == "output":
            group.start_soon(_read_all, url, hostile.session)
        else:
            await hostile.background(LOADS[load])
        await anyio.sleep(_SETTLE_SECONDS)
        yield
        group.cancel_scope.cancel()


async def _read_all(url: str, session: str) -> None:
    """Read an endless output in a process of its own, so that it is not the reader that is slow."""
    words = [sys.executable, "-m", "ash_mcp.cli", "exec", "--url", url, session, "--", "bash", "-c", LOADS["output"]]
    async with await anyio.open_process(words, stdout=DEVNULL, stderr=DEVNULL) as reader:
        try:
            await reader.wait()
        finally:
            reader.kill()


async def _times(box: Sandbox, *, seconds: float = 3600.0, calls: int = 1_000_000) -> list[float]:
    found: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(found) < calls:
        began = time.perf_counter()
        await box.call("echo", text="x")
        found.append((time.perf_counter() - began) * 1000)
    return found


def _slowest(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


def row_to_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "ratio": row.ratio}


def line_of(row: Row) -> str:
    """Return a row for a person."""
    return (
        f"{row.load:<8} median {row.quiet_median:6.2f} -> {row.loaded_median:7.2f} ms ({row.ratio:5.2f} times)   "
        f"slowest of a hundred {row.quiet_slowest:6.2f} -> {row.loaded_slowest:7.2f} ms"
    )
