"""Two replicas of one hive over one backend and one store: what one makes, changes and ends, the other knows."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from ash_hub.audit import AUDIT_LOGGER
from ash_hub.backends.memory import MemoryBackend
from ash_hub.sandbox import Sandbox
from ash_mcp.errors import CapacityExceeded, SandboxGone, SessionTaken, StartFailed
from ash_mcp.types import DEFAULT_SCOPE, EndReason, SandboxId, SessionName, State
from ash_router.store.memory import MemoryStore
from tests.hub.world import LOCAL, StandIn, World, assemble, serving, watched

pytestmark = pytest.mark.anyio


@dataclass
class Family:
    """Who lives and what each is making."""

    living: set[str] = field(default_factory=set[str])
    making: dict[str, set[SandboxId]] = field(default_factory=dict[str, set[SandboxId]])


class Member:
    """One replica's view of a family; the test says when it dies."""

    possible = True

    def __init__(self, family: Family, name: str) -> None:
        self._family = family
        self.id = name
        family.living.add(name)
        family.making[name] = set()

    async def lives(self, replica: str) -> bool:
        return replica != self.id and replica in self._family.living

    async def begin(self, sandbox_id: SandboxId) -> None:
        self._family.making[self.id].add(sandbox_id)

    def settle(self, sandbox_id: SandboxId) -> None:
        self._family.making[self.id].discard(sandbox_id)

    async def make(self, sandbox_id: SandboxId) -> bool:
        return any(sandbox_id in self._family.making[name] for name in self._family.living)

    async def leave(self) -> bool:
        self._family.living.discard(self.id)
        return bool(self._family.living)


@dataclass
class Hive:
    """Two replicas, `a` and `b`, and what they share."""

    a: World
    b: World
    family: Family
    store: MemoryStore
    backend: MemoryBackend
    runner: StandIn

    async def both(self, sandbox: Sandbox) -> Sandbox:
        """Return the other replica's view of a sandbox that `a` has."""
        await self.b.reconciler.catch_up()
        seen = self.b.sandboxes.registry.by_id(sandbox.id)
        assert seen is not None and seen is not sandbox
        return seen


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncGenerator[Hive]:
    async with open_two(tmp_path) as hive:
        yield hive


@asynccontextmanager
async def open_two(folder: Path) -> AsyncGenerator[Hive]:
    runner, family, store = StandIn(folder / "socket"), Family(), MemoryStore()
    backend = MemoryBackend(runner.serve)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(runner))
        await stack.enter_async_context(backend)
        a, b = (
            assemble(folder, backend, runner, {}, store=store, siblings=Member(family, name)) for name in ("a", "b")
        )
        await stack.enter_async_context(watched(a))
        await stack.enter_async_context(watched(b))
        yield Hive(a, b, family, store, backend, runner)


async def settled(sandbox: Sandbox) -> None:
    with anyio.fail_after(5):
        await sandbox.ended.wait()


async def test_what_one_spawns_the_other_has_with_its_tools(hive: Hive) -> None:
    made = await hive.a.spawn(session="mine", labels={"run": "7"})
    seen = await hive.both(made)
    assert (seen.session, seen.life.state, seen.labels) == ("mine", State.READY, {"run": "7"})
    assert seen.toolset is made.toolset or (
        seen.toolset and made.toolset and seen.toolset.digest == made.toolset.digest
    )
    assert hive.b.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "mine") is seen
    assert hive.b.changed == []  # its maker announces it, to all


async def test_one_that_starts_is_shown_as_starting_and_then_ready(hive: Hive) -> None:
    held = hive.runner.hold = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(hive.a.spawn)
        with anyio.fail_after(5):
            await hive.runner.asked.wait()
        await hive.b.reconciler.run_once()
        (seen,) = hive.b.sandboxes.registry.living()
        assert seen.life.state is State.STARTING
        with pytest.raises(CapacityExceeded, match="still starting"):
            hive.b.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "sb1")
        held.set()
        with anyio.fail_after(5):
            await seen.settled.wait()
        assert seen.life.state is State.READY


async def test_what_one_extends_lives_longer_for_both(hive: Hive) -> None:
    seen = await hive.both(await hive.a.spawn())
    extended = await hive.b.sandboxes.extend(LOCAL, DEFAULT_SCOPE, "sb1", 500)
    assert extended is seen
    made = hive.a.sandboxes.registry.by_id(seen.id)
    assert made is not None
    with anyio.fail_after(5):
        while made.life.expires_at != seen.life.expires_at:
            await anyio.sleep(0.005)


async def test_an_end_by_the_other_has_the_same_reason_here(hive: Hive) -> None:
    made = await hive.a.spawn()
    aborted: list[Exception] = []
    hive.a.ledger.begin(made.id, "local", aborted.append)
    await hive.b.sandboxes.destroy([await hive.both(made)])
    await settled(made)
    assert (made.life.state, made.life.reason) == (State.GONE, EndReason.DESTROYED)
    assert isinstance(aborted[0], SandboxGone) and aborted[0].data["reason"] == "destroyed"
    with pytest.raises(SandboxGone, match="it was destroyed"):
        hive.a.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "sb1")
    assert not hive.a.routes.ids() | hive.b.routes.ids()


async def test_a_start_can_be_ended_through_the_other(hive: Hive) -> None:
    hive.runner.hold = anyio.Event()
    caught: list[Exception] = []

    async def spawn() -> None:
        with pytest.raises(SandboxGone, match="it was destroyed") as error:
            await hive.a.spawn()
        caught.append(error.value)

    async with anyio.create_task_group() as group:
        group.start_soon(spawn)
        with anyio.fail_after(5):
            await hive.runner.asked.wait()
        await hive.b.reconciler.run_once()
        await hive.b.sandboxes.destroy(hive.b.sandboxes.registry.living())
        with anyio.fail_after(5):
            while not caught:
                await anyio.sleep(0.005)
    assert await hive.backend.list() == []
    assert [s.life.reason for s in hive.b.sandboxes.registry.all()] == [EndReason.DESTROYED]


async def test_a_death_is_written_down_once_and_known_to_both(hive: Hive, caplog: pytest.LogCaptureFixture) -> None:
    made = await hive.a.spawn()
    seen = await hive.both(made)
    with caplog.at_level(logging.INFO, AUDIT_LOGGER):
        hive.backend.die(made.id, "killed: out of memory")
        await settled(made)
        await settled(seen)
    assert made.life.reason is seen.life.reason is EndReason.PROCESS_DIED
    with anyio.fail_after(5):
        while await hive.backend.list():
            await anyio.sleep(0.005)
    assert sum("process_died" in line for line in caplog.messages) == 1


async def test_a_start_whose_replica_was_killed_is_removed_and_its_name_is_free(hive: Hive) -> None:
    hive.runner.hold = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(hive.a.spawn, DEFAULT_SCOPE)
        with anyio.fail_after(5):
            await hive.runner.asked.wait()
        await hive.b.reconciler.run_once()
        (seen,) = hive.b.sandboxes.registry.living()
        hive.family.living.discard("a")
        await hive.b.reconciler.sweep()
        await settled(seen)
        assert seen.life.reason is EndReason.START_FAILED
        assert await hive.backend.list() == []
        group.cancel_scope.cancel()
    hive.runner.hold = None
    await hive.b.spawn(session="sb1")


async def test_a_name_taken_by_a_replica_that_was_killed_before_it_made_anything_is_free(hive: Hive) -> None:
    taken = SandboxId("sbx-nobody")
    await hive.store.reserve_session("local", DEFAULT_SCOPE, SessionName("mine"), taken)
    await hive.store.claim_key("local", DEFAULT_SCOPE, "k", taken)
    hive.family.making["a"].add(taken)
    with pytest.raises(SessionTaken):
        await hive.b.spawn(session="mine")
    with pytest.raises(CapacityExceeded, match="just begun"):
        await hive.b.spawn(idempotency_key="k")
    hive.family.living.discard("a")
    made = await hive.b.spawn(session="mine", idempotency_key="k")
    assert (made.session, made.key) == ("mine", "k")


async def test_the_same_key_means_the_same_sandbox_on_both(hive: Hive) -> None:
    made = await hive.a.spawn(idempotency_key="k")
    assert (await hive.b.spawn(idempotency_key="k")).id == made.id
    assert len(await hive.backend.list()) == 1


async def test_an_end_that_a_killed_replica_began_is_finished(hive: Hive) -> None:
    made = await hive.a.spawn()
    seen = await hive.both(made)
    await hive.backend.annotate(made.id, {**made.record(), "revision": 2, "ending": "destroyed"})
    with anyio.fail_after(5):
        while seen.life.state is not State.STOPPING:
            await anyio.sleep(0.005)
    hive.family.living.discard("a")
    await hive.b.reconciler.sweep()
    await hive.b.reconciler.sweep()
    await settled(seen)
    assert seen.life.reason is EndReason.DESTROYED
    assert await hive.backend.list() == []


async def test_a_route_that_was_never_bound_is_bound_and_one_without_a_sandbox_is_not(hive: Hive) -> None:
    made = await hive.a.spawn()
    await hive.both(made)
    await hive.store.drop_route(made.id)
    await hive.store.put_route({**_record_of(hive), "sandbox_id": "sbx-gone"})
    for _ in range(2):
        await hive.b.reconciler.sweep()
    assert [record["sandbox_id"] for record in await hive.store.routes()] == [made.id]


def _record_of(hive: Hive) -> dict[str, object]:
    (route,) = hive.b.routes.of(LOCAL, DEFAULT_SCOPE)
    endpoint = {"unix": route.endpoint.unix, "host": None, "port": None}
    return {
        "generation": 1,
        "owner": "local",
        "scope": "",
        "session": "ghost",
        "endpoint": endpoint,
        "tool_names": {},
    }


async def test_a_replica_that_stops_leaves_sandboxes_to_the_other_and_the_last_one_ends_them(hive: Hive) -> None:
    made = await hive.a.spawn()
    seen = await hive.both(made)
    await hive.a.sandboxes.stop(keep=False)
    assert made.life.state is State.READY
    with pytest.raises(StartFailed, match="stopping"):
        await hive.a.spawn()
    await hive.b.sandboxes.stop(keep=False)
    assert seen.life.reason is EndReason.HIVE_STOPPED
    assert await hive.backend.list() == []


async def test_calls_through_the_other_keep_a_sandbox_from_idling(hive: Hive) -> None:
    made = await hive.a.spawn(idle_seconds=60)
    await hive.both(made)
    for world in (hive.a, hive.b):
        world.clock[0] += 50
    hive.b.ledger.end(hive.b.ledger.begin(made.id, "local"))
    await hive.store.touch(hive.b.ledger.take_changed())
    hive.a.clock[0] += 20
    hive.a.ledger.learn(await hive.store.last_calls())
    await hive.a.sandboxes.expire()
    assert made.life.state is State.READY
