"""One owner at its worst, as a program: `python -m tests.system.flood PORT TOKEN`, until its standard input ends.

It has calls in flight, streams open and spawns asked for all the time. It says in a line when it is at it, and then
in JSON what it came to: the latencies of its calls in seconds, and how its spawns ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

from ash_hub.bench.callers import holding
from ash_hub.bench.wire import connected, modern_call
from ash_mcp.types import Endpoint

CALLS = 250
STREAMS = 200
SPAWNS = 20
SANDBOXES = 3


async def repeat(port: int, request: bytes, latencies: list[float], ended: Counter[str]) -> None:
    async with connected(Endpoint(host="127.0.0.1", port=port)) as wire:
        while True:
            began = time.perf_counter()
            result: dict[str, Any] = (await wire.exchange(request)).message()["result"]
            latencies.append(time.perf_counter() - began)
            failure: dict[str, Any] = result.get("_meta", {}).get("ash/failure", {})
            ended[str(failure.get("kind", "done"))] += 1


async def flood(port: int, token: str) -> None:
    bearer = {"authorization": f"Bearer {token}"}
    streams = modern_call("subscriptions/listen", {"notifications": {"toolsListChanged": True}}, bearer)
    spawn = modern_call("tools/call", {"name": "spawn", "arguments": {"recipe": "echo"}}, bearer)
    calls = [
        modern_call("tools/call", {"name": f"sb{number % SANDBOXES + 1}_echo", "arguments": {"text": "x"}}, bearer)
        for number in range(CALLS)
    ]
    latencies: list[float] = []
    spawned, called = Counter[str](), Counter[str]()
    over, began = asyncio.Event(), time.monotonic()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
    async with holding(port, [streams] * STREAMS):
        tasks = [asyncio.create_task(repeat(port, call, latencies, called)) for call in calls]
        tasks += [asyncio.create_task(repeat(port, spawn, [], spawned)) for _ in range(SPAWNS)]
        while len(latencies) < CALLS and not over.is_set():
            await asyncio.sleep(0.01)
        sys.stdout.write("flooding\n")
        sys.stdout.flush()
        await over.wait()
        broken = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    seconds = time.monotonic() - began
    found = {"latencies": latencies, "called": called, "spawned": spawned, "broken": len(broken), "seconds": seconds}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    asyncio.run(flood(int(sys.argv[1]), sys.argv[2]))
