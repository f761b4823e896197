"""Starts of sandboxes whose servers are copies of one another: whose list is read, and what a start asks."""

from __future__ import annotations

import anyio
import pytest

from ash_mcp.errors import StartFailed
from tests.hub.world import World

pytestmark = pytest.mark.anyio

OTHER = [{"name": "other", "inputSchema": {"type": "object"}}]


def tools_of(world: World, session: str) -> list[str]:
    (found,) = [it for it in world.sandboxes.registry.living() if it.session == session]
    assert found.toolset is not None
    return [tool.name for tool in found.toolset.tools]


async def test_a_copy_has_the_tools_that_its_first_sibling_listed_before_it_was_claimed(world: World) -> None:
    world.backend.copy_of = "parent"
    await world.spawn(session="one")
    world.runner.tools, world.runner.asked = OTHER, anyio.Event()
    await world.spawn(session="two", env={"A": "2"})
    assert tools_of(world, "one") == tools_of(world, "two") == ["run"]
    assert not world.runner.asked.is_set()
    assert world.runner.claims[-1] == {"env": {"A": "2"}, "secrets": {}}


@pytest.mark.parametrize("copy_of", ["another parent", None])
async def test_what_is_no_copy_of_the_same_lists_its_own_tools(world: World, copy_of: str | None) -> None:
    world.backend.copy_of = "parent"
    await world.spawn(session="one")
    world.backend.copy_of, world.runner.tools = copy_of, OTHER
    await world.spawn(session="two")
    assert tools_of(world, "two") == ["other"]


async def test_a_copy_whose_server_did_not_start_fails_with_its_claim(world: World) -> None:
    world.backend.copy_of = "parent"
    await world.spawn()
    world.runner.claim_status = 500
    with pytest.raises(StartFailed, match=r"step claim.*refused the claim with 500") as failure:
        await world.spawn()
    assert failure.value.data["step"] == "claim"
