"""Benchmark of cold spawns with their first call, beside the start of a bare FastMCP process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

from ash_hub.bench.target import Target, open_target
from ash_mcp.client import Hive

__all__ = ["RECIPE", "SpawnCost", "measure_spawn_cost", "processes_of", "until_forked"]

RECIPE: Final = "general"
_SETTLE_SECONDS: Final = 0.02
_FORKED_SECONDS: Final = 20.0
_TICK: Final = 1 / os.sysconf("SC_CLK_TCK")
_FASTMCP: Final = """
import asyncio
from fastmcp import Client, FastMCP
server = FastMCP("bare")
@server.tool
def echo(text: str) -> str:
    return text
async def once():
    async with Client(server) as client:
        await client.list_tools()
        await client.call_tool("echo", {"text": "x"})
asyncio.run(once())
"""


@dataclass(frozen=True, slots=True)
class SpawnCost:
    """Times in seconds, one for each sample, in order of their length."""

    launcher: str
    ready: list[float]
    """From the request for a sandbox to the answer that it is ready."""
    called: list[float]
    """From the same to the answer of its first call."""
    processor: float
    """Processor time of a spawn with its first call, of all processes of the hive together, on average."""
    process: list[float]
    """Of one FastMCP process, from its start to the answer of its first call, and its end."""
    process_processor: float
    """Processor time of one of these, on average."""


async def measure_spawn_cost(
    count: int = 50, *, launcher: str = "fork", processes: int = 5, step: Callable[[str], None] = lambda text: None
) -> SpawnCost:
    """Spawn sandboxes one after the other in a hive of its own, call each once, and start bare ones in between."""
    ready: list[float] = []
    called: list[float] = []
    process: list[float] = []
    used = process_used = 0.0
    async with open_target(private=True, environ={"ASH_HUB_BACKEND__LAUNCHER": launcher}) as target:
        async with Hive(target.url) as hive, hive.spawn(RECIPE, session="warm") as warm:
            await warm.exec("true")
            if launcher != "bubblewrap":
                await until_forked(target, hive)
            for number in range(count):
                if number * processes // count == len(process):
                    step(f"process {len(process) + 1} of {processes}")
                    before, began = os.times(), time.perf_counter()
                    await anyio.run_process([sys.executable, "-c", _FASTMCP])
                    process.append(time.perf_counter() - began)
                    after = os.times()
                    process_used += after.children_user + after.children_system
                    process_used -= before.children_user + before.children_system
                step(f"spawn {number + 1} of {count}")
                started, began = _used(target), time.perf_counter()
                async with hive.spawn(RECIPE) as box:
                    ready.append(time.perf_counter() - began)
                    await box.exec("true")
                    called.append(time.perf_counter() - began)
                    used += _used(target) - started
                await anyio.sleep(_SETTLE_SECONDS)
    return SpawnCost(
        launcher=launcher,
        ready=sorted(ready),
        called=sorted(called),
        processor=used / count,
        process=sorted(process),
        process_processor=process_used / max(len(process), 1),
    )


async def until_forked(target: Target, hive: Hive) -> None:
    """Spawn until one is forked: the first are started by bubblewrap, while what is forked later warms up.

    It gives up after a while, as there are hosts and recipes where nothing is forked.
    """
    deadline = time.monotonic() + _FORKED_SECONDS
    while time.monotonic() < deadline:
        before = processes_of(target)
        async with hive.spawn(RECIPE) as box:
            await box.exec("true")
            if not any(_name(pid) == "bwrap" for pid in processes_of(target) - before):
                return


def processes_of(target: Target) -> set[int]:
    """Return the processes of a hive on this machine: its own, its keeper, and all that these have started."""
    keepers = [pid for pid in _pids() if _cwd(pid).startswith(f"{target.run_dir}/")]
    return {target.pid, *keepers, *(it for pid in keepers for it in _descendants(pid))}


def _used(target: Target) -> float:
    """Return the processor time of a hive's processes so far, with those that were reaped, in seconds."""
    return sum(_ticks(pid) for pid in processes_of(target)) * _TICK


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdecimal())


def _cwd(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return
    for child in map(int, children.split()):
        yield child
        yield from _descendants(child)


def _ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(int(field) for field in fields[11:15])
