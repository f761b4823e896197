"""Shares of sandboxes over the memory backend: who makes them, where they are kept, and when they are gone."""

from __future__ import annotations

from typing import Any

import pytest

from ash_hub.lifecycle.record import RECORD_VERSION, Record, UnreadableRecord
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sharing import Sharing
from ash_mcp.errors import (
    CapacityExceeded,
    ConfigError,
    ConnectFailed,
    NotFound,
    PermissionDenied,
    PortNotAllowed,
    SandboxGone,
    SandboxNotFound,
    ToolNotFound,
)
from ash_mcp.types import DEFAULT_SCOPE, Principal, Scope
from ash_router.admission.share_tokens import SharedSandbox
from tests.hub.world import LOCAL, MakeWorld, World

pytestmark = pytest.mark.anyio


def sharing(world: World) -> Sharing:
    parts: Any = world.sandboxes._parts  # pyright: ignore[reportPrivateUsage]
    return Sharing(parts, world.controller, world.sandboxes)


async def mint(world: World, box: Sandbox, tools: list[str] | None = None, ttl: float | None = None) -> str:
    _, minted = await sharing(world).mint(LOCAL, DEFAULT_SCOPE, box.session, tools, ttl)
    return minted.share.id


async def record_of(world: World, box: Sandbox) -> Record:
    instance = await world.backend.get(box.id)
    assert instance is not None
    return Record.from_json(instance.record)


async def test_a_share_is_in_the_record_and_on_the_route_when_it_is_handed_out(world: World):
    box = await world.spawn()
    owner = sharing(world)
    _, minted = await owner.mint(LOCAL, DEFAULT_SCOPE, box.session, None, 60)
    shared = world.routes.shared(minted.share.id)
    assert shared == SharedSandbox(minted.share, box.id, frozenset({box.id, box.session}))
    assert (minted.share.tools, minted.share.expires_at) == (("run",), world.clock[0] + 60)
    record = await record_of(world, box)
    assert (record.shares.version, record.shares.held) == (1, (minted.share,))
    assert minted.token not in str(record.to_json())
    assert owner.list(LOCAL, DEFAULT_SCOPE, box.id) == (box, [minted.share])
    world.clock[0] += 60
    assert owner.list(LOCAL, DEFAULT_SCOPE, box.id)[1] == []


async def test_a_revoked_share_is_gone_from_both(world: World):
    box = await world.spawn()
    first, second = await mint(world, box), await mint(world, box)
    owner = sharing(world)
    assert await owner.revoke(LOCAL, DEFAULT_SCOPE, box.session, [first]) == (box, [first])
    assert world.routes.shared(first) is None and world.routes.shared(second) is not None
    assert [share.id for share in (await record_of(world, box)).shares.held] == [second]
    with pytest.raises(NotFound):
        await owner.revoke(LOCAL, DEFAULT_SCOPE, box.session, [second, first])
    assert world.routes.shared(second) is not None
    assert await owner.revoke(LOCAL, DEFAULT_SCOPE, box.session, None) == (box, [second])
    assert world.routes.shared(second) is None


async def test_shares_end_with_their_sandbox_and_its_name_opens_no_other(world: World):
    box = await world.spawn(session="mine")
    share = await mint(world, box)
    await world.sandboxes.destroy([box])
    assert world.routes.shared(share) is None
    await world.spawn(session="mine")
    assert world.routes.shared(share) is None
    with pytest.raises(SandboxGone):
        await sharing(world).mint(LOCAL, DEFAULT_SCOPE, box.id, None, None)


async def test_only_its_owner_shares_it_in_its_scope(world: World):
    box = await world.spawn(Scope("run1"))
    guest = Principal("share:x", sandbox=box.id, share="x", tools=frozenset({"run"}))
    held = Principal("holder", sandbox=box.id)
    for who in (guest, held):
        with pytest.raises(PermissionDenied):
            await sharing(world).mint(who, Scope("run1"), box.id, None, None)
        with pytest.raises(PermissionDenied):
            sharing(world).list(who, Scope("run1"), box.id)
    for who, scope in ((Principal("other"), Scope("run1")), (LOCAL, Scope("run2"))):
        with pytest.raises(SandboxNotFound):
            await sharing(world).mint(who, scope, box.id, None, None)
        with pytest.raises(SandboxNotFound):
            await sharing(world).revoke(who, scope, box.id, None)


async def test_what_it_opens_is_listed_and_bounded(make_world: MakeWorld):
    world = await make_world(limits={"shares_per_sandbox": 2})
    world.runner.tools = [
        {"name": f"tool{number}" + "x" * 100, "inputSchema": {"type": "object"}} for number in range(90)
    ]
    box = await world.spawn()
    for unknown in ("ash_exec", "sb1_tool", "", "tool"):
        with pytest.raises(ToolNotFound):
            await mint(world, box, [unknown])
    with pytest.raises(ConfigError):
        await mint(world, box, [])
    with pytest.raises(ConfigError, match="bytes of names"):
        await mint(world, box)
    name = "tool1" + "x" * 100
    await mint(world, box, [name, name], ttl=10)
    assert [share.tools for share in (await record_of(world, box)).shares.held] == [(name,)]
    await mint(world, box, [name])
    with pytest.raises(CapacityExceeded):
        await mint(world, box, [name])
    world.clock[0] += 10
    await mint(world, box, [name])


async def test_a_hive_that_starts_again_has_the_shares_and_not_the_revoked(make_world: MakeWorld):
    world = await make_world()
    box = await world.spawn()
    kept, revoked = await mint(world, box), await mint(world, box)
    await sharing(world).revoke(LOCAL, DEFAULT_SCOPE, box.session, [revoked])
    again = await make_world()
    await again.controller.start()
    assert again.routes.shared(kept) is not None and again.routes.shared(revoked) is None


async def test_a_revocation_that_the_store_does_not_hear_of_is_told_and_holds_here(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    box = await world.spawn()
    share = await mint(world, box)

    async def away(_: Any) -> None:
        raise ConnectFailed("away")

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "put_route", away)
        with pytest.raises(ConnectFailed, match="revoked for good"):
            await sharing(world).revoke(LOCAL, DEFAULT_SCOPE, box.session, [share])
        assert world.routes.shared(share) is None
    await world.look()
    (stored,) = await world.store.routes()
    assert stored["shares"] == {"version": 2, "held": []}


async def test_only_what_was_shared_is_unreadable_for_replicas_that_would_drop_its_shares(world: World):
    box = await world.spawn()
    assert (await record_of(world, box)).to_json()["version"] == RECORD_VERSION - 1
    await mint(world, box)
    shared = (await record_of(world, box)).to_json()
    assert shared["version"] == RECORD_VERSION and Record.from_json(shared).shares.held
    await sharing(world).revoke(LOCAL, DEFAULT_SCOPE, box.session, None)
    assert (await record_of(world, box)).to_json()["version"] == RECORD_VERSION, "an older route may still be about"
    with pytest.raises(UnreadableRecord):
        Record.from_json({key: value for key, value in shared.items() if key != "shares"})


async def test_ports_that_a_spawn_allowed_are_in_its_record_and_on_its_route(world: World):
    box = await world.spawn(ports=[8000, 9000, 8000])
    assert (box.info(None).ports, (await record_of(world, box)).ports) == ((8000, 9000), (8000, 9000))
    route = world.routes.get(box.id)
    assert route is not None and route.ports == (8000, 9000)
    (stored,) = await world.store.routes()
    assert stored["ports"] == [8000, 9000]
    shape = (await record_of(world, box)).to_json()
    assert shape["version"] == RECORD_VERSION and Record.from_json(shape) == await record_of(world, box)
    without = await world.spawn()
    assert "ports" not in (await record_of(world, without)).to_json()


async def test_a_share_opens_ports_and_then_only_the_tools_that_are_named(world: World):
    box = await world.spawn(ports=[8000, 9000])
    owner = sharing(world)
    _, minted = await owner.mint(LOCAL, DEFAULT_SCOPE, box.session, None, None, [9000, 9000])
    assert (minted.share.tools, minted.share.ports, len(minted.share.label)) == ((), (9000,), 20)
    shared = world.routes.shared(minted.share.id)
    assert shared is not None and shared.share == minted.share
    assert (await record_of(world, box)).shares.held == (minted.share,)
    _, both = await owner.mint(LOCAL, DEFAULT_SCOPE, box.session, ["run"], None, [8000])
    assert (both.share.tools, both.share.ports) == (("run",), (8000,)) and both.share.label != minted.share.label


async def test_a_port_that_the_spawn_did_not_allow_is_not_shared(world: World):
    some, none = await world.spawn(ports=[8000]), await world.spawn()
    for box, port in ((some, 9000), (none, 8000)):
        with pytest.raises(PortNotAllowed, match=f"ports=.{port}."):
            await sharing(world).mint(LOCAL, DEFAULT_SCOPE, box.session, None, None, [port])
        assert (await record_of(world, box)).shares.held == ()


async def test_a_hive_that_starts_again_has_the_ports(make_world: MakeWorld):
    world = await make_world()
    box = await world.spawn(ports=[8000])
    again = await make_world()
    await again.controller.start()
    route = again.routes.get(box.id)
    assert route is not None and route.ports == (8000,)
