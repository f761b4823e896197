"""A caller that waits for a tool of the hive hears of it again and again."""

from __future__ import annotations

import re
import time

import anyio
import pytest

from ash_hub.face.steady_progress import SteadyProgress

pytestmark = pytest.mark.anyio


async def test_what_was_reported_last_is_told_again_and_grows() -> None:
    told: list[tuple[float, str | None]] = []
    enough = anyio.Event()

    async def report(done: float, total: float | None, message: str | None) -> None:
        assert total == 1.0
        told.append((done, message))
        if len(told) == 4:
            enough.set()

    progress, began = SteadyProgress(report, quiet_seconds=0.01), time.monotonic()
    with anyio.fail_after(60):
        async with progress.repeated():
            await progress(0.3, "starting")
            await enough.wait()
    assert told[0] == (0.3, "starting")
    said = re.fullmatch(r"starting, after (\d+) s", told[1][1] or "")
    assert said is not None and int(said[1]) <= time.monotonic() - began
    numbers = [done for done, _ in told]
    assert numbers == sorted(set(numbers)) and numbers[-1] < 0.8


async def test_nothing_is_told_after_the_end() -> None:
    told: list[float] = []

    async def report(done: float, total: float | None, message: str | None) -> None:
        told.append(done)

    async with SteadyProgress(report, quiet_seconds=0.02).repeated():
        pass
    await anyio.sleep(0.1)
    assert told == []
