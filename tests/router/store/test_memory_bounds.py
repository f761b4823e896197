"""What the in-process store forgets, by a clock that is set."""

from __future__ import annotations

import pytest

from ash_mcp.errors import CapacityExceeded
from ash_mcp.types import DEFAULT_SCOPE, SandboxId, Scope, SessionName
from ash_router.store.base import IDLE_SCOPE_SECONDS, PlaceLimits, Shelf
from ash_router.store.memory import MemoryStore

pytestmark = pytest.mark.anyio

ONE, TWO = SandboxId("sbx-1"), SandboxId("sbx-2")
SB1 = SessionName("sb1")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_scope_is_forgotten_a_day_after_its_last_sandbox() -> None:
    now = [0.0]
    store = MemoryStore(lambda: now[0])
    for scope in ("old", "new"):
        await store.reserve_session("me", Scope(scope), None, ONE)
    await store.release_session("me", Scope("old"), SB1, ONE)
    now[0] = IDLE_SCOPE_SECONDS
    await store.release_session("me", Scope("new"), SB1, ONE)
    assert set(store._names) == {("me", "new")}  # pyright: ignore[reportPrivateUsage]
    assert await store.reserve_session("me", Scope("new"), None, ONE) == "sb2"
    assert await store.reserve_session("me", Scope("old"), None, ONE) == "sb1"


async def test_whoever_is_refused_leaves_nothing() -> None:
    store = MemoryStore()
    for number in range(3):
        with pytest.raises(CapacityExceeded):
            await store.reserve_session("me", Scope(f"s{number}"), None, TWO, most=PlaceLimits(hive=0))
    await store.reserve_session("me", DEFAULT_SCOPE, SessionName("box"), ONE)
    await store.release_session("me", DEFAULT_SCOPE, SessionName("box"), ONE)
    assert not store._names and not store._idle  # pyright: ignore[reportPrivateUsage]


async def test_texts_end_with_their_time() -> None:
    now = [0.0]
    store = MemoryStore(lambda: now[0])
    shelf = Shelf("books", most=3, most_bytes=100, seconds=10.0)
    await store.keep(shelf, "a", "text")
    now[0] = 9.9
    assert dict(await store.kept(shelf)) == {"a": "text"}
    now[0] = 10.0
    assert dict(await store.kept(shelf)) == {}
