"""A hive with many sandboxes: its whole list, many calls at once, many open streams, and one owner beside another.

The sandboxes are stand-ins that answer at once, so what is measured is the hive, at its worst: nothing that a
sandbox does gives it time.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ash_hub.bench.callers import holding, percentile, resident_kib, run_callers
from ash_hub.bench.load import drive
from ash_hub.bench.relaying import Served, served
from ash_hub.bench.rows import Row, median
from ash_hub.bench.wire import connected, legacy_call, modern_call, named_calls, post
from ash_mcp.types import Endpoint

if TYPE_CHECKING:
    from ash_hub.bench.measurements import Bench

__all__ = ["measure_concurrency"]

_SHORT_CALLS: Final = 200
"""Below this many calls a measurement, only what takes no long time is measured."""
_SANDBOXES: Final = 50
"""Of each of two owners."""
_AT_ONCE: Final = 250
"""Calls of each owner; the bound is 256."""
_STREAMS: Final = 1000
_SECONDS: Final = 3.0
_LISTS: Final = 100
_ROUNDS: Final = 3

_Way = Callable[[Served, int], Awaitable[list[bytes]]]


async def measure_concurrency(bench: Bench) -> Sequence[Row]:
    """Measure a hive of stand-ins that runs for it alone."""
    short = bench.calls < _SHORT_CALLS
    bench.step(f"tools/list with {_SANDBOXES} sandboxes")
    async with _crowd() as hive:
        rows = await _measure_lists(hive)
        if short:
            return rows
        bench.step(f"{2 * _AT_ONCE} calls at once over {2 * _SANDBOXES} sandboxes")
        rows += await _measure_calls(hive)
        bench.step("one owner beside another")
        rows += await _measure_neighbours(hive)
    for name, way in _STREAM_WAYS.items():
        bench.step(f"{_STREAMS} open streams, {name}")
        async with _crowd() as hive:  # a fresh one, so that the memory of one kind is not another's
            rows += await _measure_streams(hive, name, way)
    return rows


@asynccontextmanager
async def _crowd() -> AsyncGenerator[Served]:
    with tempfile.TemporaryDirectory(prefix="ash-bench-", dir="/tmp") as home:
        socket = str(Path(home) / "standin.sock")
        async with served("standin", socket), served("crowd", socket, str(_SANDBOXES), "ann", "bob") as hive:
            yield hive


def _bearer(hive: Served, owner: str) -> dict[str, str]:
    return {"authorization": f"Bearer {hive.said['tokens'][owner]}"}


def _calls(hive: Served, owner: str, count: int) -> list[bytes]:
    return named_calls(hive.said["tokens"][owner], _SANDBOXES, count)


def _ms(seconds: float) -> float:
    return seconds * 1000


def _asking(request: bytes, query: str) -> bytes:
    return request.replace(b"POST /mcp ", f"POST /mcp?{query} ".encode(), 1)


async def _session(hive: Served, owner: str, query: str) -> dict[str, str]:
    """Open a session of the handshake era and return the headers of what is said in it."""
    offer = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "ash-bench", "version": "0"}}
    headers = _bearer(hive, owner)
    async with connected(Endpoint(host="127.0.0.1", port=hive.port)) as wire:
        opened = await wire.exchange(_asking(legacy_call("initialize", offer, headers), query))
        session = opened.headers[b"mcp-session-id"].decode()
        inside = {**headers, "mcp-session-id": session, "mcp-protocol-version": "2025-11-25"}
        await wire.exchange(post({"jsonrpc": "2.0", "method": "notifications/initialized"}, inside))
        return inside


async def _measure_lists(hive: Served) -> list[Row]:
    """Everything of everybody's, in both eras, against a list of the hive's own few tools."""
    rows: list[Row] = []
    bare = _bearer(hive, "ann")
    ways = {
        "2026-07-28": [_asking(modern_call("tools/list", {}, bare), f"expand={what}") for what in ("all", "none")],
        "2025-11-25": [
            legacy_call("tools/list", {}, await _session(hive, "ann", f"expand={what}")) for what in ("all", "none")
        ],
    }
    for era, (everything, own) in ways.items():
        async with connected(Endpoint(host="127.0.0.1", port=hive.port)) as wire:
            answer = await wire.exchange(everything)
            count, size = len(answer.message()["result"]["tools"]), len(answer.body)
            await wire.exchange(own)
        spent = {request: await drive(hive.port, [request], hive.pid, calls=_LISTS) for request in (everything, own)}
        rows.append(
            Row(
                what=f"tools/list of {count} tools, {size // 1024} KiB, {era}, processor time; beside: the hive's own",
                unit="ms",
                hive=spent[everything].cpu_ms,
                direct=spent[own].cpu_ms,
                samples=_LISTS,
                goal="5 ms",
            )
        )
    return rows


async def _measure_calls(hive: Served) -> list[Row]:
    """As many calls at once as two owners may have."""
    groups = [_calls(hive, owner, _AT_ONCE) for owner in ("ann", "bob")]
    (alone,) = await run_callers(hive.port, hive.pid, _SECONDS / 3, groups[0][:1])
    before = resident_kib(hive.pid)
    runs = await run_callers(hive.port, hive.pid, _SECONDS, *groups)
    latencies = sorted(latency for run in runs for latency in run.latencies)
    completions = [count for run in runs for count in run.completions]
    what = f"{2 * _AT_ONCE} calls at once, {2 * _SANDBOXES} sandboxes"
    samples = len(latencies)
    one = median(alone.latencies)
    return [
        Row(what=f"{what}: calls/s; beside: 1 at a time", unit="calls/s", hive=samples / _SECONDS, direct=1 / one,
            samples=samples),
        Row(what=f"{what}: p50", unit="ms", hive=_ms(percentile(latencies, 0.5)), samples=samples),
        Row(what=f"{what}: p99", unit="ms", hive=_ms(percentile(latencies, 0.99)), samples=samples),
        Row(what=f"{what}: processor time a call", unit="ms", hive=_ms(runs[0].cpu_seconds) / samples,
            samples=samples),
        Row(what=f"{what}: memory; beside: before", unit="MiB", hive=runs[0].resident_kib / 1024,
            direct=before / 1024, samples=1),
        Row(what=f"{what}: most calls of a caller for the fewest", unit="x",
            hive=max(completions) / max(1, min(completions)), samples=len(completions)),
    ]  # fmt: skip


async def _measure_neighbours(hive: Served) -> list[Row]:
    """One call at a time of one owner, while another has as many in flight as it may; in turns with none in flight."""
    quiet, token = _calls(hive, "bob", 1), hive.said["tokens"]["ann"]
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(_ROUNDS):
        alone += (await run_callers(hive.port, hive.pid, _SECONDS / _ROUNDS, quiet))[0].latencies
        async with served("flood", str(hive.port), token, str(_SANDBOXES), str(_AT_ONCE)):
            beside += (await run_callers(hive.port, hive.pid, _SECONDS / _ROUNDS, quiet))[0].latencies
    alone.sort()
    beside.sort()
    what = f"a call beside another owner's {_AT_ONCE} in flight"
    return [
        Row(what=f"{what}, {name}; beside: alone", unit="ms", hive=_ms(percentile(beside, part)),
            direct=_ms(percentile(alone, part)), samples=len(beside), goal=goal)
        for name, part, goal in (("p50", 0.5, "3x"), ("p99", 0.99, ""))
    ]  # fmt: skip


async def _listening(hive: Served, count: int) -> list[bytes]:
    params = {"notifications": {"toolsListChanged": True}}
    return [modern_call("subscriptions/listen", params, _bearer(hive, "ann"))] * count


async def _door_streams(hive: Served, count: int) -> list[bytes]:
    ids = hive.said["ids"]["ann"]
    return [
        _get({**_bearer(hive, "ann"), "x-session-id": ids[number % _SANDBOXES], "mcp-session-id": "standin"})
        for number in range(count)
    ]


async def _session_streams(hive: Served, count: int) -> list[bytes]:
    return [_get(await _session(hive, "ann", "")) for _ in range(count)]


def _get(headers: Mapping[str, str]) -> bytes:
    named = {"host": "127.0.0.1", "accept": "text/event-stream", **headers}
    return ("GET /mcp HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in named.items()) + "\r\n").encode()


_STREAM_WAYS: Final[Mapping[str, _Way]] = {
    "subscriptions/listen": _listening,
    "GET by X-Session-ID": _door_streams,
    "GET of 2025-11-25, with its session": _session_streams,
}


async def _measure_streams(hive: Served, name: str, way: _Way) -> list[Row]:
    """What streams that stay open take, and what a call costs meanwhile."""
    call = _calls(hive, "ann", 1)
    async with holding(hive.port, await way(hive, 10)):  # so that what the first ones load is not counted
        (alone,) = await run_callers(hive.port, hive.pid, _SECONDS / 2, call)
    before = resident_kib(hive.pid)
    async with holding(hive.port, await way(hive, _STREAMS)):
        grown = resident_kib(hive.pid) - before
        (meanwhile,) = await run_callers(hive.port, hive.pid, _SECONDS / 2, call)
    what = f"{_STREAMS} open streams, {name}"
    return [
        Row(what=f"{what}: memory of each", unit="KiB", hive=grown / _STREAMS, samples=_STREAMS),
        *(
            Row(what=f"{what}: a call, {mark}; beside: without them", unit="ms",
                hive=_ms(percentile(meanwhile.latencies, part)), direct=_ms(percentile(alone.latencies, part)),
                samples=len(meanwhile.latencies))
            for mark, part in (("p50", 0.5), ("p99", 0.99))
        ),
    ]  # fmt: skip
