"""Snapshots over the memory backend: whose they are, what they keep, and what becomes of calls."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from ash_hub.face.arguments import SpawnAsk
from ash_hub.lifecycle.kept_snapshots import KeptSnapshot
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.snapshots import SnapshotVerbs
from ash_hub.spawning.recipes import Recipe
from ash_mcp.errors import (
    AshError,
    CapacityExceeded,
    ConfigError,
    Conflict,
    RunEnded,
    SandboxReset,
    SnapshotNotFound,
    StartFailed,
    Unsupported,
)
from ash_mcp.types import DEFAULT_SCOPE, Cause, EndReason, Principal, Scope, State
from tests.hub.world import LOCAL, MakeWorld, World, no_progress

pytestmark = pytest.mark.anyio

BOB = Principal("bob")
INLINE = {"name": "own", "description": "Mine.", "server": {"python": "a:b"}}


def verbs(world: World) -> SnapshotVerbs:
    parts: Any = world.sandboxes._parts  # pyright: ignore[reportPrivateUsage]
    return SnapshotVerbs(parts, world.controller, world.sandboxes)


async def take(world: World, box: Sandbox, *, owner: Principal = LOCAL, **more: Any) -> KeptSnapshot:
    given: dict[str, Any] = {"ttl_seconds": None, "env": {}, "secrets": {}, **more}
    return (await verbs(world).take(owner, DEFAULT_SCOPE, box.session, **given))[1]


async def reset(world: World, box: Sandbox, snapshot: str, *, owner: Principal = LOCAL, **more: Any) -> None:
    given: dict[str, Any] = {"env": {}, "secrets": {}, **more}
    await verbs(world).reset(owner, DEFAULT_SCOPE, box.session, snapshot, **given)


async def listed(world: World, owner: Principal = LOCAL, scope: Scope = DEFAULT_SCOPE) -> list[str]:
    return [it.id for it in await verbs(world).kept.list(owner, scope, now=world.clock[0])]


async def test_what_is_frozen_or_reset_stays_the_same_sandbox_and_is_claimed_again(world: World) -> None:
    box = await world.spawn(env={"A": "1"})
    before = (box.record, world.routes.get(box.id), box.state)
    taken = await take(world, box, env={"A": "2"}, secrets={"S": "s"})
    await reset(world, box, taken.id, env={"A": "3"})
    await world.look()
    assert (box.record, world.routes.get(box.id), box.state) == before
    claims = [{"env": {"A": "1"}, "secrets": {}}, {"env": {"A": "2"}, "secrets": {"S": "s"}}]
    assert world.runner.claims == [*claims, {"env": {"A": "3"}, "secrets": {}}]
    assert world.backend.stands_on[box.id] == taken.id
    info = taken.info
    assert (info.recipe, info.session, info.sandbox_id) == ("test", box.session, box.id)
    assert (info.created_at, round(info.expires_at)) == (1000.0, 4600)


async def test_siblings_have_the_tools_that_were_pinned_and_are_not_asked(world: World) -> None:
    box = await world.spawn()
    taken = await take(world, box)
    world.runner.tools = [{"name": "evil", "inputSchema": {"type": "object"}}]
    asked = SpawnAsk.model_validate({"snapshot": taken.id})
    sibling = await world.sandboxes.spawn(LOCAL, DEFAULT_SCOPE, asked, no_progress)
    assert sibling.toolset is not None and [tool.name for tool in sibling.toolset.tools] == ["run"]
    assert sibling.record.toolset == box.record.toolset and sibling.recipe == "test"
    assert world.runner.specs[-1].snapshot == taken.id


async def test_a_snapshot_is_of_one_recipe(make_world: MakeWorld) -> None:
    world = await make_world(allow_inline_recipes=True)
    box, own = await world.spawn(), await world.spawn(recipe=INLINE)
    taken, inline = await take(world, box), await take(world, own)
    with pytest.raises(Conflict, match="is of recipe test"):
        await world.spawn(recipe=INLINE, snapshot=taken.id)
    changed = Recipe.model_validate({**INLINE, "server": {"python": "a:c"}})
    with pytest.raises(Conflict, match="or has changed since"):
        await world.spawn(recipe=changed, snapshot=inline.id)
    assert (await world.spawn(recipe=INLINE, snapshot=inline.id)).recipe == "own"
    with pytest.raises(Conflict, match="spawn a new one from it"):
        await reset(world, box, inline.id)
    assert world.backend.stands_on[box.id] == taken.id


async def test_others_do_not_learn_that_there_is_one(world: World) -> None:
    box, theirs = await world.spawn(), await world.spawn(owner=BOB)
    taken = await take(world, box)
    assert await listed(world, BOB) == [] and await listed(world) == [taken.id]
    assert await listed(world, scope=Scope("other")) == []
    unknown: list[str] = []
    for name in (taken.id, "snap-none"):
        for step in (
            lambda name=name: reset(world, theirs, name, owner=BOB),
            lambda name=name: world.spawn(owner=BOB, snapshot=name),
        ):
            with pytest.raises(SnapshotNotFound) as refusal:
                await step()
            unknown.append(str(refusal.value).replace(name, "X"))
    assert len(set(unknown)) == 1
    assert await verbs(world).kept.remove(BOB, DEFAULT_SCOPE, [taken.id], now=0) == []
    assert await verbs(world).kept.remove(LOCAL, DEFAULT_SCOPE, [taken.id, "snap-none"], now=0) == [taken.id]
    assert await listed(world) == []


async def test_limits_are_the_hives_and_the_owners(make_world: MakeWorld) -> None:
    world = await make_world(limits={"snapshots": 3, "snapshots_per_owner": 2}, max_ttl_seconds=100.0)
    box, theirs = await world.spawn(ttl_seconds=50), await world.spawn(owner=BOB, ttl_seconds=50)
    with pytest.raises(ConfigError, match="at most 100"):
        await take(world, box, ttl_seconds=101)
    for _ in range(2):
        await take(world, box, ttl_seconds=60)
    with pytest.raises(CapacityExceeded) as refusal:
        await take(world, box, ttl_seconds=60)
    assert not refusal.value.retryable
    await take(world, theirs, owner=BOB, ttl_seconds=60)
    with pytest.raises(CapacityExceeded):
        await take(world, theirs, owner=BOB, ttl_seconds=60)
    assert box.state is theirs.state is State.READY


async def test_calls_in_flight_fail_as_typed_and_new_ones_until_it_is_over(world: World) -> None:
    box = await world.spawn()
    taken = await take(world, box)
    failed: list[AshError] = []
    call = world.ledger.begin(box.id, "local", failed.append)
    world.runner.hold, world.runner.asked = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(reset, world, box, taken.id)
        with anyio.fail_after(5):
            await world.runner.asked.wait()
        refusal = world.ledger.refusal(box.id)
        assert isinstance(refusal, CapacityExceeded) and refusal.retryable
        world.runner.hold.set()
    assert isinstance(failed[0], SandboxReset) and not failed[0].retryable and not failed[0].trainable
    world.ledger.end(call)
    assert world.ledger.refusal(box.id) is None
    assert world.gone.count(box.id) >= 2, "connections to what has ended are closed"


async def test_what_does_not_come_up_again_ends_by_the_hives_fault(world: World) -> None:
    box = await world.spawn()
    taken = await take(world, box)
    world.runner.health_status = 500
    with pytest.raises(StartFailed, match="its server has no tools"):
        await reset(world, box, taken.id)
    with anyio.fail_after(5):
        await box.ended.wait()
    assert (box.state, box.reason, box.cause) == (State.FAILED, EndReason.START_FAILED, Cause.HIVE)
    assert await listed(world) == [taken.id]
    world.runner.health_status = 200
    other = await world.spawn()
    world.runner.health_status = 500
    with pytest.raises(StartFailed):
        await take(world, other)
    assert await listed(world) == [taken.id], "one whose sandbox has ended for it is not kept"


async def test_a_caller_that_leaves_does_not_leave_it_half_way(world: World) -> None:
    box = await world.spawn()
    taken = await take(world, box)
    world.runner.hold, world.runner.asked = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(reset, world, box, taken.id)
        with anyio.fail_after(5):
            await world.runner.asked.wait()
        group.cancel_scope.cancel()
        world.runner.hold.set()
    assert len(world.runner.claims) == 3 and box.state is State.READY


async def test_snapshots_end_with_their_run(world: World) -> None:
    run = await world.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, "r", 60.0)
    box, alone = await world.spawn(run="r"), await world.spawn()
    of_run, own = await take(world, box), await take(world, alone)
    assert of_run.info.run == "r" and own.info.run is None
    assert await verbs(world).kept.remove_of_ended_runs() is True
    assert await listed(world) == [of_run.id, own.id]
    await world.sandboxes.destroy_run(LOCAL, DEFAULT_SCOPE, run.id)
    assert await verbs(world).kept.remove_of_ended_runs() is False
    assert await listed(world) == [own.id]
    with pytest.raises(RunEnded):
        await world.spawn(run=run.id, snapshot=own.id)


async def test_the_tools_of_a_snapshot_are_kept_with_it(world: World) -> None:
    box = await world.spawn()
    taken = await take(world, box)
    await world.sandboxes.destroy([box])
    shelf = world.sandboxes._parts.shelf  # pyright: ignore[reportPrivateUsage]
    for _ in range(2):
        world.clock[0] += 4000
        await shelf.prune()
    assert (await world.spawn(snapshot=taken.id)).toolset is not None


async def test_a_backend_without_them_says_what_to_do(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    box = await world.spawn()
    monkeypatch.setattr(world.backend, "no_snapshots", lambda: "it is a twin")
    with pytest.raises(Unsupported, match="it is a twin"):
        await take(world, box)
    with pytest.raises(Unsupported):
        await world.spawn(snapshot="snap-x")
