"""A caller who is bound to one sandbox: what the hive's own tools show and refuse."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ash_hub.face.arguments import DestroyAsk, ExtendAsk, ListAsk, SpawnAsk, ToolsAsk
from ash_hub.face.handlers import HiveOperations
from ash_hub.face.sharing import ShareAsk, ShareTool
from ash_hub.lifecycle.sharing import Sharing
from ash_hub.lifecycle.snapshots import SnapshotVerbs
from ash_hub.serving.audit import Audit
from ash_mcp.errors import PermissionDenied, SandboxNotFound
from ash_mcp.types import DEFAULT_SCOPE, Principal
from ash_router.admission.base import Admitted
from ash_router.admission.preview_hosts import PreviewNames
from ash_router.admission.tickets import Tickets
from tests.hub.world import World, no_progress

pytestmark = pytest.mark.anyio


def operations(world: World) -> HiveOperations:
    parts: Any = world.sandboxes._parts  # pyright: ignore[reportPrivateUsage]
    return HiveOperations(
        world.sandboxes,
        world.backend,
        parts.tokens,
        parts.settings,
        Audit(),
        ShareTool(Sharing(parts, world.controller, world.sandboxes), Audit(), PreviewNames()),
        Tickets(parts.store),
        SnapshotVerbs(parts, world.controller, world.sandboxes),
        world.controller.catch_up,
        parts.ledger._clock,
    )


async def test_it_sees_its_sandbox_alone_and_makes_and_ends_none(world: World) -> None:
    shared, _ = await world.spawn(), await world.spawn()
    guest = Admitted(Principal("guest", sandbox=shared.id), DEFAULT_SCOPE, "/mcp")
    tools = operations(world)
    listed = await tools.answer(guest, ListAsk(), no_progress)
    assert [shape["session"] for shape in listed.structured["sandboxes"]] == ["sb1"]
    assert (await tools.answer(guest, ToolsAsk(session="sb1"), no_progress)).structured["tools"]
    with pytest.raises(SandboxNotFound):
        await tools.answer(guest, ToolsAsk(session="sb2"), no_progress)
    refused = (
        SpawnAsk.model_validate({"recipe": "test"}),
        DestroyAsk(session="sb1"),
        ExtendAsk(session="sb1", ttl_seconds=60),
    )
    for ask in refused:
        with pytest.raises(PermissionDenied, match="one sandbox only"):
            await tools.answer(guest, ask, no_progress)
    assert len(await world.backend.list()) == 2


async def test_a_guest_has_none_of_the_hives_own_tools(world: World) -> None:
    box = await world.spawn()
    guest = Admitted(
        Principal("share:x", sandbox=box.id, share="x", tools=frozenset({"run", "list"})), DEFAULT_SCOPE, "/mcp"
    )
    for ask in (ListAsk(), ToolsAsk(session="sb1"), ShareAsk(session="sb1"), DestroyAsk(session="sb1")):
        with pytest.raises(PermissionDenied):
            await operations(world).answer(guest, ask, no_progress)


@pytest.mark.parametrize("seconds", [0, 3e11, float("inf"), float("nan")])
def test_a_share_lives_for_a_time_that_can_be_told(seconds: float) -> None:
    with pytest.raises(ValidationError):
        ShareAsk.model_validate({"session": "sb1", "ttl_seconds": seconds})
