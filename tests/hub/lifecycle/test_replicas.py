"""Two replicas of one hive over one backend and one store: what one makes, changes and ends, the other knows."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_hub.backends.memory import MemoryBackend
from ash_hub.lifecycle.record import Ending
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.serving.audit import AUDIT_LOGGER
from ash_hub.spawning.spawn_request import SpawnAsk
from ash_mcp.errors import CapacityExceeded, ConnectFailed, SandboxGone, SessionTaken, StartFailed
from ash_mcp.types import DEFAULT_SCOPE, Cause, EndReason, SandboxId, SessionName, State
from ash_router.store.memory import MemoryStore
from tests.hub.world import LOCAL, StandIn, World, assemble, no_progress, serving, watched

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

    async def is_other_alive(self, replica: str) -> bool:
        return replica != self.id and replica in self._family.living

    async def begin(self, sandbox_id: SandboxId) -> None:
        self._family.making[self.id].add(sandbox_id)

    def settle(self, sandbox_id: SandboxId) -> None:
        self._family.making[self.id].discard(sandbox_id)

    async def is_being_made(self, sandbox_id: SandboxId) -> bool:
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
        await self.b.controller.catch_up()
        seen = self.b.sandboxes.registry.by_id(sandbox.id)
        assert seen is not None and seen is not sandbox
        return seen


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncGenerator[Hive]:
    async with open_two(tmp_path) as hive:
        yield hive


@asynccontextmanager
async def open_two(folder: Path, **given: Any) -> AsyncGenerator[Hive]:
    runner, family, store = StandIn(folder / "socket"), Family(), MemoryStore()
    backend = MemoryBackend(runner.serve)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(runner))
        await stack.enter_async_context(backend)
        a, b = (
            assemble(folder, backend, runner, given, store=store, siblings=Member(family, name)) for name in ("a", "b")
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
    assert (seen.session, seen.state, seen.labels) == ("mine", State.READY, {"run": "7"})
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
        await hive.b.look()
        (seen,) = hive.b.sandboxes.registry.living()
        assert seen.state is State.STARTING
        with pytest.raises(CapacityExceeded, match="still starting"):
            hive.b.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "sb1")
        held.set()
        with anyio.fail_after(5):
            await seen.settled.wait()
        assert seen.state is State.READY


async def test_what_one_extends_lives_longer_for_both(hive: Hive) -> None:
    seen = await hive.both(await hive.a.spawn())
    extended = await hive.b.sandboxes.extend(LOCAL, DEFAULT_SCOPE, "sb1", 500)
    assert extended is seen
    made = hive.a.sandboxes.registry.by_id(seen.id)
    assert made is not None
    with anyio.fail_after(5):
        while made.record.expires_at != seen.record.expires_at:
            await anyio.sleep(0.005)


async def test_two_that_extend_at_once_are_both_heard(hive: Hive) -> None:
    made = await hive.a.spawn()
    seen = await hive.both(made)
    async with anyio.create_task_group() as group:
        group.start_soon(hive.a.sandboxes.extend, LOCAL, DEFAULT_SCOPE, "sb1", 500)
        group.start_soon(hive.b.sandboxes.extend, LOCAL, DEFAULT_SCOPE, "sb1", 500)
    (instance,) = await hive.backend.list()
    assert instance.revision == 3
    await hive.a.look()
    assert made.record == seen.record


async def test_what_only_a_newer_replica_can_read_is_left_to_it(hive: Hive) -> None:
    made = await hive.a.spawn()
    (instance,) = await hive.backend.list()
    await hive.backend.annotate(made.id, {**instance.record, "version": 99}, revision=instance.revision)
    hive.a.clock[0] += 1_000_000
    hive.b.clock[0] += 1_000_000
    await hive.a.look()
    await hive.b.look()
    assert [left.id for left in await hive.backend.list()] == [made.id] and made.state is State.READY
    with pytest.raises(ConnectFailed, match="newer version"):
        await hive.a.sandboxes.extend(LOCAL, DEFAULT_SCOPE, "sb1", 500)


async def test_one_whose_tools_are_not_known_here_is_left_to_the_others(hive: Hive) -> None:
    made = await hive.a.spawn()
    (instance,) = await hive.backend.list()
    unknown = replace(made.record, toolset="unknown").to_json()
    await hive.backend.annotate(made.id, unknown, revision=instance.revision)
    await hive.b.look()
    assert [left.id for left in await hive.backend.list()] == [made.id]


async def test_an_end_by_the_other_has_the_same_reason_here(hive: Hive) -> None:
    made = await hive.a.spawn()
    aborted: list[Exception] = []
    hive.a.ledger.begin(made.id, "local", aborted.append)
    await hive.b.sandboxes.destroy([await hive.both(made)])
    await settled(made)
    assert (made.state, made.reason) == (State.GONE, EndReason.DESTROYED)
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
        await hive.b.look()
        await hive.b.sandboxes.destroy(hive.b.sandboxes.registry.living())
        with anyio.fail_after(5):
            while not caught:
                await anyio.sleep(0.005)
    assert await hive.backend.list() == []
    assert [s.reason for s in hive.b.sandboxes.registry.all()] == [EndReason.DESTROYED]


async def test_a_death_is_written_down_once_and_known_to_both(hive: Hive, caplog: pytest.LogCaptureFixture) -> None:
    made = await hive.a.spawn()
    seen = await hive.both(made)
    with caplog.at_level(logging.INFO, AUDIT_LOGGER):
        hive.backend.die(made.id, "killed: out of memory", Cause.LIMIT)
        await settled(made)
        await settled(seen)
    assert made.reason is seen.reason is EndReason.PROCESS_DIED
    assert made.cause is seen.cause is Cause.LIMIT
    with anyio.fail_after(5):
        while await hive.backend.list():
            await anyio.sleep(0.005)
    assert sum("process_died" in line for line in caplog.messages) == 1


async def test_a_start_whose_replica_was_killed_is_removed_and_its_name_is_free(hive: Hive) -> None:
    hive.runner.hold = anyio.Event()

    async def start() -> None:
        with suppress(StartFailed):  # a killed one would not see the end of its own
            await hive.a.spawn(DEFAULT_SCOPE)

    async with anyio.create_task_group() as group:
        group.start_soon(start)
        with anyio.fail_after(5):
            await hive.runner.asked.wait()
        await hive.b.look()
        (seen,) = hive.b.sandboxes.registry.living()
        hive.family.living.discard("a")
        await hive.b.look()
        await settled(seen)
        assert seen.reason is EndReason.START_FAILED
        assert await hive.backend.list() == []
        group.cancel_scope.cancel()
    hive.runner.hold = None
    await hive.b.spawn(session="sb1")


async def test_a_name_taken_by_a_replica_that_was_killed_before_it_made_anything_is_free(hive: Hive) -> None:
    taken = SandboxId("sbx-nobody")
    await hive.store.reserve_session("local", DEFAULT_SCOPE, SessionName("mine"), taken)
    await hive.store.claim_key("local", DEFAULT_SCOPE, "k", taken)
    hive.family.making["a"].add(taken)
    with pytest.raises(SessionTaken) as refused:
        await hive.b.spawn(session="mine")
    assert refused.value.retryable  # the spawn that has the name may fail
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
    ending = Ending(reason=EndReason.DESTROYED, cause=Cause.AGENT, at=hive.a.clock[0], by="a")
    hive.a.life.cancel()
    await hive.backend.annotate(made.id, replace(made.record, ending=ending).to_json(), revision=1)
    with anyio.fail_after(5):
        while seen.state is not State.STOPPING:
            await anyio.sleep(0.005)
    await hive.b.look()
    assert await hive.backend.list() != []  # it may be about to delete it
    hive.family.living.discard("a")
    hive.b.controller.replica_left("a")
    await settled(seen)
    assert seen.reason is EndReason.DESTROYED
    assert await hive.backend.list() == []


async def test_a_route_that_was_never_bound_is_bound_and_one_without_a_sandbox_is_not(hive: Hive) -> None:
    made = await hive.a.spawn()
    await hive.both(made)
    await hive.store.drop_route(made.id)
    await hive.store.put_route({**_record_of(hive), "sandbox_id": "sbx-gone"})
    await hive.b.routes.catch_up()
    hive.b.clock[0] += 60  # its maker had its time to bind it
    await hive.b.look()
    assert [record["sandbox_id"] for record in await hive.store.routes()] == [made.id]


def _record_of(hive: Hive) -> dict[str, object]:
    (route,) = hive.b.routes.of(LOCAL, DEFAULT_SCOPE)
    endpoint = {"unix": route.endpoint.unix, "host": None, "port": None}
    return {
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
    assert made.state is State.READY
    with pytest.raises(StartFailed, match="stopping"):
        await hive.a.spawn()
    await hive.b.sandboxes.stop(keep=False)
    assert seen.reason is EndReason.HIVE_STOPPED
    assert await hive.backend.list() == []


async def test_calls_through_the_other_keep_a_sandbox_from_idling(hive: Hive) -> None:
    made = await hive.a.spawn(idle_seconds=60)
    await hive.both(made)
    for world in (hive.a, hive.b):
        world.clock[0] += 50
    hive.b.ledger.end(hive.b.ledger.begin(made.id, "local"))
    await hive.store.touch(hive.b.ledger.take_changed_last_calls())
    hive.a.clock[0] += 20
    hive.a.ledger.learn_last_calls(await hive.store.last_calls())
    await hive.a.look()
    assert made.state is State.READY


async def test_one_with_another_disk_that_starts_later_knows_why_a_sandbox_ended(hive: Hive, tmp_path: Path) -> None:
    sandbox = await hive.a.spawn(session="mine")
    await hive.a.sandboxes.destroy([sandbox])
    (tmp_path / "other").mkdir()
    later = assemble(
        tmp_path / "other", hive.backend, hive.runner, {}, store=hive.store, siblings=Member(hive.family, "c")
    )
    async with watched(later):
        await later.controller.start()
    with pytest.raises(SandboxGone, match="it was destroyed") as gone:
        later.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "mine")
    assert gone.value.data["reason"] == "destroyed"
    assert not (tmp_path / "ended").exists()


async def test_one_that_starts_on_a_store_just_emptied_gives_no_name_that_another_has_yet_to_put_back(
    hive: Hive, tmp_path: Path
) -> None:
    made = await hive.a.spawn()
    await hive.store.release_session(made.owner, made.scope, made.session, made.id)
    await hive.store.drop_route(made.id)
    later = assemble(tmp_path, hive.backend, hive.runner, {}, store=hive.store, siblings=Member(hive.family, "c"))
    async with watched(later):
        await later.controller.start()
        other = await later.spawn()
    assert other.session != made.session
    assert (await hive.store.places()).keys() == {made.id, other.id}


async def spawn_into(outcomes: list[str], world: World) -> None:
    """Spawn, and note `made` or whose limit was reached."""
    try:
        await world.spawn()
        outcomes.append("made")
    except CapacityExceeded as error:
        outcomes.append(str(error.data["limit"]))


async def test_spawns_at_once_through_two_replicas_do_not_pass_the_limit(tmp_path: Path) -> None:
    outcomes: list[str] = []
    async with open_two(tmp_path, limits={"sandboxes": 3}) as hive:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(spawn_into, outcomes, hive.a)
                group.start_soon(spawn_into, outcomes, hive.b)
        assert sorted(outcomes) == ["hive"] * 5 + ["made"] * 3


async def test_starts_at_once_through_two_replicas_do_not_pass_an_owners_limit(tmp_path: Path) -> None:
    outcomes: list[str] = []
    async with open_two(tmp_path, limits={"starting_per_owner": 2}) as hive:
        hive.a.runner.hold = anyio.Event()
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(spawn_into, outcomes, hive.a)
                    group.start_soon(spawn_into, outcomes, hive.b)
                while outcomes.count("owner") < 4:
                    await anyio.sleep(0.005)
                hive.a.runner.hold.set()
        assert sorted(outcomes) == ["made"] * 2 + ["owner"] * 4
        await hive.a.spawn()


async def test_a_place_that_a_killed_replica_took_for_nothing_is_given_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ash_hub.lifecycle.session_names._FREE_SECONDS", 0.0)
    async with open_two(tmp_path, limits={"sandboxes": 1}) as hive:
        never_made = SandboxId("sbx-never-made")
        hive.family.making["b"].add(never_made)
        await hive.store.reserve_session("you", DEFAULT_SCOPE, None, never_made)
        with pytest.raises(CapacityExceeded):
            await hive.a.spawn()
        hive.family.living.discard("b")
        await hive.a.spawn()


async def test_who_outlives_a_replica_puts_back_the_routes_by_which_the_seeds_gateway_finds_the_hive(
    hive: Hive, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = SpawnAsk.model_validate({"recipe": "test"})
    found = await hive.a.sandboxes.spawn(LOCAL, DEFAULT_SCOPE, ask, no_progress, alias="trainer-1")
    other = await hive.a.spawn()
    await hive.both(other)
    put: list[str] = []

    async def put_route(record: Mapping[str, Any]) -> None:
        put.append(record["sandbox_id"])

    monkeypatch.setattr(hive.store, "put_route", put_route)
    hive.family.living.discard("a")
    hive.b.controller.replica_left("a")
    await hive.b.look()
    assert put == [found.id]
