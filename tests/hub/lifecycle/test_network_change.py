"""What a sandbox may reach is changed while it lives: by whom, and what of it every replica and a new hive know."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ash_hub.lifecycle.record import Record
from ash_mcp.errors import Conflict, PermissionDenied, SandboxNotFound, Unsupported
from ash_mcp.types import DEFAULT_SCOPE, Principal
from tests.hub.world import LOCAL, MakeWorld, World

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    return await make_world(recipe={"network": "internet"})


async def test_a_sandbox_starts_with_what_its_spawn_asks_for_or_its_recipe(world: World) -> None:
    as_recipe, less = await world.spawn(), await world.spawn(network=["a.test"])
    assert (as_recipe.record.network, less.record.network) == ("internet", ("a.test",))
    assert world.sandboxes.info(less).network == ("a.test",)
    assert world.backend.networks == {as_recipe.id: "internet", less.id: ("a.test",)}


async def test_a_change_is_in_the_record_and_in_force_at_once(world: World) -> None:
    box = await world.spawn()
    changed = await world.sandboxes.set_network(LOCAL, DEFAULT_SCOPE, "sb1", ("a.test", "*.b.test"))
    assert changed is box and box.record.network == ("a.test", "*.b.test")
    (instance,) = await world.backend.list()
    assert Record.from_json(instance.record) == box.record
    assert world.backend.networks[box.id] == box.record.network
    await world.sandboxes.set_network(LOCAL, DEFAULT_SCOPE, "sb1", "none")
    assert (await world.sandboxes.set_network(LOCAL, DEFAULT_SCOPE, "sb1", "internet")).record.network == "internet"


async def test_a_holder_of_one_sandbox_closes_it_and_cannot_open_it(world: World) -> None:
    box = await world.spawn()
    holder = Principal("holder", sandbox=box.id)
    await world.sandboxes.set_network(holder, DEFAULT_SCOPE, box.id, "none")
    with pytest.raises(PermissionDenied, match="not widen it"):
        await world.sandboxes.set_network(holder, DEFAULT_SCOPE, box.id, ("a.test",))
    assert box.record.network == world.backend.networks[box.id] == "none"


async def test_another_owner_finds_no_such_sandbox(world: World) -> None:
    box = await world.spawn()
    with pytest.raises(SandboxNotFound):
        await world.sandboxes.set_network(Principal("other"), DEFAULT_SCOPE, box.id, "none")
    assert box.record.network == "internet"


async def test_what_the_backend_cannot_do_is_not_recorded(world: World) -> None:
    box = await world.spawn(network="none")
    with pytest.raises(Unsupported):
        await world.sandboxes.set_network(LOCAL, DEFAULT_SCOPE, "sb1", "internet")
    await world.sandboxes.set_network(LOCAL, DEFAULT_SCOPE, "sb1", "none")  # as it is
    assert box.record.network == "none"


async def test_a_change_is_judged_by_what_another_replica_has_set_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await world.spawn()
    holder, backend = Principal("holder", sandbox=box.id), world.backend
    set_network = backend.set_network

    async def beaten(*arguments: object, revision: int) -> None:
        monkeypatch.setattr(backend, "set_network", set_network)
        closed = replace(box.record, network="none")
        await set_network(box.id, "none", closed.to_json(), revision=revision)
        raise Conflict("another replica was first")

    monkeypatch.setattr(backend, "set_network", beaten)
    with pytest.raises(PermissionDenied, match="none now"):
        await world.sandboxes.set_network(holder, DEFAULT_SCOPE, box.id, ("a.test",))
    assert backend.networks[box.id] == "none"


async def test_the_next_hive_takes_it_over_as_narrowed(make_world: MakeWorld, world: World) -> None:
    box = await world.spawn()
    await world.sandboxes.set_network(LOCAL, DEFAULT_SCOPE, "sb1", ("a.test",))
    after = await make_world(recipe={"network": "internet"})
    await after.look()
    adopted = after.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "sb1")
    assert adopted is not box and adopted.id == box.id and adopted.record.network == ("a.test",)
