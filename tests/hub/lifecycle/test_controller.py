"""What the controller makes of news that are missing, steps that are slow, and records that change all the time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import anyio
import pytest

from ash_hub.backends.base import BackendEvent, Instance, Phase
from ash_mcp.errors import Conflict, ConnectFailed, HiveFault, StartFailed
from ash_mcp.types import DEFAULT_SCOPE, EndReason, SandboxId, SandboxSpec, SessionName, State
from tests.hub.world import LOCAL, MakeWorld, World

pytestmark = pytest.mark.anyio


async def test_a_sandbox_that_the_backend_finds_again_is_shown_again(world: World) -> None:
    lost = await world.spawn(idempotency_key="k")
    (instance,) = await world.backend.list()
    world.backend._instances.clear()  # pyright: ignore[reportPrivateUsage]
    await world.look()
    assert lost.reason is EndReason.LOST
    world.backend._instances[lost.id] = instance  # pyright: ignore[reportPrivateUsage]
    await world.look()
    found = world.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "sb1")
    assert found.id == lost.id and (await world.spawn(idempotency_key="k")) is found
    assert world.routes.resolve(LOCAL, DEFAULT_SCOPE, "sb1") is not None


async def test_a_spawn_that_nobody_was_shown_frees_its_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: Any) -> None:
        raise ConnectFailed("the store is away")

    monkeypatch.setattr("ash_hub.lifecycle.sandboxes.SHOWN_SECONDS", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(world.routes, "bind", away)
        with pytest.raises(ConnectFailed, match="nobody could find it"):
            await world.spawn(idempotency_key="k")
    assert await world.backend.list() == []
    assert (await world.spawn(idempotency_key="k")).state is State.READY


async def test_a_defect_in_a_step_is_not_taken_for_a_store_that_is_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("ash_hub.lifecycle.sandboxes.SHOWN_SECONDS", 0.05)
    sandbox = await world.spawn()
    monkeypatch.setattr(world.routes, "bind", broken)
    with pytest.raises(HiveFault, match="the hive itself failed"):
        await world.spawn()
    with pytest.raises(HiveFault):
        await world.controller.restore()
    monkeypatch.undo()
    await world.controller.restore()
    assert world.routes.get(sandbox.id) is not None


async def test_a_hive_that_stops_while_a_spawn_takes_its_name_makes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = world.store.reserve_session

    async def stop_meanwhile(*args: Any, **options: Any) -> SessionName:
        name = await reserve(*args, **options)
        await world.sandboxes.stop(keep=False)
        return name

    monkeypatch.setattr(world.store, "reserve_session", stop_meanwhile)
    with pytest.raises(StartFailed, match="stopping"):
        await world.spawn(idempotency_key="k")
    assert await world.store.places() == {} and await world.backend.list() == []


async def test_a_start_hears_what_a_lost_event_would_have_said(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = (await make_world()).backend
    create = backend.create

    async def scheduled(spec: SandboxSpec) -> Instance:
        return replace(await create(spec), phase=Phase.STARTING, endpoint=None)

    async def losing() -> AsyncIterator[BackendEvent]:
        while True:
            await anyio.sleep(0.05)
            yield BackendEvent(None, lost=True)

    monkeypatch.setattr(backend, "create", scheduled)
    monkeypatch.setattr(backend, "watch", losing)
    world = await make_world()
    with anyio.fail_after(5):
        assert (await world.spawn()).state is State.READY


async def test_a_backend_whose_news_break_off_is_followed_again(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = (await make_world()).backend
    watch = backend.watch
    followed = anyio.Event()

    async def broken() -> AsyncIterator[BackendEvent]:
        monkeypatch.setattr(backend, "watch", again)
        raise RuntimeError("its stream broke")
        yield

    def again() -> AsyncIterator[BackendEvent]:
        followed.set()
        return watch()

    monkeypatch.setattr("ash_hub.lifecycle.controller.FOLLOW_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(backend, "watch", broken)
    world = await make_world()
    box = await world.spawn()
    with anyio.fail_after(5):
        await followed.wait()
        backend.die(box.id)
        await box.ended.wait()


async def test_a_record_that_changes_all_the_time_is_no_sandbox_that_is_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await world.spawn()

    async def changed(*_: Any, **__: Any) -> None:
        raise Conflict("another replica was first")

    monkeypatch.setattr("ash_hub.lifecycle.controller.CHANGE_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(world.backend, "annotate", changed)
    with pytest.raises(ConnectFailed, match="all the time"):
        await world.sandboxes.extend(LOCAL, DEFAULT_SCOPE, box.session, 60)
    with pytest.raises(ConnectFailed, match="all the time"):
        await world.sandboxes.destroy([box])
    assert box.state is State.READY


async def test_the_ended_that_are_remembered_have_a_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash_hub.lifecycle.steps.MOST_ENDED", 3)
    living = await world.spawn()
    for key in range(5):
        await world.sandboxes.destroy([await world.spawn(idempotency_key=f"k{key}")])
    await world.look()
    ended = [box for box in world.sandboxes.registry.all() if box is not living]
    assert [box.key for box in ended] == ["k2", "k3", "k4"]
    assert (await world.spawn(idempotency_key="k0")).state is State.READY


async def test_a_start_that_may_still_appear_is_remembered_over_the_number(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ash_hub.lifecycle.steps.MOST_ENDED", 1)
    world.backend.fail_next()
    with pytest.raises(StartFailed):
        await world.spawn()
    (failed,) = world.sandboxes.registry.all()
    for _ in range(2):
        await world.sandboxes.destroy([await world.spawn()])
    await world.look()
    assert world.sandboxes.registry.by_id(failed.id) is failed
    late = Instance(id=failed.id, phase=Phase.RUNNING, record=failed.record.to_json())
    world.backend._record(late)  # pyright: ignore[reportPrivateUsage]
    await world.look()
    assert await world.backend.list() == []


async def test_slow_deletes_hold_up_no_spawn(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [await world.spawn() for _ in range(40)]
    slow, deleting = anyio.Event(), set[SandboxId]()
    delete = world.backend.delete

    async def wait(sandbox_id: SandboxId, *, grace_seconds: float = 2.0) -> None:
        deleting.add(sandbox_id)
        await slow.wait()
        await delete(sandbox_id, grace_seconds=grace_seconds)

    monkeypatch.setattr(world.backend, "delete", wait)
    async with anyio.create_task_group() as group:
        group.start_soon(world.sandboxes.destroy, boxes)
        with anyio.fail_after(3):
            while len(deleting) < len(boxes):
                await anyio.sleep(0.005)
            assert (await world.spawn()).state is State.READY
        slow.set()


async def test_a_route_that_could_not_be_dropped_is_dropped_in_the_next_try(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await world.spawn()

    async def fail_once(sandbox_id: SandboxId, alias: str | None) -> None:
        monkeypatch.undo()
        raise RuntimeError("a bug in a step")

    monkeypatch.setattr(world.store, "drop_route", fail_once)
    await world.sandboxes.destroy([box])
    assert await world.store.routes() == []
    assert world.changed == [("local", DEFAULT_SCOPE)] * 2 and world.gone == [box.id]


async def test_an_end_is_recorded_only_on_the_record_that_it_was_decided_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await world.spawn(ttl_seconds=5)
    get, annotate = world.backend.get, world.backend.annotate

    async def extended_meanwhile(sandbox_id: SandboxId) -> Instance | None:
        seen = await get(sandbox_id)
        assert seen is not None
        monkeypatch.undo()
        await annotate(sandbox_id, replace(box.record, expires_at=5000.0).to_json(), revision=seen.revision)
        return seen

    world.clock[0] += 6
    monkeypatch.setattr(world.backend, "get", extended_meanwhile)
    await world.look()
    assert box.state is State.READY and box.record.expires_at == 5000.0
