"""Two replicas at once on every step that must be atomic, and the store in Redis against its twin in memory."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ash_mcp.errors import SessionTaken
from ash_mcp.types import DEFAULT_SCOPE, SandboxId, SessionName
from ash_router.store.base import Store
from ash_router.store.memory import MemoryStore
from ash_router.store.redis import RedisStore
from tests.redis_server import RedisServer
from tests.router.store.redis_parts import fresh_prefix, open_quick, record

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

BOX = SessionName("box")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


async def raced(server: RedisServer, times: int, step: Callable[[RedisStore, int], Coroutine[Any, Any, Any]]) -> Any:
    """Take a step `times` times, half of them on either of two stores, all at once; return what they returned."""
    prefix = fresh_prefix()
    results: list[Any] = []

    async def take(store: RedisStore, number: int) -> None:
        results.append(await step(store, number))

    async with open_quick(server, prefix, 10) as one, open_quick(server, prefix, 10) as two:
        async with anyio.create_task_group() as group:
            for number in range(times):
                group.start_soon(take, (one, two)[number % 2], number)
        return results


async def test_no_session_number_is_given_twice(shared_redis: RedisServer):
    async def reserve(store: RedisStore, number: int) -> str:
        return await store.reserve_session("me", DEFAULT_SCOPE, None, SandboxId(f"sbx-{number}"))

    assert sorted(await raced(shared_redis, 100, reserve)) == sorted(f"sb{number}" for number in range(1, 101))


async def test_one_gets_the_name_that_all_want(shared_redis: RedisServer):
    async def reserve(store: RedisStore, number: int) -> bool:
        try:
            return await store.reserve_session("me", DEFAULT_SCOPE, BOX, SandboxId(f"sbx-{number}")) == BOX
        except SessionTaken:
            return False

    assert sum(await raced(shared_redis, 100, reserve)) == 1


async def test_all_are_told_the_same_holder_of_a_key(shared_redis: RedisServer):
    async def claim(store: RedisStore, number: int) -> str:
        return await store.claim_key("me", DEFAULT_SCOPE, "key", SandboxId(f"sbx-{number}"))

    assert len(set(await raced(shared_redis, 100, claim))) == 1


async def test_the_latest_call_stays_in_whatever_order_they_come(shared_redis: RedisServer):
    async def touch(store: RedisStore, number: int) -> float:
        await store.put_route(record(1))
        await store.touch({SandboxId("sbx-1"): float((number * 37) % 100)})
        return (await store.last_calls())[SandboxId("sbx-1")]

    assert max(await raced(shared_redis, 100, touch)) == 99.0


# -- the twin

_IDS = st.sampled_from([SandboxId(f"sbx-{number}") for number in range(4)])
_SESSIONS = st.sampled_from([SessionName(name) for name in ("box", "sb1", "sb2", "sb4", "sb9", "sb03")])
_STEPS = st.one_of(
    st.tuples(st.just("reserve"), st.none() | _SESSIONS, _IDS),
    st.tuples(st.just("release"), _SESSIONS, _IDS),
    st.tuples(st.just("claim"), st.sampled_from(["k", "l"]), _IDS),
    st.tuples(st.just("unclaim"), st.sampled_from(["k", "l"]), _IDS),
    st.tuples(st.just("put"), st.integers(1, 3), _IDS),
    st.tuples(st.just("drop"), st.none(), _IDS),
    st.tuples(st.just("touch"), st.integers(0, 9), _IDS),
    st.tuples(st.just("changes"), st.none(), _IDS),
)


class _User:
    """Takes steps on a store and returns what can be seen of them."""

    def __init__(self, *stores: Store) -> None:
        self._stores = stores
        self._steps = 0
        self._version: str | None = None

    async def take(self, what: str, value: Any, sandbox_id: SandboxId) -> object:
        self._steps += 1
        store = self._stores[self._steps % len(self._stores)]
        match what:
            case "reserve":
                try:
                    return await store.reserve_session("me", DEFAULT_SCOPE, value, sandbox_id)
                except SessionTaken as error:
                    return error.message
            case "release":
                return await store.release_session("me", DEFAULT_SCOPE, value, sandbox_id)
            case "claim":
                return await store.claim_key("me", DEFAULT_SCOPE, value, sandbox_id)
            case "unclaim":
                return await store.release_key("me", DEFAULT_SCOPE, value, sandbox_id)
            case "put":
                return await store.put_route({"sandbox_id": sandbox_id, "port": value, "more": ["ä", None]})
            case "drop":
                return await store.drop_route(sandbox_id)
            case "touch":
                return await store.touch({sandbox_id: float(value)})
            case _:
                changes = await store.route_changes(self._version)
                self._version = changes.version
                told = (list(changes.bound), list(changes.unbound), changes.complete)
                return told, await store.routes(), await store.last_calls()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(_STEPS, min_size=5, max_size=40))
def test_whatever_is_done_the_twin_shows_the_same(
    shared_redis: RedisServer, steps: Sequence[tuple[str, Any, SandboxId]]
):
    async def compare() -> None:
        prefix = fresh_prefix()
        async with open_quick(shared_redis, prefix, 10) as one, open_quick(shared_redis, prefix, 10) as two:
            real, twin = _User(one, two), _User(MemoryStore())
            for step in [*steps, ("changes", None, SandboxId("sbx-0"))]:
                assert await real.take(*step) == await twin.take(*step), step

    anyio.run(compare)
