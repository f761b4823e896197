"""A benchmark with the seed's client: how long a sandbox takes to spawn, to connect to, to call and to destroy.

python examples/demo.py        # one sandbox
python examples/demo.py 8      # eight at once
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import anyio
from anyio.to_thread import run_sync
from rich.console import Console
from rich.table import Table

from ash_mcp.compat import SandboxClient, SandboxConfig

URL = os.environ.get("ASH_URL", "http://127.0.0.1:8420/mcp").removesuffix("/mcp")
STEPS = ("spawn", "connect", "first call", "destroy")


class Times:
    """The seconds that each step took, one number for each sandbox."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {step: [] for step in STEPS}

    def note(self, step: str, began: float) -> float:
        """Note that a step that began then has just ended, and return now, when the next begins."""
        now = time.perf_counter()
        self.seconds[step].append(now - began)
        return now


async def try_sandbox(config: SandboxConfig, times: Times, threads: anyio.CapacityLimiter) -> None:
    """Take one sandbox through its life. The client blocks, so what it does runs in a thread."""
    client = SandboxClient(config)
    try:
        now = time.perf_counter()
        await run_sync(client.spawn, limiter=threads)
        now = times.note("spawn", now)
        async with client.connect() as mcp:
            now = times.note("connect", now)
            await mcp.call_tool("terminal-controller_execute_command", {"command": "echo hello"})
            times.note("first call", now)
        now = time.perf_counter()
        await run_sync(client.destroy, limiter=threads)
        times.note("destroy", now)
    finally:
        with anyio.CancelScope(shield=True):
            await run_sync(client.close, limiter=threads)


def table_of(times: Times, whole_seconds: float) -> Table:
    count = len(times.seconds["destroy"])
    table = Table(title=f"{count} at once, {whole_seconds:.2f} s in all", title_justify="left")
    table.add_column("seconds")
    for heading in ("fastest", "median", "slowest"):
        table.add_column(heading, justify="right")
    for step, seconds in times.seconds.items():
        row = (min(seconds), statistics.median(seconds), max(seconds))
        table.add_row(step, *(f"{value:.3f}" for value in row))
    return table


async def main(count: int) -> None:
    config = SandboxConfig(control_plane_url=URL, gateway_url=URL)
    if not await run_sync(SandboxClient(config).ready_check):
        raise SystemExit(f"no hive is ready at {URL}; start one with `ash up`, or set ASH_URL")
    times, threads = Times(), anyio.CapacityLimiter(count)
    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(try_sandbox, config, times, threads)
    Console().print(table_of(times, time.perf_counter() - began))


if __name__ == "__main__":
    anyio.run(main, max(1, int(sys.argv[1])) if len(sys.argv) > 1 else 1)
