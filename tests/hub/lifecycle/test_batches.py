"""Spawns of several: each its own outcome, one bound, one news, and nothing twice."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from ash_hub.lifecycle.batches import Batch, spawn_batch
from ash_hub.spawning.spawn_request import SpawnAsk
from ash_mcp.errors import AshTimeout, CapacityExceeded, ConfigError, RunEnded
from ash_mcp.types import DEFAULT_SCOPE, Principal, PrincipalLimits, State
from tests.hub.world import LOCAL, MakeWorld, World, no_progress

pytestmark = pytest.mark.anyio


async def spawn(world: World, count: int, *, owner: Principal = LOCAL, **given: Any) -> Batch:
    more = {name: given.pop(name) for name in ("at_once", "deadline_seconds") if name in given}
    ask = SpawnAsk.model_validate({"recipe": "test", **given})
    return await spawn_batch(world.sandboxes, owner, DEFAULT_SCOPE, ask, count, no_progress, **more)


async def test_all_are_made_and_callers_hear_of_it_once(world: World) -> None:
    batch = await spawn(world, 5)
    assert sorted(box.session for box in batch.sandboxes) == ["sb1", "sb2", "sb3", "sb4", "sb5"]
    assert {box.state for box in batch.sandboxes} == {State.READY} and not batch.failed
    assert world.changed == [("local", DEFAULT_SCOPE)]
    await world.sandboxes.destroy(batch.sandboxes[:1])
    assert len(world.changed) == 2, "their ends are told as those of any other"


async def test_what_finds_no_room_fails_and_the_rest_is_made(make_world: MakeWorld) -> None:
    world = await make_world(limits={"sandboxes": 4, "sandboxes_per_owner": 4})
    await world.spawn()
    batch = await spawn(world, 4)
    assert len(batch.made) == 3 and len(batch.failed) == 1
    (refused,) = batch.failed.values()
    assert isinstance(refused, CapacityExceeded) and refused.retryable and refused.data["limit"] == "owner"


@pytest.mark.parametrize(
    ("owner", "limit"),
    [(Principal("you", limits=PrincipalLimits(sandboxes=2)), "key"), (Principal("you"), "owner"), (LOCAL, "hive")],
)
async def test_more_than_may_ever_be_is_refused_as_a_whole(
    make_world: MakeWorld, owner: Principal, limit: str
) -> None:
    world = await make_world(limits={"sandboxes": 8})
    with pytest.raises(CapacityExceeded, match="nothing was made") as refused:
        await spawn(world, 9, owner=owner)
    assert refused.value.data["limit"] == limit and not refused.value.retryable
    assert await world.backend.list() == []


async def test_a_count_over_the_hives_bound_and_a_name_for_several_are_refused(make_world: MakeWorld) -> None:
    world = await make_world(limits={"spawn_count": 3})
    with pytest.raises(ConfigError, match="at most 3 on this hive"):
        await spawn(world, 4)
    with pytest.raises(ConfigError, match="one sandbox's"):
        await spawn(world, 2, session="mine")
    assert (await spawn(world, 1, session="mine")).sandboxes[0].session == "mine"


async def test_no_more_are_begun_at_once_than_was_asked(world: World) -> None:
    world.runner.hold = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: spawn(world, 4, at_once=1))
        with anyio.fail_after(5):
            await world.runner.asked.wait()
        assert len(world.sandboxes.registry.living()) == 1
        world.runner.hold.set()
    assert len(world.sandboxes.registry.living()) == 4


async def test_a_key_with_few_starts_gets_all_one_after_the_other(world: World) -> None:
    owner = Principal("you", limits=PrincipalLimits(starting=1))
    assert len((await spawn(world, 3, owner=owner)).made) == 3


async def test_what_is_not_ready_at_the_deadline_is_given_up(world: World) -> None:
    world.runner.hold = anyio.Event()
    with anyio.fail_after(5):
        batch = await spawn(world, 3, deadline_seconds=0.1)
    assert not batch.made and {type(error) for error in batch.failed.values()} == {AshTimeout}
    assert all(error.retryable for error in batch.failed.values())
    assert await world.backend.list() == [] and world.changed == []


async def test_the_same_spawn_again_makes_no_more(world: World) -> None:
    first = await spawn(world, 3, idempotency_key="k")
    again = await spawn(world, 3, idempotency_key="k")
    assert [box.id for box in again.sandboxes] == [box.id for box in first.sandboxes]
    more = await spawn(world, 4, idempotency_key="k")
    assert len(await world.backend.list()) == 4 and len(more.made) == 4


async def leave(world: World, **ask: Any) -> None:
    """Spawn three, one after the other, and leave when the first is ready."""
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: spawn(world, 3, at_once=1, **ask))
            while not [box for box in world.sandboxes.registry.living() if box.state is State.READY]:
                await anyio.sleep(0.001)
            world.runner.hold = anyio.Event()
            group.cancel_scope.cancel()
    world.runner.hold = None


async def test_a_caller_that_leaves_loses_what_was_made(world: World) -> None:
    await leave(world)
    assert await world.backend.list() == [] and world.sandboxes.registry.living() == []


async def test_with_a_key_it_stays_for_the_repetition(world: World) -> None:
    await leave(world, idempotency_key="k")
    kept = {box.id for box in world.sandboxes.registry.living()}
    assert kept
    batch = await spawn(world, 3, idempotency_key="k")
    assert len(batch.made) == 3 and kept <= {box.id for box in batch.sandboxes}
    assert len(await world.backend.list()) == 3


async def test_several_are_made_in_a_run_and_refused_after_its_end(world: World) -> None:
    opened = await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "train", 30.0)
    batch = await spawn(world, 2, run="train")
    assert {box.record.run.id for box in batch.sandboxes if box.record.run} == {opened.id}
    assert len(await world.sandboxes.destroy_run(LOCAL, DEFAULT_SCOPE, "train")) == 2
    late = await spawn(world, 2, run=opened.id)
    assert not late.made and {type(error) for error in late.failed.values()} == {RunEnded}
