"""Hundreds of lives of every kind on one machine, with hubs and fork parents killed: nothing is lost or adds up."""

from __future__ import annotations

import os
import random
import signal
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
from tests.hub.backends.local.local_parts import descendants, fork_parents, is_forker, needs_isolation
from tests.system.crash_parts import Home, home

pytestmark = needs_isolation

WORKERS = 5
RECIPES = ("echo", "general")
KILLS = 3
"""Of hubs and of fork parents each, spread over the lives."""
PROCESS_MIB = 8
"""What a process may have grown by at the end."""
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
    lives: int
    """How many there are to be."""
    outcomes: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])

    @property
    def lived(self) -> int:
        return sum(self.outcomes[end] for end in ("destroy", "leave", "crash"))

    @property
    def over(self) -> bool:
        return self.lived >= self.lives or bool(self.wrong)


async def one_life(hive: Hive, chance: random.Random, outcomes: Counter[str]) -> str | None:
    """Spawn, use and leave one sandbox; return what was wrong with it."""
    recipe = chance.choice(RECIPES)
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


async def kill_in_turns(place: Place) -> None:
    """Kill a fork parent, or the hub, each time that another part of the lives is over."""
    for number in range(1, 2 * KILLS + 1):
        while not place.over and place.lived < number * place.lives // (2 * KILLS + 1):
            await anyio.sleep(0.05)
        if place.over:
            return
        if number % 2:
            await anyio.to_thread.run_sync(place.home.kill_hub)
            place.url = await anyio.to_thread.run_sync(place.home.start)
            place.outcomes["hubs killed"] += 1
        else:
            place.outcomes["parents killed"] += kill_parents(place.home.known_keeper())


def kill_parents(keeper: int) -> int:
    """Kill the processes that sandboxes are forked from, and return how many these were."""
    found = [it for launcher in fork_parents(keeper) for it in descendants(launcher)]
    parents = [it for it in found if is_parent(it)]
    for parent in parents:
        os.kill(parent, signal.SIGKILL)
    return len(parents)


def is_parent(process: int) -> bool:
    """Tell a fork parent from its helper, and from its forks, which have the same command line."""
    try:
        return is_forker(process) and b"fork.parent" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False


async def warm_up(place: Place) -> None:
    """Have each recipe's fork parent loaded, so that what it holds is there from the start."""
    async with Hive(place.url) as hive:
        for recipe in RECIPES:
            await (await hive.spawn(recipe)).destroy()
        with anyio.fail_after(QUIET_SECONDS):
            while len(fork_parents(place.home.known_keeper())) < len(RECIPES):
                await anyio.sleep(0.1)


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


@pytest.mark.parametrize(
    "lives",
    [
        pytest.param(300, marks=[pytest.mark.heavy, pytest.mark.timeout(600)]),
        pytest.param(10_000, marks=[pytest.mark.extended, pytest.mark.timeout(3000)]),
    ],
)
@pytest.mark.anyio
async def test_churn_loses_nothing_and_nothing_adds_up(
    lives: int, record_property: Callable[[str, object], None]
) -> None:
    with home() as folder:
        place = Place(folder, folder.start(), lives)
        await warm_up(place)
        await quiet(place)
        before = held(folder.known_keeper())
        started = time.monotonic()
        async with anyio.create_task_group() as group:
            group.start_soon(kill_in_turns, place)
            for seed in range(WORKERS):
                group.start_soon(work, place, seed)
        await quiet(place)
        after = held(folder.known_keeper())
        record_property("sandboxes", f"{place.lived} in {time.monotonic() - started:.0f} s; {dict(place.outcomes)}")
        record_property("keeper", f"{before[0]} -> {after[0]} descriptors, {before[1]:.1f} -> {after[1]:.1f} MiB")
        assert not place.wrong, place.wrong[:5]
        assert place.outcomes["hubs killed"] == KILLS and place.outcomes["parents killed"] >= KILLS
        assert after[0] <= before[0] + 2 and after[1] < before[1] + PROCESS_MIB
        assert folder.stop_hub() == 0
        assert not folder.remains()
