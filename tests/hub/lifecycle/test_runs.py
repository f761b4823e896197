"""Runs: who may hold one, when it ends with what is in it, and what comes too late."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from ash_hub.lifecycle.record import RECORD_VERSION, Record, UnreadableRecord
from ash_hub.lifecycle.sandbox import Sandbox
from ash_mcp.errors import CapacityExceeded, ConfigError, RunEnded, RunNotFound, RunTaken, SandboxGone
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Cause, EndReason, Principal, RunId, Scope, State, new_run_id
from ash_router.store.memory import MemoryStore
from tests.hub.lifecycle.test_replicas import open_two, settled
from tests.hub.world import LOCAL, MakeWorld, World

pytestmark = pytest.mark.anyio

OTHER = Principal("other")
LEASE = 30.0


class SetClock:
    """A store's clock that a test sets."""

    def __init__(self, store: MemoryStore) -> None:
        self.now = 5000.0
        store._clock = lambda: self.now  # pyright: ignore[reportPrivateUsage]


def pass_time(world: World, clock: SetClock, seconds: float) -> None:
    world.clock[0] += seconds
    clock.now += seconds


async def held(world: World, name: str = "train") -> Sandbox:
    """Open a run and spawn in it."""
    await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, name, LEASE)
    return await world.spawn(run=name)


async def test_a_run_that_is_not_renewed_ends_with_all_that_is_in_it(world: World) -> None:
    clock = SetClock(world.store)
    boxes, free = [await held(world), await world.spawn(run="train")], await world.spawn()
    pass_time(world, clock, LEASE - 1)
    await world.look()
    assert {box.state for box in boxes} == {State.READY}
    pass_time(world, clock, 1)
    await world.look()
    for box in boxes:
        await settled(box)
        assert (box.reason, box.cause) == (EndReason.RUN_ENDED, Cause.LIMIT)
        assert box.message == "whoever held its run did not renew the lease"
    assert free.state is State.READY
    assert [instance.id for instance in await world.backend.list()] == [free.id]
    with pytest.raises(SandboxGone, match="its run ended") as gone:
        world.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "sb1")
    assert gone.value.data["reason"] == "run_ended" and gone.value.data["cause"] == "limit"


async def test_a_run_that_is_renewed_goes_on(world: World) -> None:
    clock, box = SetClock(world.store), await held(world)
    for _ in range(4):
        pass_time(world, clock, LEASE - 1)
        await world.sandboxes.runs.renew(LOCAL, DEFAULT_SCOPE, "train")
        await world.look()
    assert box.state is State.READY
    (shown,) = await world.sandboxes.runs.list(LOCAL, DEFAULT_SCOPE)
    assert (shown.name, shown.lease_seconds, shown.left_seconds) == ("train", LEASE, LEASE)
    assert world.sandboxes.info(box).run == "train"


async def test_what_comes_late_to_an_ended_run_is_refused(world: World) -> None:
    clock = SetClock(world.store)
    opened = await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "train", LEASE)
    pass_time(world, clock, LEASE)
    for _ in range(2):
        with pytest.raises(RunEnded, match=r"its lease of 30 s was not renewed.*open another") as late:
            await world.spawn(run=opened.id)
        assert late.value.data == {"run": "train", "run_id": opened.id, "reason": "run_ended"}
        with pytest.raises(RunEnded):
            await world.sandboxes.runs.renew(LOCAL, DEFAULT_SCOPE, "train", opened.id, LEASE)
    with pytest.raises(RunNotFound):
        await world.spawn(run="train")
    assert await world.backend.list() == [] and await world.store.places() == {}


async def test_a_run_that_ends_between_the_look_and_the_place_gets_no_sandbox(world: World) -> None:
    opened = await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "train", LEASE)
    find = world.sandboxes.runs.find

    async def found(principal: Principal, scope: Scope, name: str):
        run = await find(principal, scope, name)
        await world.store.end_run(run.id)
        return run

    world.sandboxes.runs.find = found
    with pytest.raises(RunEnded):
        await world.spawn(run=opened.id, idempotency_key="k")
    assert await world.backend.list() == [] and await world.store.places() == {}


async def test_a_start_is_broken_off_when_its_run_ends(world: World) -> None:
    world.runner.hold = anyio.Event()
    await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "train", LEASE)
    failed: list[Exception] = []

    async def spawn() -> None:
        try:
            await world.spawn(run="train")
        except SandboxGone as error:
            failed.append(error)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(spawn)
            await world.runner.asked.wait()
            await world.sandboxes.destroy_run(LOCAL, DEFAULT_SCOPE, "train")
    assert len(failed) == 1 and await world.backend.list() == []


async def test_destroying_a_run_ends_its_own_and_is_its_owners_doing(world: World) -> None:
    box, free = await held(world), await world.spawn()
    assert await world.sandboxes.destroy_run(LOCAL, DEFAULT_SCOPE, "train") == [box]
    assert (box.reason, box.cause) == (EndReason.DESTROYED, Cause.AGENT) and free.state is State.READY
    again = await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "train", LEASE)
    assert box.record.run is not None and again.id != box.record.run.id
    with pytest.raises(RunEnded, match="it was destroyed"):
        await world.spawn(run=box.record.run.id)


async def test_nobody_else_sees_renews_or_ends_a_run(world: World) -> None:
    box = await held(world)
    assert box.record.run is not None
    runs = world.sandboxes.runs
    for name in ("train", box.record.run.id):
        with pytest.raises(RunNotFound):
            await runs.renew(OTHER, DEFAULT_SCOPE, name)
        with pytest.raises(RunNotFound):
            await world.sandboxes.destroy_run(OTHER, DEFAULT_SCOPE, name)
        with pytest.raises(RunNotFound):
            await world.spawn(owner=OTHER, run=name)
    with pytest.raises(RunNotFound):
        await runs.renew(OTHER, DEFAULT_SCOPE, "train", box.record.run.id, LEASE)
    assert await runs.list(OTHER, EVERY_SCOPE) == [] == await runs.list(LOCAL, Scope("x"))
    assert await runs.list(Principal("local", bound_scopes=frozenset({"x"})), EVERY_SCOPE) == []
    assert len(await runs.list(LOCAL, EVERY_SCOPE)) == 1
    await runs.open(OTHER, DEFAULT_SCOPE, "train", LEASE)  # a name is of each owner's own
    await runs.open(LOCAL, Scope("x"), "train", LEASE)
    assert (await runs.find(LOCAL, EVERY_SCOPE, "train")).scope == DEFAULT_SCOPE
    assert box.state is State.READY


async def test_a_run_is_of_one_scope(world: World) -> None:
    opened = await world.sandboxes.runs.open(LOCAL, Scope("x"), "train", LEASE)
    for scope in (DEFAULT_SCOPE, EVERY_SCOPE):  # which spawns in the default one
        with pytest.raises(RunNotFound):
            await world.spawn(scope, run=opened.id)
    assert (await world.spawn(Scope("x"), run=opened.id)).state is State.READY


async def test_names_and_ids_that_cannot_be_are_refused(world: World) -> None:
    for name in ("", "a b", "-a", "x" * 65, new_run_id()):
        with pytest.raises(ConfigError, match="cannot be a run's name"):
            await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, name, LEASE)
    with pytest.raises(ConfigError, match="no run's id"):
        await world.sandboxes.runs.renew(LOCAL, DEFAULT_SCOPE, "train", RunId("train"), LEASE)


async def test_open_runs_are_bounded(make_world: MakeWorld) -> None:
    world = await make_world(limits={"runs_per_owner": 1})
    await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "a", LEASE)
    with pytest.raises(RunTaken, match="ends in 30 s unless it is renewed"):
        await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "a", LEASE)
    with pytest.raises(CapacityExceeded, match="ASH_HUB_LIMITS__RUNS_PER_OWNER") as full:
        await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "b", LEASE)
    assert full.value.data["limit"] == "owner"


async def test_the_next_hive_knows_a_run_by_its_sandboxes_and_gives_it_its_lease_anew(make_world: MakeWorld) -> None:
    before = await make_world()
    made = await held(before)
    after = await make_world()  # with an empty store
    clock = SetClock(after.store)
    await after.controller.start()
    box = after.sandboxes.registry.by_id(made.id)
    assert box is not None and box.state is State.READY
    assert made.record.run is not None
    assert (await after.sandboxes.runs.find(LOCAL, DEFAULT_SCOPE, "train")).id == made.record.run.id
    pass_time(after, clock, LEASE - 1)
    await after.look()
    assert box.state is State.READY
    pass_time(after, clock, 1)
    await after.look()
    await settled(box)
    assert box.reason is EndReason.RUN_ENDED


async def test_a_run_that_the_store_has_lost_ends_nothing(world: World) -> None:
    clock, box = SetClock(world.store), await held(world)
    assert box.record.run is not None
    world.store._open_runs.clear()  # pyright: ignore[reportPrivateUsage]
    pass_time(world, clock, 2 * LEASE)
    await world.look()
    assert box.state is State.READY
    judged = await world.store.judge_runs([box.record.run.id], quiet_seconds=1e9)
    assert judged[box.record.run.id].left_seconds == LEASE


async def test_a_renewal_puts_back_what_the_store_has_lost(world: World) -> None:
    opened = await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "train", LEASE)
    world.store._open_runs.clear()  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(RunNotFound):
        await world.spawn(run=opened.id)
    again = await world.sandboxes.runs.renew(LOCAL, DEFAULT_SCOPE, "train", opened.id, LEASE)
    assert again.id == opened.id
    assert (await world.spawn(run=opened.id)).state is State.READY


async def test_a_resync_ends_a_run_without_sandboxes(world: World) -> None:
    clock = SetClock(world.store)
    await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "train", LEASE)
    pass_time(world, clock, LEASE)
    await world.controller.resync()
    assert await world.store.runs() == []


async def test_two_replicas_hold_and_end_one_run(tmp_path: Path) -> None:
    async with open_two(tmp_path) as hive:
        clock, a, b = SetClock(hive.store), hive.a, hive.b
        made = await held(a)
        seen = await hive.both(made)
        for world in (a, b):  # one renews, the other has heard of it no later than when it looks
            world.clock[0] += LEASE - 1
        clock.now += LEASE - 1
        await b.sandboxes.runs.renew(LOCAL, DEFAULT_SCOPE, "train")
        for world in (a, b):
            world.clock[0] += LEASE - 1
        clock.now += LEASE - 1
        await a.look()
        await b.look()
        assert made.state is seen.state is State.READY
        late = await b.spawn(run="train")
        assert await a.sandboxes.destroy_run(LOCAL, DEFAULT_SCOPE, "train")
        for box in (made, seen, late):
            await settled(box)
            assert (box.reason, box.cause) == (EndReason.DESTROYED, Cause.AGENT)
        with pytest.raises(RunNotFound):
            await b.spawn(run="train")


async def test_a_start_on_one_replica_ends_with_a_run_that_another_ends(tmp_path: Path) -> None:
    async with open_two(tmp_path) as hive:
        hive.runner.hold = anyio.Event()
        opened = await hive.a.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "train", LEASE)

        async def spawn() -> None:
            with pytest.raises(SandboxGone):
                await hive.a.spawn(run=opened.id)

        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                group.start_soon(spawn)
                await hive.runner.asked.wait()
                await hive.b.sandboxes.destroy_run(LOCAL, DEFAULT_SCOPE, opened.id)
        assert await hive.backend.list() == []


async def test_a_record_says_its_run_and_without_one_is_of_the_version_before(world: World) -> None:
    box, free = await held(world), await world.spawn()
    shape = box.record.to_json()
    assert shape["version"] == RECORD_VERSION and Record.from_json(shape) == box.record
    plain = free.record.to_json()
    assert plain["version"] == RECORD_VERSION - 1 and {"run", "shares"}.isdisjoint(plain)
    assert Record.from_json(plain) == free.record
    for broken in ({**shape, "run": "train"}, {**shape, "version": RECORD_VERSION + 1}):
        with pytest.raises(UnreadableRecord):
            Record.from_json(broken)
