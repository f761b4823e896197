"""Minutes of spawns, calls, ends of every kind and killed hives on one machine: nothing is lost, nothing adds up."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from ash_mcp import Hive
from ash_mcp.errors import AshError
from tests.hub.backends.local.local_parts import needs_isolation
from tests.system.crash_parts import Home, home

pytestmark = [needs_isolation, pytest.mark.extended, pytest.mark.timeout(1500)]

SECONDS = float(os.environ.get("ASH_TEST_CHURN_SECONDS", "300"))
WORKERS = 5
HUB_LIVES_SECONDS = 40.0
QUIET_SECONDS = 60.0
"""For what was left to a time to live, or half made, to be gone."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Place:
    """Where the hive is now, and what happened."""

    home: Home
    url: str
    outcomes: Counter[str] = field(default_factory=Counter[str])
    over: bool = False
    killed_at: float = 0.0
    wrong: list[str] = field(default_factory=list[str])


async def one_life(hive: Hive, chance: random.Random, outcomes: Counter[str]) -> str | None:
    """Spawn, use and leave one sandbox; return what was wrong with it."""
    recipe = chance.choice(("echo", "general"))
    with anyio.move_on_after(chance.choice((0.1, 60.0, 60.0, 60.0))) as patience:
        box = await hive.spawn(recipe, ttl_seconds=chance.choice((5, 600)))
        for number in range(chance.randrange(4)):
            word = f"{box.session}-{number}"
            done = await box.exec(f"echo {word} | tee -a seen", timeout_seconds=20)
            if done.stdout.strip() != word:
                return f"{word} came back as {done.stdout!r}"
        end = chance.choice(("destroy", "destroy", "leave", "crash"))
        outcomes[end] += 1
        if end == "destroy":
            await box.destroy()
        elif end == "crash":
            await box.exec("kill -9 -1", timeout_seconds=5)
    if patience.cancelled_caught:
        outcomes["cancelled"] += 1
    return None


async def work(place: Place, seed: int) -> None:
    """Live one sandbox after the other. A failure is one that the kill of a hive explains, or it is wrong."""
    chance = random.Random(seed)
    while not place.over:
        try:
            async with Hive(place.url) as hive:
                wrong = await one_life(hive, chance, place.outcomes)
                if wrong is not None:
                    place.wrong.append(wrong)
        except AshError as error:
            place.outcomes[error.kind] += 1
            if error.trainable:
                place.wrong.append(f"trainable: {error!r}")
            await anyio.sleep(0.2)


async def kill_hubs(place: Place) -> None:
    while not place.over:
        await anyio.sleep(HUB_LIVES_SECONDS)
        if place.over:
            return
        await anyio.to_thread.run_sync(place.home.kill_hub)
        place.url = await anyio.to_thread.run_sync(place.home.start)
        place.outcomes["hubs killed"] += 1


def held(process: int) -> tuple[int, float]:
    """Return the open descriptors and the MiB of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return len(os.listdir(f"/proc/{process}/fd")), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def quiet(place: Place) -> None:
    """Wait until the hive has no sandbox."""
    assert place.home.hubs[-1].poll() is None, f"the hive has ended by itself: {place.home.said()[-4000:]}"
    with anyio.fail_after(QUIET_SECONDS):
        async with Hive(place.url) as hive:
            for box in await hive.list():
                await hive.destroy(box.session)
            while await hive.list():
                await anyio.sleep(0.2)


@pytest.mark.anyio
async def test_minutes_of_churn_lose_nothing_and_nothing_adds_up(
    record_property: Callable[[str, object], None],
) -> None:
    with home() as folder:
        place = Place(folder, folder.start())
        async with Hive(place.url) as hive:
            await (await hive.spawn("general")).destroy()
        await quiet(place)
        before = held(folder.known_keeper())
        started = time.monotonic()
        async with anyio.create_task_group() as group:
            group.start_soon(kill_hubs, place)
            for seed in range(WORKERS):
                group.start_soon(work, place, seed)
            await anyio.sleep(SECONDS)
            place.over = True
        await quiet(place)
        after = held(folder.known_keeper())
        lives = sum(place.outcomes[end] for end in ("destroy", "leave", "crash"))
        record_property("sandboxes", f"{lives} in {time.monotonic() - started:.0f} s; {dict(place.outcomes)}")
        record_property("keeper", f"{before[0]} -> {after[0]} descriptors, {before[1]:.1f} -> {after[1]:.1f} MiB")
        assert not place.wrong, place.wrong[:5]
        assert lives > SECONDS / 10
        assert after[0] <= before[0] + 2 and after[1] < before[1] + 8
        assert folder.stop_hub() == 0
        assert not folder.remains()
