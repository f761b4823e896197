"""Hub and keeper are killed at random moments of spawns, calls and destroys: nothing is lost and nothing is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import pytest

from ash_mcp import Hive
from ash_mcp.errors import AshError
from ash_mcp.types import SandboxInfo
from tests.hub.local_parts import descendants, ended, leftovers, needs_isolation
from tests.system.crash_parts import Home, home

pytestmark = [pytest.mark.anyio, needs_isolation]

ADOPTION_SECONDS = 5.0
KEEPER_SECONDS = 1.0
GRACE_SECONDS = 1.0
MOST = 3
"""Sandboxes that are kept from one round to the next."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Model:
    """What the caller was told, and so may rely on."""

    ready: dict[str, SandboxInfo] = field(default_factory=dict[str, SandboxInfo])
    """Spawned, and not asked to end."""
    doubtful: set[str] = field(default_factory=set[str])
    """Asked to begin or to end, without an answer."""
    ended: set[str] = field(default_factory=set[str])
    """Destroyed, and told so."""

    async def spawn(self, hive: Hive, name: str) -> None:
        self.doubtful.add(name)
        box = await hive.spawn("echo", session=name, ttl_seconds=900 + len(self.ready))
        self.ready[name] = box.info
        self.doubtful.discard(name)

    async def destroy(self, hive: Hive, name: str) -> None:
        del self.ready[name]
        self.doubtful.add(name)
        await hive.destroy(name)
        self.doubtful.discard(name)
        self.ended.add(name)


async def busy(model: Model, url: str, chance: random.Random, number: int) -> None:
    """Spawn, call and destroy until the hive is gone, or for a few seconds."""

    async def spawning() -> None:
        for count in range(3):
            await model.spawn(hive, f"r{number}n{count}")

    async def calling() -> None:
        while True:
            for name in list(model.ready):
                if name in model.ready:
                    await (await hive.attach(name)).call("echo", text=name)
            await anyio.sleep(0.01)

    async def destroying() -> None:
        while True:
            await anyio.sleep(chance.uniform(0.1, 0.6))
            if model.ready:
                await model.destroy(hive, chance.choice(sorted(model.ready)))

    async def until_gone(act: Callable[[], Awaitable[None]]) -> None:
        with contextlib.suppress(AshError):
            await act()

    async with Hive(url) as hive, anyio.create_task_group() as group:
        for act in (spawning, calling, destroying):
            group.start_soon(until_gone, act)


async def killed_in_the_middle(place: Home, model: Model, url: str, chance: random.Random, number: int) -> str:
    """Be busy until a random moment, kill the hub or the keeper then, and say which."""
    victim = chance.choice(("hub", "keeper"))
    async with anyio.create_task_group() as group:
        group.start_soon(busy, model, url, chance, number)
        await anyio.sleep(chance.uniform(0.05, 2.0))
        keeper = place.known_keeper()
        below = descendants(keeper)
        if victim == "hub":
            place.kill_hub()
        else:
            os.kill(keeper, signal.SIGKILL)
            with anyio.fail_after(KEEPER_SECONDS):
                await ended(keeper, *below)
        group.cancel_scope.cancel()
    return victim


async def check_adopted(place: Home, model: Model, url: str, began: float) -> None:
    """Check that a new hub has every sandbox that was promised, as it was, and no other."""
    async with Hive(url) as hive:
        found = {str(info.session): info for info in await hive.list()}
        assert time.monotonic() - began < ADOPTION_SECONDS
        assert set(model.ready) <= set(found) <= set(model.ready) | model.doubtful
        for name, info in model.ready.items():
            assert (found[name].id, found[name].expires_at) == (info.id, info.expires_at)
        for name in found:
            assert (await (await hive.attach(name)).call("echo", text=name)).structured == {"text": name}
        assert {name for path in leftovers(place.settings) for name in [path.rpartition("/")[2]]} == {
            info.id for info in found.values()
        }
        for name in found:
            model.doubtful.discard(name)
            model.ready.setdefault(name, found[name])
        for name in sorted(model.ready)[MOST:]:
            await model.destroy(hive, name)
        model.doubtful.clear()


async def check_ended(place: Home, model: Model, url: str) -> None:
    """Check that a hub whose keeper was killed says so for each sandbox, and goes on with a new one."""
    async with Hive(url) as hive:
        with anyio.fail_after(2):
            while await hive.list():
                await anyio.sleep(0.01)
        told = {str(info.session): info for info in await hive.list(include_ended=True)}
        assert {told[name].reason for name in model.ready} <= {"process_died"}
        assert set(model.ready) <= set(told)
        model.ready.clear()
        model.doubtful.clear()
        async with hive.spawn("echo") as box:
            assert {path.rpartition("/")[2] for path in leftovers(place.settings)} == {box.id}


async def play(place: Home, rounds: int, seed: int) -> None:
    """Play rounds of one seed; the hub is started anew in the same directories whenever it was killed."""
    chance, model = random.Random(seed), Model()
    url = await anyio.to_thread.run_sync(place.start)
    for number in range(rounds):
        victim = await killed_in_the_middle(place, model, url, chance, number)
        if victim == "hub":
            began = time.monotonic()
            url = await anyio.to_thread.run_sync(place.start)
            await check_adopted(place, model, url, began)
        else:
            await check_ended(place, model, url)
    assert place.stop_hub() == 0
    assert place.remains() == []


async def test_rounds_of_kills_lose_nothing_and_leave_nothing() -> None:
    with home() as place:
        await play(place, 5, seed=1)


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [2, 3, 4])
async def test_many_rounds_of_kills_lose_nothing_and_leave_nothing(seed: int) -> None:
    with home() as place:
        await play(place, 10, seed)


@pytest.mark.parametrize(
    "seed", [5, pytest.param(6, marks=pytest.mark.heavy), pytest.param(7, marks=pytest.mark.heavy)]
)
async def test_a_hive_that_nobody_takes_over_is_gone_after_the_grace(seed: int) -> None:
    chance, model = random.Random(seed), Model()
    with home(ASH_HUB_BACKEND__GRACE_SECONDS=str(GRACE_SECONDS)) as place:
        url = await anyio.to_thread.run_sync(place.start)
        keeper = place.known_keeper()
        async with anyio.create_task_group() as group:
            group.start_soon(busy, model, url, chance, 0)
            await anyio.sleep(chance.uniform(0.5, 2.5))
            place.kill_hub()
            group.cancel_scope.cancel()
        below = descendants(keeper)
        with anyio.fail_after(GRACE_SECONDS + 3):
            await ended(keeper, *below)
        assert place.remains() == []
