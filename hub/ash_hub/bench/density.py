"""`ash bench density`: what a sandbox of this machine costs, and how many it holds, beside bare FastMCP processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from ash_hub.bench.callers import percentile
from ash_hub.bench.relaying import served
from ash_hub.bench.rows import Row, median
from ash_hub.bench.spawning import RECIPE, SpawnCost, measure_spawn_cost, processes_of, until_forked
from ash_hub.bench.target import Target, open_target
from ash_hub.bench.wire import connected, endpoint_of, modern_call
from ash_mcp.client import Hive
from ash_mcp.errors import AshTimeout
from ash_mcp.types import Endpoint

__all__ = ["MANY", "measure"]

MANY: Final = 1000
_SPAWNS: Final = 50
_SLOW_SPAWNS: Final = 10
_BURST: Final = 100
_SHORT: Final = {_SPAWNS: 8, _SLOW_SPAWNS: 2, _BURST: 20, MANY: 30}
_GONE_SECONDS: Final = 10.0
_TEN: Final = 10
_SIBLINGS: Final = 20
"""How many others live while memory is measured: forks share theirs, so that a single one has half of its parent's."""
_STARTS: Final = 3
_MIB: Final = 1024 * 1024

Step = Callable[[str], None]


async def measure(*, short: bool, many: int | None, step: Step) -> list[Row]:
    """Measure one after the other, each in a hive of its own.

    Args:
        many: How many sandboxes are to live at once; None is 1000, or 30 of a short run.
    """

    def times(count: int) -> int:
        return _SHORT[count] if short else count

    rows = _of_spawns(await measure_spawn_cost(times(_SPAWNS), launcher="auto", step=step), "", 60, 200)
    slow = await measure_spawn_cost(times(_SLOW_SPAWNS), launcher="bubblewrap", step=step)
    rows += _of_spawns(slow, " by bubblewrap", 700, None)
    rows += await _one_by_one(times(_SPAWNS), step)
    rows += await _burst(times(_BURST), step)
    rows += await _alive_at_once(many or times(MANY), step)
    rows += await _first_answers(step)
    rows += await _commands(step)
    return rows


def _of_spawns(cost: SpawnCost, how: str, p50: int, p99: int | None) -> list[Row]:
    """Return the rows of spawns, beside one FastMCP process from its start to its first answer and end."""
    samples, process = len(cost.called), median(cost.process) * 1000
    what = f"cold spawn{how} and its first call"
    middle, slowest = median(cost.called) * 1000, percentile(cost.called, 0.99) * 1000
    return [
        Row(what=f"{what}, p50", unit="ms", hive=middle, direct=process, samples=samples, goal=f"{p50} ms"),
        Row(what=f"{what}, p99", unit="ms", hive=slowest, samples=samples, goal=f"{p99} ms" if p99 else ""),
        Row(
            what="the same, processor time",
            unit="ms",
            hive=cost.processor * 1000,
            direct=cost.process_processor * 1000,
            samples=samples,
        ),
    ]


async def _one_by_one(count: int, step: Step) -> list[Row]:
    """Return what a sandbox takes of memory, and how long its end lasts until no process and no file is left."""
    ends: list[float] = []
    sizes: dict[str, list[float]] = {"idle": [], "after a call": [], "after ten commands": []}
    async with open_target(private=True) as target, Hive(target.url) as hive:
        await until_forked(target, hive)
        await hive.spawn_many(_SIBLINGS, RECIPE)
        for number in range(count):
            step(f"memory and end {number + 1} of {count}")
            before = processes_of(target)
            box = await hive.spawn(RECIPE)
            its_own = processes_of(target) - before
            sizes["idle"].append(_pss(its_own))
            await box.exec("true")
            sizes["after a call"].append(_pss(its_own))
            for _ in range(_TEN - 1):
                await box.exec("true")
            sizes["after ten commands"].append(_pss(its_own))
            began = time.perf_counter()
            await box.destroy()
            await anyio.to_thread.run_sync(_wait_until_gone, target, box.id, its_own)
            ends.append(time.perf_counter() - began)
    goals = {"idle": 18, "after a call": 20, "after ten commands": 25}
    return [
        *(
            Row(
                what=f"memory of one of {_SIBLINGS} sandboxes {when}, PSS",
                unit="MiB",
                hive=median(found),
                samples=count,
                goal=f"{goal}",
            )
            for (when, found), goal in zip(sizes.items(), goals.values(), strict=True)
        ),
        Row(what="destroy until all is gone, p50", unit="ms", hive=median(ends) * 1000, samples=count, goal="30 ms"),
    ]


def _wait_until_gone(target: Target, sandbox_id: str, processes: Iterable[int]) -> None:
    deadline = time.monotonic() + _GONE_SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in processes) or any(target.run_dir.glob(f"*/*/{sandbox_id}")):
        if time.monotonic() > deadline:
            raise AshTimeout(f"something of {sandbox_id} was there {_GONE_SECONDS:g} s after its end")
        time.sleep(0.001)


def _pss(processes: Iterable[int]) -> float:
    """Return what processes take of memory in MiB, each shared page in parts."""
    total = 0
    for pid in processes:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total / _MIB


async def _burst(count: int, step: Step) -> list[Row]:
    """Ask for many at once; each is called as soon as it is there."""
    step(f"a burst of {count}")
    taken: list[float] = []

    async def one(hive: Hive) -> None:
        box = await hive.spawn(RECIPE)
        await box.exec("true")
        taken.append(time.perf_counter() - began)

    async with _roomy(count) as target, Hive(target.url) as hive:
        await until_forked(target, hive)
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(one, hive)
    what = f"burst of {count}, all called, p99"
    return [Row(what=what, unit="s", hive=percentile(taken, 0.99), samples=count, goal="3 s")]


async def _alive_at_once(count: int, step: Step) -> list[Row]:
    """Have many live at once, and then call each once."""
    async with _roomy(count) as target, Hive(target.url) as hive:
        await until_forked(target, hive)
        step(f"{count} at once")
        free, began = _available(), time.perf_counter()
        made = await hive.spawn_many(count, RECIPE, at_once=32)
        up = time.perf_counter() - began
        taken = free - _available()
        answered = 0
        for box in made.sandboxes:
            step(f"{count} at once: {answered} have answered")
            answered += (await box.exec("true")).exit_code == 0
    return [
        Row(what=f"{count} alive at once: all up", unit="s", hive=up, samples=count, goal="60 s of 1000"),
        Row(what="the same, that answered a call", unit="%", hive=100 * answered / count, samples=count, goal="100 %"),
        Row(what="the same, memory of the machine for each", unit="MiB", hive=taken / count / _MIB, samples=count),
    ]


def _roomy(count: int) -> AbstractAsyncContextManager[Target]:
    limits = {f"ASH_HUB_{name}": str(count + 10) for name in ("BACKEND__MAX_SANDBOXES", "LIMITS__SANDBOXES")}
    return open_target(private=True, environ={**limits, "ASH_HUB_LIMITS__WAITING": str(count + 10)})


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


async def _first_answers(step: Step) -> list[Row]:
    """Start a hive, and a bare FastMCP server, until each has answered a list of tools."""
    ours: list[float] = []
    bare: list[float] = []
    for number in range(_STARTS):
        step(f"ash up {number + 1} of {_STARTS}")
        began = time.perf_counter()
        async with open_target(private=True) as target:
            await _list(endpoint_of(target.url), {"host": target.host})
            ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        async with served("tools") as server:
            await _list(Endpoint(host="127.0.0.1", port=server.port), {})
            bare.append(time.perf_counter() - began)
    what = "ash up until its first answer"
    return [
        Row(what=what, unit="s", hive=median(ours), direct=median(bare), samples=_STARTS, goal="1.3x"),
    ]


async def _list(endpoint: Endpoint, headers: dict[str, str]) -> None:
    async with connected(endpoint) as wire:
        await wire.exchange(modern_call("tools/list", {}, headers))


async def _commands(step: Step) -> list[Row]:
    """Run what people type, beside a Python that does nothing."""
    step("commands")
    ash = [sys.executable, "-m", "ash_mcp.cli"]
    async with open_target(private=True) as target, Hive(target.url) as hive, hive.spawn(RECIPE) as box:
        commands: Sequence[tuple[str, list[str], str]] = (
            ("import ash_mcp", [sys.executable, "-c", "import ash_mcp"], "0.15 s"),
            ("ash --help", [*ash, "--help"], "0.3 s"),
            ("ash exec -- true", [*ash, "exec", "--url", target.url, box.session, "--", "true"], "0.4 s"),
        )
        rows: list[Row] = []
        for what, words, goal in commands:
            ours, bare = [await _timed(words) for _ in range(_STARTS)], await _timed([sys.executable, "-c", "pass"])
            rows.append(Row(what=what, unit="s", hive=median(ours), direct=bare, samples=_STARTS, goal=goal))
    return rows


async def _timed(words: Sequence[str]) -> float:
    began = time.perf_counter()
    await anyio.run_process(words, stdin=subprocess.DEVNULL, env=dict(os.environ))
    return time.perf_counter() - began
