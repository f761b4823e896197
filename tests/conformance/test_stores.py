"""One suite, every store."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from ash_router.store.base import Store
from ash_router.store.memory import MemoryStore
from ash_router.store.select import open_store
from ash_router.store.testing import STORE_CHECKS, check_store, stores_tell_the_same_time
from tests.redis_server import RedisServer

pytestmark = pytest.mark.anyio

Make = Callable[[], AbstractAsyncContextManager[Store]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def memory() -> AsyncGenerator[Store]:
    yield MemoryStore()


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "memory":
        return memory
    server: RedisServer = request.getfixturevalue("shared_redis")
    return lambda: open_store(server.url, f"suite-{next(_NUMBERS)}")


_NUMBERS = itertools.count()


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
async def test_a_store_keeps_its_promises(make: Make, check: Any):
    async with make() as store:
        await check(store)


@pytest.mark.redis
async def test_two_stores_of_one_hive_tell_the_same_time(shared_redis: RedisServer):
    async with open_store(shared_redis.url, "suite-time") as one, open_store(shared_redis.url, "suite-time") as other:
        await stores_tell_the_same_time(one, other)


async def test_the_whole_suite_can_be_called_at_once(make: Make):
    await check_store(make)


async def test_a_store_that_forgets_is_found_out():
    class Forgetful(MemoryStore):
        async def drop_route(self, sandbox_id: Any, alias: Any = None) -> None:
            return None

    @asynccontextmanager
    async def forgetful() -> AsyncGenerator[Store]:
        yield Forgetful()

    with pytest.raises(AssertionError):
        await check_store(forgetful)
