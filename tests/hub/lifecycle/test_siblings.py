"""What the lifecycle learns of the other replicas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ash_hub.lifecycle.siblings import Replicated
from ash_mcp.errors import ConnectFailed
from ash_mcp.types import SandboxId
from ash_router.replicas.membership import Replicas
from ash_router.store.memory import MemoryStore

pytestmark = pytest.mark.anyio


class CutOffStore(MemoryStore):
    """One that can be away, and counts who asks it."""

    is_away = False
    asked = 0

    async def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        self.asked += 1
        if self.is_away:
            raise ConnectFailed("the store is away")
        return await super().replicas()


async def test_a_store_that_is_away_is_asked_once_and_not_in_every_turn() -> None:
    clock = [100.0]
    store = CutOffStore()
    replicas = Replicas(store, "a", clock=lambda: clock[0])
    siblings = Replicated(replicas)
    store.is_away = True
    for _ in range(5):
        assert await siblings.is_other_alive("b") and await siblings.is_being_made(SandboxId("sbx-theirs"))
    assert store.asked == 1
    store.is_away = False
    for _ in range(6):
        await replicas.tick()
        clock[0] += 1.0
    assert not await siblings.is_other_alive("b") and not await siblings.is_being_made(SandboxId("sbx-theirs"))
