"""Measurements of calls and spawns. The hive and the direct way take turns, so both see the same load."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import anyio

from ash_hub.bench.concurrency import measure_concurrency
from ash_hub.bench.proving import measure_proofs
from ash_hub.bench.relaying import measure_proxy, measure_relay, measure_routes, served
from ash_hub.bench.rows import Row, median
from ash_hub.bench.target import Target
from ash_hub.bench.wire import Wire, connected, endpoint_of, handshake, legacy_call, modern_call
from ash_hub.bench.wrapping import measure_wrap
from ash_mcp.client import Hive
from ash_mcp.sandbox import Sandbox
from ash_mcp.types import Endpoint

__all__ = ["MEASUREMENTS", "Bench", "Measurement"]

RECIPE: Final = "echo"
TOOL: Final = "echo"
ARGUMENTS: Final = {"text": "hello"}
_CONNECTIONS: Final = 16


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measurement needs."""

    target: Target
    hive: Hive
    box: Sandbox
    """A sandbox of the recipe `echo`, called before."""
    spawns: int
    calls: int
    step: Callable[[str], None]
    """Says what is being measured now."""

    def to_hive(self) -> dict[str, str]:
        return {"host": self.target.host}


Measurement = Callable[[Bench], Awaitable[Sequence[Row]]]


async def measure_spawn(bench: Bench) -> Sequence[Row]:
    """From the request for a sandbox to its answer, and the first call of a fresh one by either way."""
    spawn: list[float] = []
    first: dict[bool, list[float]] = {True: [], False: []}
    for number in range(bench.spawns):
        bench.step(f"spawn {number + 1} of {bench.spawns}")
        began = time.perf_counter()
        async with bench.hive.spawn(RECIPE) as box:
            spawn.append(time.perf_counter() - began)
            direct = number % 2 == 1
            first[direct].append(await _one_call(bench, box, direct=direct))
    rows = [Row(what=f"spawn {RECIPE}, p50", unit="ms", hive=median(spawn) * 1000, samples=len(spawn))]
    if first[True]:
        row = Row(
            what="first call, p50",
            unit="ms",
            hive=median(first[False]) * 1000,
            direct=median(first[True]) * 1000,
            samples=len(first[True]),
        )
        rows.append(row)
    return rows


async def _one_call(bench: Bench, box: Sandbox, *, direct: bool) -> float:
    async with AsyncExitStack() as stack:
        began = time.perf_counter()
        wire, request = await _modern_way(bench, box, stack, direct=direct)
        await wire.exchange(request)
        return time.perf_counter() - began


async def _modern_way(bench: Bench, box: Sandbox, stack: AsyncExitStack, *, direct: bool) -> tuple[Wire, bytes]:
    """Open a connection, and make the call that is to go over it."""
    if direct:
        endpoint, headers = bench.target.direct(box.id)
        params = {"name": TOOL, "arguments": ARGUMENTS}
    else:
        endpoint, headers = endpoint_of(bench.target.url), bench.to_hive()
        params = {"name": f"{box.session}_{TOOL}", "arguments": ARGUMENTS}
    wire = await stack.enter_async_context(connected(endpoint))
    return wire, modern_call("tools/call", params, headers)


async def _legacy_way(bench: Bench, box: Sandbox, stack: AsyncExitStack, *, direct: bool) -> tuple[Wire, bytes]:
    """The same in a session of the handshake era."""
    endpoint, headers = bench.target.direct(box.id) if direct else (endpoint_of(bench.target.url), bench.to_hive())
    wire = await stack.enter_async_context(connected(endpoint))
    inside = await handshake(wire, headers)
    name = TOOL if direct else f"{box.session}_{TOOL}"
    return wire, legacy_call("tools/call", {"name": name, "arguments": ARGUMENTS}, inside)


async def _door_way(bench: Bench, box: Sandbox, stack: AsyncExitStack, *, direct: bool) -> tuple[Wire, bytes]:
    """The same by the sandbox's own endpoint, which is asked for in a header."""
    if direct:
        return await _modern_way(bench, box, stack, direct=True)
    wire = await stack.enter_async_context(connected(endpoint_of(bench.target.url)))
    headers = {**bench.to_hive(), "x-session-id": box.id}
    return wire, modern_call("tools/call", {"name": TOOL, "arguments": ARGUMENTS}, headers)


async def measure_calls(bench: Bench) -> Sequence[Row]:
    """A call at a time, in both eras, and by `X-Session-ID` beside a hop that passes bytes on unread."""
    rows: list[Row] = []
    ways_in = (("2026-07-28", _modern_way), ("2025-11-25", _legacy_way), ("X-Session-ID", _door_way))
    for era, way in ways_in:
        bench.step(f"calls one at a time, {era}")
        async with AsyncExitStack() as stack:
            hive, direct = [await way(bench, bench.box, stack, direct=direct) for direct in (False, True)]
            goal = "1.1x" if era == "X-Session-ID" else ""
            rows.append(await _in_turns(f"call, {era}, p50", bench.calls, hive, direct, goal))
    # by itself, since a third process would take the caches from the hive
    async with AsyncExitStack() as stack:
        unread, direct = await _unread_way(bench, stack), await _modern_way(bench, bench.box, stack, direct=True)
        what = "the same through a hop that passes bytes on unread, p50"
        rows.append(await _in_turns(what, bench.calls, unread, direct, "the floor of it"))
    return rows


async def _in_turns(what: str, calls: int, hive: tuple[Wire, bytes], direct: tuple[Wire, bytes], goal: str) -> Row:
    taken: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(calls):
        for is_direct, (wire, request) in ((True, direct), (False, hive)):
            began = time.perf_counter()
            await wire.exchange(request)
            taken[is_direct].append(time.perf_counter() - began)
    p50 = {is_direct: median(times) * 1000 for is_direct, times in taken.items()}
    return Row(what=what, unit="ms", hive=p50[False], direct=p50[True], samples=calls, goal=goal)


async def _unread_way(bench: Bench, stack: AsyncExitStack) -> tuple[Wire, bytes]:
    """The direct way with a hop in it that does nothing: what no hive can be faster than."""
    endpoint, headers = bench.target.direct(bench.box.id)
    assert endpoint.unix is not None
    hop = await stack.enter_async_context(served("bare", endpoint.unix))
    wire = await stack.enter_async_context(connected(Endpoint(host="127.0.0.1", port=hop.port)))
    return wire, modern_call("tools/call", {"name": TOOL, "arguments": ARGUMENTS}, headers)


async def measure_throughput(bench: Bench) -> Sequence[Row]:
    """Many calls at once: how many a second, and the hive's own processor time for each."""
    rates: dict[bool, float] = {}
    cpu = 0.0
    for direct in (True, False):
        bench.step(f"calls over {_CONNECTIONS} connections, {'direct' if direct else 'through the hive'}")
        async with AsyncExitStack() as stack:
            ways = [await _modern_way(bench, bench.box, stack, direct=direct) for _ in range(_CONNECTIONS)]
            used, began = bench.target.cpu_seconds(), time.perf_counter()
            async with anyio.create_task_group() as group:
                for wire, request in ways:
                    group.start_soon(_call_many, wire, request, bench.calls // _CONNECTIONS)
            rates[direct] = (bench.calls // _CONNECTIONS) * _CONNECTIONS / (time.perf_counter() - began)
            cpu = bench.target.cpu_seconds() - used
    counted = (bench.calls // _CONNECTIONS) * _CONNECTIONS
    return [
        Row(
            what=f"calls, {_CONNECTIONS} connections",
            unit="calls/s",
            hive=rates[False],
            direct=rates[True],
            samples=counted,
        ),
        Row(what="the hive's processor time a call", unit="ms", hive=cpu / counted * 1000, samples=counted),
    ]


async def _call_many(wire: Wire, request: bytes, times: int) -> None:
    for _ in range(times):
        await wire.exchange(request)


async def measure_lists(bench: Bench) -> Sequence[Row]:
    """tools/list of the hive with its one sandbox, against that sandbox's own."""
    bench.step("tools/list")
    taken: dict[bool, list[float]] = {True: [], False: []}
    endpoint, headers = bench.target.direct(bench.box.id)
    async with connected(endpoint) as direct, connected(endpoint_of(bench.target.url)) as through:
        for _ in range(max(1, bench.calls // 10)):
            for is_direct, wire, inside in ((True, direct, headers), (False, through, bench.to_hive())):
                request = modern_call("tools/list", {}, inside)
                began = time.perf_counter()
                await wire.exchange(request)
                taken[is_direct].append(time.perf_counter() - began)
    return [
        Row(
            what="tools/list with one sandbox, p50",
            unit="ms",
            hive=median(taken[False]) * 1000,
            direct=median(taken[True]) * 1000,
            samples=len(taken[True]),
        )
    ]


async def measure_relaying(bench: Bench) -> Sequence[Row]:
    """The data plane by itself, with what is compared to it running beside it."""
    rows: list[Row] = []
    for what, measure in (("relays", measure_relay), ("routes", measure_routes), ("create_proxy", measure_proxy)):
        bench.step(f"{what}, {_CONNECTIONS} connections")
        rows += await measure(bench.calls * 5)
    return rows


async def measure_proving(bench: Bench) -> Sequence[Row]:
    """A new connection to a sandbox on TCP, as in a cluster."""
    bench.step("connections to a runner on TCP")
    return await measure_proofs(max(20, bench.calls // 10))


MEASUREMENTS: Final[Sequence[Measurement]] = (
    measure_spawn,
    measure_calls,
    measure_throughput,
    measure_lists,
    measure_relaying,
    measure_proving,
    measure_concurrency,
    measure_wrap,
)
"""In the order of the table."""
