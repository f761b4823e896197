"""Spawn, extend, destroy, expiry, death and adoption, over the memory backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import pytest

from ash_hub.backends.base import Instance, Phase
from ash_hub.lifecycle.controller import RESYNC_SECONDS
from ash_hub.lifecycle.sandbox import Sandbox
from ash_mcp.errors import (
    AshError,
    CapacityExceeded,
    ConfigError,
    ConnectFailed,
    RecipeNotFound,
    SandboxGone,
    SandboxNotFound,
    SessionTaken,
    StartFailed,
)
from ash_mcp.types import (
    DEFAULT_SCOPE,
    EVERY_SCOPE,
    Cause,
    EndReason,
    Principal,
    PrincipalLimits,
    SandboxId,
    SandboxSpec,
    Scope,
    SessionName,
    State,
)
from tests.hub.world import LOCAL, MakeWorld, World

pytestmark = pytest.mark.anyio


async def nothing_is_left(world: World) -> None:
    assert await world.backend.list() == []
    assert len(world.routes) == 0
    assert world.sandboxes.registry.living() == []


async def test_a_spawned_sandbox_is_ready_routed_and_claimed(world: World) -> None:
    sandbox = await world.spawn(env={"A": "1"}, secrets={"B": "2"}, labels={"run": "7"})
    assert (sandbox.session, sandbox.state) == ("sb1", State.READY)
    assert world.runner.claims == [{"env": {"A": "1"}, "secrets": {"B": "2"}}]
    route = world.routes.resolve(LOCAL, DEFAULT_SCOPE, "sb1")
    assert route is not None and route.sandbox_id == sandbox.id
    assert world.routes.resolve(LOCAL, DEFAULT_SCOPE, sandbox.id) is route
    assert world.changed == [("local", DEFAULT_SCOPE)]
    (instance,) = await world.backend.list()
    assert "2" not in str(instance.record.get("secrets", "")) and "secrets" not in instance.record


async def test_names_count_up_and_are_not_given_twice(world: World) -> None:
    first = await world.spawn()
    await world.sandboxes.destroy([first])
    assert (await world.spawn()).session == "sb2"


async def test_a_chosen_name_is_kept_and_refused_while_taken(world: World) -> None:
    mine = await world.spawn(session="mine")
    with pytest.raises(SessionTaken):
        await world.spawn(session="mine")
    await world.sandboxes.destroy([mine])
    assert (await world.spawn(session="mine")).session == "mine"


@pytest.mark.parametrize("name", ["Mine", "1a", "a-b", "a_b", "a" * 17, "spawn", "call", "ash", "käse"])
async def test_an_illegal_name_is_refused_before_anything_is_made(world: World, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a session name"):
        await world.spawn(session=name)
    await nothing_is_left(world)


async def test_an_unknown_recipe_lists_those_that_there_are(world: World) -> None:
    with pytest.raises(RecipeNotFound, match="there are: test"):
        await world.spawn(recipe="nope")


async def test_an_inline_recipe_needs_the_operators_leave(make_world: MakeWorld) -> None:
    inline = {"name": "own", "description": "x", "server": {"stdio": {"command": ["x"]}}, "folder": "/etc"}
    with pytest.raises(ConfigError, match="ASH_HUB_ALLOW_INLINE_RECIPES"):
        await (await make_world()).spawn(recipe=inline)
    assert (await (await make_world(allow_inline_recipes=True)).spawn(recipe=inline)).recipe == "own"


async def test_a_start_that_the_backend_refuses_leaves_nothing_and_says_the_step(world: World) -> None:
    world.backend.fail_next()
    with pytest.raises(StartFailed, match=r"step .*the last line|told to fail") as caught:
        await world.spawn(session="mine", idempotency_key="k")
    assert caught.value.data["step"]
    await nothing_is_left(world)
    assert (await world.spawn(session="mine", idempotency_key="k")).session == "mine"


@pytest.mark.parametrize(("broken", "step"), [("health_status", "start"), ("claim_status", "claim")])
async def test_a_runner_that_refuses_leaves_nothing_and_says_the_step(world: World, broken: str, step: str) -> None:
    setattr(world.runner, broken, 500)
    with pytest.raises(StartFailed) as caught:
        await world.spawn()
    assert caught.value.data["step"] == step
    await nothing_is_left(world)
    (ended,) = world.sandboxes.registry.of(LOCAL, DEFAULT_SCOPE, ended=True)
    assert ended.reason is EndReason.START_FAILED


async def test_a_caller_who_leaves_leaves_nothing_behind(world: World) -> None:
    world.runner.hold = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(world.spawn)
        await world.runner.asked.wait()
        group.cancel_scope.cancel()
    await nothing_is_left(world)


@pytest.mark.parametrize(("cause", "told"), [(Cause.AGENT, Cause.HIVE), (Cause.LIMIT, Cause.LIMIT)])
async def test_a_process_that_dies_during_the_start_fails_it_with_its_reason(
    world: World, cause: Cause, told: Cause
) -> None:
    world.runner.hold = anyio.Event()

    async def kill() -> None:
        await world.runner.asked.wait()
        (instance,) = await world.backend.list()
        world.backend.die(instance.id, "killed by signal 9", cause)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(kill)
            with pytest.raises(StartFailed, match="killed by signal 9") as failed:
                await world.spawn()
            assert failed.value.data["cause"] == told
    assert [it.cause for it in world.sandboxes.registry.all()] == [told]
    await anyio.wait_all_tasks_blocked()  # what is dead is removed after its caller was told
    await nothing_is_left(world)


async def test_a_start_that_still_waits_for_its_host_at_its_end_is_the_hosts_failure(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world(recipe={"start_timeout_seconds": 0.1})

    async def create(spec: SandboxSpec) -> Instance:
        waiting = Instance(id=spec.id, phase=Phase.STARTING, waits_for="no node takes it", record=spec.record)
        return world.backend._record(waiting)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(world.backend, "create", create)
    with pytest.raises(StartFailed, match=r"did not run within 0\.1 s: no node takes it") as failed:
        await world.spawn()
    assert failed.value.data["cause"] == Cause.HOST
    (ended,) = world.sandboxes.registry.all()
    assert (ended.reason, ended.cause) == (EndReason.START_FAILED, Cause.HOST)
    await nothing_is_left(world)


async def test_the_same_key_returns_the_same_sandbox_also_while_it_starts(world: World) -> None:
    found: list[str] = []

    async def ask() -> None:
        found.append((await world.spawn(idempotency_key="k")).id)

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(ask)
    assert len(found) == 5 and len(set(found)) == 1
    assert len(await world.backend.list()) == 1


async def test_the_key_of_a_sandbox_that_has_ended_says_so(world: World) -> None:
    await world.sandboxes.destroy([await world.spawn(idempotency_key="k")])
    with pytest.raises(SandboxGone, match="it was destroyed"):
        await world.spawn(idempotency_key="k")


async def test_a_key_is_free_again_when_its_sandbox_is_forgotten(world: World) -> None:
    old = await world.spawn(idempotency_key="k")
    await world.sandboxes.destroy([old])
    world.clock[0] += 3600
    await world.look()
    assert (await world.spawn(idempotency_key="k")).id != old.id


async def test_scopes_and_owners_are_apart(world: World) -> None:
    red = await world.spawn(scope=Scope("red"))
    default = await world.spawn()
    assert red.session == default.session == "sb1"
    registry = world.sandboxes.registry
    assert registry.find(LOCAL, Scope("red"), "sb1") is red
    assert registry.find(LOCAL, EVERY_SCOPE, "sb1") is default
    assert registry.find(LOCAL, EVERY_SCOPE, red.id) is red
    for principal, scope in ((Principal("other"), Scope("red")), (LOCAL, DEFAULT_SCOPE)):
        with pytest.raises(SandboxNotFound):
            registry.find(principal, scope, red.id)
    bound = Principal("local", frozenset({"red"}))
    assert registry.of(bound, EVERY_SCOPE) == [red]
    assert registry.find(bound, EVERY_SCOPE, "sb1") is red


async def test_a_name_that_several_scopes_share_is_the_living_ones_or_asks_for_an_id(world: World) -> None:
    for scope in ("red", "blue"):
        await world.spawn(session="box", scope=Scope(scope))
    registry = world.sandboxes.registry
    blue = registry.find(LOCAL, Scope("blue"), "box")
    with pytest.raises(SandboxNotFound, match=f"several scopes .*{blue.id}"):
        registry.find(LOCAL, EVERY_SCOPE, "box")
    await world.sandboxes.destroy([registry.find(LOCAL, Scope("red"), "box")])
    assert registry.find(LOCAL, EVERY_SCOPE, "box") is blue
    await world.sandboxes.destroy([blue])
    with pytest.raises(SandboxNotFound, match="several scopes"):
        registry.find(LOCAL, EVERY_SCOPE, "box")


async def test_what_an_unknown_name_is_told_holds_no_others_names(world: World) -> None:
    await world.spawn(session="hidden", scope=Scope("red"))
    with pytest.raises(SandboxNotFound, match="no other; call spawn"):
        world.sandboxes.registry.find(LOCAL, DEFAULT_SCOPE, "nope")


async def test_a_full_hive_refuses_with_a_time_to_come_back(make_world: MakeWorld) -> None:
    world = await make_world(limits={"sandboxes": 1})
    await world.spawn()
    with pytest.raises(CapacityExceeded, match="ASH_HUB_LIMITS__SANDBOXES") as caught:
        await world.spawn()
    assert caught.value.retry_after_seconds > 0


async def test_one_sandbox_that_cannot_be_ended_keeps_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = await world.spawn(ttl_seconds=5)
    others = [await world.spawn(ttl_seconds=5) for _ in range(3)]
    delete = world.backend.delete

    async def refuse(sandbox_id: SandboxId, *, grace_seconds: float = 2.0) -> None:
        if sandbox_id == stuck.id:
            raise RuntimeError("the backend has a bug")
        await delete(sandbox_id, grace_seconds=grace_seconds)

    monkeypatch.setattr(world.backend, "delete", refuse)
    world.clock[0] += 6
    await world.look()
    assert [it.state for it in others] == [State.GONE] * 3
    assert "the backend has a bug" in caplog.text and stuck.state is State.STOPPING
    monkeypatch.setattr(world.backend, "delete", delete)
    with anyio.fail_after(5):
        await stuck.ended.wait()  # it is tried again by itself
    assert (stuck.state, stuck.reason) == (State.GONE, EndReason.TTL_EXPIRED)
    assert await world.store.places() == {} and await world.backend.list() == []


async def test_a_store_that_is_filled_again_holds_no_place_of_what_ended_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await world.spawn()
    reserve = world.store.reserve_session

    async def reserve_late(*args: Any, **options: Any) -> SessionName:
        await world.controller.end(box, EndReason.DESTROYED)
        return await reserve(*args, **options)

    monkeypatch.setattr(world.store, "reserve_session", reserve_late)
    await world.controller.restore()
    assert await world.store.places() == {} and box.state is State.GONE


async def test_a_spawn_that_fails_gives_back_its_place_as_soon_as_its_remains_are_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = world.backend.delete

    async def refuse(sandbox_id: SandboxId, *, grace_seconds: float = 2.0) -> None:
        raise RuntimeError("the backend has a bug")

    monkeypatch.setattr("ash_hub.lifecycle.sandboxes.END_SECONDS", 0.05)
    monkeypatch.setattr(world.backend, "delete", refuse)
    world.runner.claim_status = 500
    with pytest.raises(StartFailed):
        await world.spawn()
    (box,) = world.sandboxes.registry.all()
    monkeypatch.setattr(world.backend, "delete", delete)
    with anyio.fail_after(5):
        await box.ended.wait()
    assert await world.store.places() == {} and box.reason is EndReason.START_FAILED


async def test_a_step_that_fails_is_taken_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    box = await world.spawn(ttl_seconds=5)

    async def fail_once(*_: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("a bug in a step")

    monkeypatch.setattr(world.routes, "unbind", fail_once)
    world.clock[0] += 6
    await world.look()
    with anyio.fail_after(5):
        await box.ended.wait()
    assert box.reason is EndReason.TTL_EXPIRED and "a bug in a step" in caplog.text
    await nothing_is_left(world)


async def test_an_event_of_the_backend_that_fails_does_not_end_the_watch(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = await world.spawn(), await world.spawn()
    known = world.sandboxes.registry.by_id

    def fail_once(sandbox_id: SandboxId) -> Sandbox | None:
        monkeypatch.setattr(world.sandboxes.registry, "by_id", known)
        raise RuntimeError("a bug in what follows the backend")

    monkeypatch.setattr(world.sandboxes.registry, "by_id", fail_once)
    world.backend.die(one.id)
    world.backend.die(other.id)
    with anyio.fail_after(5):
        await other.ended.wait()
    assert "a bug in what follows" in caplog.text


async def test_one_owner_cannot_take_all_places_of_a_hive(make_world: MakeWorld) -> None:
    world = await make_world(limits={"sandboxes": 4})
    greedy, other = Principal("greedy"), Principal("other")
    boxes = [await world.spawn(owner=greedy) for _ in range(3)]
    with pytest.raises(CapacityExceeded, match="ASH_HUB_LIMITS__SANDBOXES_PER_OWNER") as caught:
        await world.spawn(owner=greedy)
    assert caught.value.data["limit"] == "owner"
    await world.spawn(owner=other)
    with pytest.raises(CapacityExceeded, match=r"ASH_HUB_LIMITS__SANDBOXES\)"):
        await world.spawn(owner=other)
    await world.sandboxes.destroy(boxes[:1])
    await world.spawn()


async def test_a_keys_own_limits_of_living_and_starting_hold_and_are_named(make_world: MakeWorld) -> None:
    world = await make_world(limits={"sandboxes": 9})
    ann = Principal("ann", limits=PrincipalLimits(sandboxes=2, starting=1))
    more = replace(ann, limits=PrincipalLimits(starting=1))
    await world.spawn(owner=ann)
    world.runner.hold = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: world.spawn(owner=ann))
        await world.runner.asked.wait()
        with pytest.raises(CapacityExceeded, match="--max-sandboxes") as caught:
            await world.spawn(owner=ann)
        assert caught.value.data["limit"] == "key"
        with pytest.raises(CapacityExceeded, match="--max-starting"):
            await world.spawn(owner=more)
        world.runner.hold.set()
    await world.spawn(owner=more)


async def test_who_is_bound_to_a_sandbox_sees_that_one_only(world: World) -> None:
    first, _ = await world.spawn(), await world.spawn()
    guest = Principal("guest", sandbox=first.id)
    registry = world.sandboxes.registry
    assert registry.of(guest, DEFAULT_SCOPE) == [first] == registry.of(guest, EVERY_SCOPE)
    assert registry.find(guest, DEFAULT_SCOPE, "sb1") is first is registry.find(guest, DEFAULT_SCOPE, first.id)
    with pytest.raises(SandboxNotFound):
        registry.find(guest, EVERY_SCOPE, "sb2")
    routes = world.routes
    assert [route.sandbox_id for route in routes.of(guest, DEFAULT_SCOPE)] == [first.id]
    for name in ("sb1", first.id):
        found = routes.resolve(guest, DEFAULT_SCOPE, name)
        assert found is not None and found.sandbox_id == first.id
    assert routes.resolve(guest, DEFAULT_SCOPE, "sb2") is None


async def test_the_user_who_runs_the_hive_may_have_all_places(make_world: MakeWorld) -> None:
    world = await make_world(limits={"sandboxes": 2})
    await world.spawn()
    await world.spawn()


async def test_a_key_of_a_spawn_that_was_refused_is_free_again(make_world: MakeWorld) -> None:
    world = await make_world(limits={"sandboxes": 1})
    first = await world.spawn()
    with pytest.raises(CapacityExceeded, match="ASH_HUB_LIMITS__SANDBOXES"):
        await world.spawn(idempotency_key="k")
    await world.sandboxes.destroy([first])
    assert (await world.spawn(idempotency_key="k")).state is State.READY


async def test_at_most_so_many_start_at_once_and_all_become_ready(world: World) -> None:
    world.runner.hold = anyio.Event()
    ready: list[Any] = []

    async def ask() -> None:
        ready.append(await world.spawn())

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(ask)
        await world.runner.asked.wait()
        await anyio.wait_all_tasks_blocked()
        assert len(await world.backend.list()) <= 2
        world.runner.hold.set()
    assert len(ready) == 6


async def test_the_ttl_ends_a_sandbox_and_its_owner_can_read_why(world: World) -> None:
    sandbox = await world.spawn(ttl_seconds=60)
    world.clock[0] += 59
    await world.look()
    assert sandbox.state is State.READY
    world.clock[0] += 1
    await world.look()
    with pytest.raises(SandboxGone, match=r"its time to live was over. Call spawn"):
        world.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "sb1")
    assert world.gone == [sandbox.id]
    await nothing_is_left(world)


async def test_a_call_in_flight_keeps_a_sandbox_from_being_idle(world: World) -> None:
    sandbox = await world.spawn(idle_seconds=10)
    call = world.ledger.begin(sandbox.id, "local")
    world.clock[0] += 100
    await world.look()
    assert sandbox.state is State.READY
    world.ledger.end(call)
    world.clock[0] += 9
    await world.look()
    assert sandbox.state is State.READY
    world.clock[0] += 1
    await world.look()
    assert sandbox.reason is EndReason.IDLE_EXPIRED


async def test_extending_counts_from_now_and_is_bounded(make_world: MakeWorld) -> None:
    world = await make_world(max_ttl_seconds=1000, ttl_seconds=100)
    sandbox = await world.spawn()
    world.clock[0] += 50
    await world.sandboxes.extend(LOCAL, DEFAULT_SCOPE, "sb1", 500)
    assert sandbox.record.expires_at == world.clock[0] + 500
    (instance,) = await world.backend.list()
    assert instance.record["expires_at"] == sandbox.record.expires_at
    with pytest.raises(ConfigError, match="at most 1000"):
        await world.sandboxes.extend(LOCAL, DEFAULT_SCOPE, "sb1", 1001)


async def test_a_death_is_known_at_once_and_ends_calls_in_flight(world: World) -> None:
    sandbox = await world.spawn()
    failures: list[AshError] = []
    world.ledger.begin(sandbox.id, "local", failures.append)
    world.backend.die(sandbox.id, "exited with code 3")
    with anyio.fail_after(RESYNC_SECONDS / 2):  # it is told, and not found
        await sandbox.ended.wait()
    await anyio.wait_all_tasks_blocked()
    assert (sandbox.state, sandbox.reason) == (State.FAILED, EndReason.PROCESS_DIED)
    assert [failure.kind for failure in failures] == ["sandbox_gone"]
    assert "exited with code 3" in failures[0].message
    assert (sandbox.cause, failures[0].data["cause"]) == (Cause.AGENT, "agent")
    await nothing_is_left(world)


async def test_destroying_while_it_starts_ends_the_spawn(world: World) -> None:
    world.runner.hold = anyio.Event()

    async def destroy() -> None:
        await world.runner.asked.wait()
        await world.sandboxes.destroy(world.sandboxes.registry.living())

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(destroy)
            with pytest.raises(SandboxGone, match="it was destroyed"):
                await world.spawn()
    await nothing_is_left(world)


async def test_destroying_twice_at_once_is_once(world: World) -> None:
    sandbox = await world.spawn()
    async with anyio.create_task_group() as group:
        group.start_soon(world.sandboxes.destroy, [sandbox])
        group.start_soon(world.sandboxes.destroy, [sandbox])
    assert sandbox.state is State.GONE


async def test_what_ended_is_forgotten_after_an_hour(world: World) -> None:
    await world.sandboxes.destroy([await world.spawn()])
    world.clock[0] += 3599
    await world.look()
    assert world.sandboxes.registry.of(LOCAL, DEFAULT_SCOPE, ended=True)
    world.clock[0] += 1
    await world.look()
    assert not world.sandboxes.registry.of(LOCAL, DEFAULT_SCOPE, ended=True)


async def test_a_backend_out_of_reach_ends_nothing_and_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await world.spawn(ttl_seconds=60)

    async def away(*_: Any, **__: Any) -> None:
        raise ConnectFailed("it is away")

    with monkeypatch.context() as patched:
        patched.setattr(world.backend, "unready", lambda: "it is away")
        patched.setattr(world.backend, "annotate", away)
        assert world.sandboxes.unready() == "it is away" and world.sandboxes.stopping() is None
        with pytest.raises(ConnectFailed, match="it is away"):
            await world.sandboxes.destroy([sandbox])
        with pytest.raises(ConnectFailed, match="it is away"):
            await world.sandboxes.extend(LOCAL, DEFAULT_SCOPE, sandbox.session, 60)
        world.clock[0] += 100
        await world.look()
        assert world.sandboxes.ready(LOCAL, DEFAULT_SCOPE, sandbox.session) is sandbox
    with anyio.fail_after(5):
        await sandbox.ended.wait()
    assert sandbox.reason is EndReason.TTL_EXPIRED


async def test_stopping_ends_everything_and_refuses_spawns(world: World) -> None:
    sandbox = await world.spawn()
    await world.sandboxes.stop(keep=False)
    assert sandbox.reason is EndReason.HIVE_STOPPED
    assert world.sandboxes.unready() == world.sandboxes.stopping() == "stopping"
    with pytest.raises(StartFailed, match="stopping"):
        await world.spawn()
    await nothing_is_left(world)


async def test_the_last_replica_frees_the_keys_of_ended_sandboxes_at_once_however_far_the_store_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        await world.sandboxes.destroy([await world.spawn(idempotency_key=f"key{number}")])
    store = world.store
    asked, all_asked, release_key = 0, anyio.Event(), store.release_key

    async def far_away(*of_key: Any) -> None:
        nonlocal asked
        asked += 1
        if asked == 5:
            all_asked.set()
        await all_asked.wait()
        await release_key(*of_key)

    monkeypatch.setattr(store, "release_key", far_away)
    with anyio.fail_after(10):
        await world.sandboxes.stop(keep=False)
    assert asked == 5


async def test_a_new_hub_takes_kept_sandboxes_over_under_their_names(make_world: MakeWorld) -> None:
    old = await make_world()
    sandbox = await old.spawn(session="mine", ttl_seconds=500, idempotency_key="k", labels={"a": "b"})
    await old.sandboxes.stop(keep=True)
    new = await make_world()
    await new.look()
    adopted = new.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "mine")
    assert new.changed == [("local", DEFAULT_SCOPE)]
    assert (adopted.id, adopted.record.expires_at) == (sandbox.id, sandbox.record.expires_at)
    assert adopted.toolset is not None and [tool.name for tool in adopted.toolset.tools] == ["run"]
    assert new.routes.resolve(LOCAL, DEFAULT_SCOPE, "mine") is not None
    assert (await new.spawn(idempotency_key="k")).id == sandbox.id
    with pytest.raises(SessionTaken):
        await new.spawn(session="mine")


async def test_what_an_earlier_hub_left_unfinished_is_removed(make_world: MakeWorld) -> None:
    old = await make_world()
    sandbox = await old.spawn()
    unready = replace(sandbox.record, ready_at=None).to_json()
    (instance,) = await old.backend.list()
    await old.backend.annotate(sandbox.id, unready, revision=instance.revision)
    new = await make_world()
    await new.look()
    assert await new.backend.list() == []


async def test_idle_time_counts_from_the_hive_that_takes_a_sandbox_over(make_world: MakeWorld) -> None:
    old = await make_world()
    sandbox = await old.spawn(idle_seconds=10)
    await old.sandboxes.stop(keep=True)
    new = await make_world()
    new.clock[0] += 9
    await new.look()
    adopted = new.sandboxes.ready(LOCAL, DEFAULT_SCOPE, sandbox.session)
    new.clock[0] += 1
    await new.look()
    assert adopted.reason is EndReason.IDLE_EXPIRED


async def test_a_sandbox_that_the_backend_lost_is_recorded_so(world: World) -> None:
    sandbox = await world.spawn()
    world.backend._instances.clear()  # pyright: ignore[reportPrivateUsage]
    await world.look()
    assert sandbox.reason is EndReason.LOST
    assert len(world.routes) == 0
