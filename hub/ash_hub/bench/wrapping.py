"""A server under `ash wrap` beside the same one bare: until its first answer, and for each message."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import anyio.to_thread

from ash_hub.bench.rows import Row, median

if TYPE_CHECKING:
    from ash_hub.bench.measurements import Bench

__all__ = ["measure_wrap"]

_ASH: Final = (sys.executable, "-c", "from ash_mcp.cli import main; main()", "wrap", "--")
_SERVER: Final = (sys.executable, "-S", "-c", "import sys\nfor line in sys.stdin: print(line, end='', flush=True)")
"""Answers each line with itself: what is measured is what `ash wrap` adds."""
_MOST_SECONDS: Final = 60.0
_MESSAGE: Final = b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n'


async def measure_wrap(bench: Bench) -> Sequence[Row]:
    bench.step("a server under ash wrap")
    starts: dict[bool, list[float]] = {True: [], False: []}
    messages: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * max(bench.spawns // 2, 2)):
        is_wrapped = number % 2 == 0
        with suppress(OSError, ValueError):
            first, rest = await anyio.to_thread.run_sync(_run, is_wrapped, max(bench.calls // 10, 20))
            starts[is_wrapped].append(first)
            messages[is_wrapped] += rest
    if not starts[True]:
        return [Row(what="ash wrap: a server does not start under it here", unit="ms", hive=math.nan, samples=0)]
    return [
        Row(
            what="ash wrap, until the first answer, p50",
            unit="ms",
            hive=median(starts[True]) * 1000,
            direct=median(starts[False]) * 1000,
            samples=len(starts[True]),
        ),
        Row(
            what="ash wrap, a message and its answer, p50",
            unit="ms",
            hive=median(messages[True]) * 1000,
            direct=median(messages[False]) * 1000,
            samples=len(messages[True]),
        ),
    ]


def _run(is_wrapped: bool, messages: int) -> tuple[float, list[float]]:
    """Start a server and return how long its first answer took, and each of the others.

    Raises:
        ValueError: It gave another answer, or none.
    """
    began = time.perf_counter()
    words = (*_ASH, *_SERVER) if is_wrapped else _SERVER
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as server:
        bound = threading.Timer(_MOST_SECONDS, server.kill)
        bound.start()
        try:
            first = _exchange(server) - began
            rest: list[float] = []
            for _ in range(messages):
                sent = time.perf_counter()
                rest.append(_exchange(server) - sent)
            return first, rest
        finally:
            bound.cancel()
            server.kill()


def _exchange(server: subprocess.Popen[bytes]) -> float:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(_MESSAGE)
    if server.stdout.readline() != _MESSAGE:
        raise ValueError("the server gave no answer")
    return time.perf_counter()
