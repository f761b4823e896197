"""Hub and keeper are killed at random moments of spawns, calls and destroys: nothing is lost and nothing is left.

A state machine of Hypothesis chooses what is going on, who is killed and when.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import anyio
import anyio.to_thread
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as some
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from ash_mcp import Hive
from ash_mcp.errors import AshError
from ash_mcp.types import SandboxInfo
from tests.hub.backends.local.local_parts import (
    descendants,
    ended,
    leftovers,
    lives,
    needs_isolation,
    sandbox_launchers,
)
from tests.system.crash_parts import Home, home

pytestmark = needs_isolation

ADOPTION_SECONDS = 20.0
"""Less what hub and test waited for a processor; what the keeper waited is in it."""
KEEPER_SECONDS = 5.0
GRACE_SECONDS = 1.0
MOST = 3
"""Sandboxes that are kept from one round to the next."""

Victim = Literal["hub", "keeper"]


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


async def busy(model: Model, url: str, acts: Sequence[str], pause: float, prefix: str) -> None:
    """Spawn, call and destroy, as far as `acts` names it, until the hive is gone or there is no more to do."""

    async def spawn() -> None:
        for count in range(3):
            await model.spawn(hive, f"{prefix}n{count}")

    async def call() -> None:
        while True:
            for name in list(model.ready):
                if name in model.ready:
                    await (await hive.attach(name)).call("echo", text=name)
            await anyio.sleep(0.01)

    async def destroy() -> None:
        while True:
            await anyio.sleep(pause)
            if model.ready:
                await model.destroy(hive, min(model.ready))

    async def until_gone(act: Callable[[], Awaitable[None]]) -> None:
        with contextlib.suppress(AshError):
            await act()

    known = {"spawn": spawn, "call": call, "destroy": destroy}
    async with Hive(url) as hive, anyio.create_task_group() as group:
        for act in acts:
            group.start_soon(until_gone, known[act])


async def kill_in_the_middle(
    place: Home, model: Model, url: str, victim: Victim, acts: Sequence[str], seconds: float, prefix: str
) -> None:
    """Be busy for so long, and kill the hub or the keeper then."""
    async with anyio.create_task_group() as group:
        group.start_soon(busy, model, url, acts, seconds / 3, prefix)
        await anyio.sleep(seconds)
        keeper = place.known_keeper()
        below = descendants(keeper)
        if victim == "hub":
            place.kill_hub()
        else:
            os.kill(keeper, signal.SIGKILL)
            with anyio.fail_after(KEEPER_SECONDS):
                await ended(keeper, *below)
        group.cancel_scope.cancel()


def waited_seconds(pid: int) -> float:
    """Return how long a process was ready to run but others had the processors: not the hive's time."""
    with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
        return int(file.read().split()[1]) / 1e9


async def check_adopted(place: Home, model: Model, url: str, began: float, waited: float) -> None:
    """Check that a new hub has every sandbox that was promised, as it was, and no other."""
    async with Hive(url) as hive:
        found = {str(info.session): info for info in await hive.list()}
        hub = place.hubs[-1].pid
        assert time.monotonic() - began - waited_seconds(hub) - waited_seconds(os.getpid()) + waited < ADOPTION_SECONDS
        assert set(model.ready) <= set(found) <= set(model.ready) | model.doubtful
        for name, info in model.ready.items():
            assert (found[name].id, found[name].expires_at) == (info.id, info.expires_at)
        for name in found:
            assert (await (await hive.attach(name)).call("echo", text=name)).structured == {"text": name}
        assert {name for path in leftovers(place.settings) for name in [path.rpartition("/")[2]]} == {
            info.id for info in found.values()
        }
        assert len(sandbox_launchers(place.known_keeper())) <= len(found)
        for name in found:
            model.doubtful.discard(name)
            model.ready.setdefault(name, found[name])
        for name in sorted(model.ready)[MOST:]:
            await model.destroy(hive, name)
        model.doubtful.clear()


async def check_ended(place: Home, model: Model, url: str) -> None:
    """Check that a hub whose keeper was killed says so for each sandbox, and goes on with a new one."""
    async with Hive(url) as hive:
        with anyio.fail_after(5):
            while await hive.list():
                await anyio.sleep(0.01)
        told = {str(info.session): info for info in await hive.list(include_ended=True)}
        assert {told[name].reason for name in model.ready} <= {"process_died"}
        assert set(model.ready) <= set(told)
        model.ready.clear()
        model.doubtful.clear()
        async with hive.spawn("echo") as box:
            assert {path.rpartition("/")[2] for path in leftovers(place.settings)} == {box.id}


class Kills(RuleBasedStateMachine):
    """One hive's directories, its hubs and keepers one after the other, and what its caller was promised."""

    rounds: ClassVar[int] = 0
    """Kills so far, of all machines."""
    enough: ClassVar[int] = 0
    """With so many kills nothing more is done."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.place = self.stack.enter_context(home())
        self.model = Model()
        self.url = ""
        self.number = 0

    @initialize()
    def begin(self) -> None:
        if not self.is_over():
            self.url = self.place.start()

    def is_over(self) -> bool:
        return Kills.rounds >= Kills.enough

    @rule(
        acts=some.lists(some.sampled_from(["spawn", "call", "destroy"]), min_size=1, max_size=3, unique=True),
        seconds=some.floats(0.05, 2.0),
        victim=some.sampled_from(["hub", "keeper"]),
    )
    def kill(self, acts: Sequence[str], seconds: float, victim: Victim) -> None:
        if not self.is_over():
            anyio.run(self._round, acts, seconds, victim)

    # What is drawn must not depend on what survived a kill: Hypothesis refuses a machine that draws otherwise.
    @rule()
    def spawn(self) -> None:
        if len(self.model.ready) < MOST and not self.is_over():
            anyio.run(self._with_hive, self.model.spawn, self._prefix())

    @rule(number=some.integers(0, MOST - 1))
    def destroy(self, number: int) -> None:
        names = sorted(self.model.ready)
        if number < len(names) and not self.is_over():
            anyio.run(self._with_hive, self.model.destroy, names[number])

    @invariant()
    def what_is_there_is_what_was_promised(self) -> None:
        if self.url and not self.is_over():
            anyio.run(self._check_promised)

    def teardown(self) -> None:
        with self.stack:
            if self.url:
                keeper = self.place.keeper()
                below = [] if keeper is None else descendants(keeper)
                assert self.place.stop_hub() == 0
                assert self.place.remains() == []
                assert [pid for pid in below if lives(pid)] == []

    def _prefix(self) -> str:
        self.number += 1
        return f"r{self.number}"

    async def _round(self, acts: Sequence[str], seconds: float, victim: Victim) -> None:
        if self.place.keeper() is None:
            await self._with_hive(self.model.spawn, self._prefix())
        Kills.rounds += 1
        await kill_in_the_middle(self.place, self.model, self.url, victim, acts, seconds, self._prefix())
        if victim == "hub":
            began, waited = time.monotonic(), waited_seconds(os.getpid())
            self.url = await anyio.to_thread.run_sync(self.place.start)
            await check_adopted(self.place, self.model, self.url, began, waited)
        else:
            await check_ended(self.place, self.model, self.url)

    async def _with_hive(self, act: Callable[[Hive, str], Awaitable[None]], name: str) -> None:
        async with Hive(self.url) as hive:
            await act(hive, name)

    async def _check_promised(self) -> None:
        async with Hive(self.url) as hive:
            assert {str(info.session): info.id for info in await hive.list()} == {
                name: info.id for name, info in self.model.ready.items()
            }


def play(examples: int, steps: int) -> None:
    """Run the machine; a failure is told as it was, since another run would not meet the same moment."""
    bounds = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    run_state_machine_as_test(Kills, settings=bounds)  # pyright: ignore[reportUnknownMemberType]


@pytest.mark.parametrize(
    ("kills", "most_runs"),
    [pytest.param(10, 4, marks=pytest.mark.heavy), pytest.param(60, 16, marks=pytest.mark.extended)],
)
@pytest.mark.timeout(1200)
def test_kills_lose_nothing_and_leave_nothing(kills: int, most_runs: int) -> None:
    before, runs = Kills.rounds, 0
    Kills.enough = before + kills
    while Kills.rounds < Kills.enough:
        assert runs < most_runs, f"only {Kills.rounds - before} kills in {runs} runs"
        play(examples=6, steps=10)  # the first of a run is always next to nothing
        runs += 1


@pytest.mark.anyio
@pytest.mark.heavy
@pytest.mark.parametrize("seed", [5, 6, 7])
async def test_a_hive_that_nobody_takes_over_is_gone_after_the_grace(seed: int) -> None:
    chance, model = random.Random(seed), Model()
    with home(ASH_HUB_BACKEND__GRACE_SECONDS=str(GRACE_SECONDS)) as place:
        url = await anyio.to_thread.run_sync(place.start)
        keeper = place.known_keeper()
        async with anyio.create_task_group() as group:
            group.start_soon(busy, model, url, ["spawn", "call", "destroy"], chance.uniform(0.1, 0.6), "r0")
            await anyio.sleep(chance.uniform(0.5, 2.5))
            place.kill_hub()
            group.cancel_scope.cancel()
        below = descendants(keeper)
        with anyio.fail_after(GRACE_SECONDS + 3):
            await ended(keeper, *below)
        assert place.remains() == []
