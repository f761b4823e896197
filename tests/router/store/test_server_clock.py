"""The time of a shared store is its server's, whatever the machines of its users say."""

from __future__ import annotations

import time

import pytest

from ash_router.store import clock
from ash_router.store.clock import ServerClock
from ash_router.store.redis import store as redis_store
from ash_router.store.testing import stores_tell_the_same_time
from tests.redis_server import RedisServer
from tests.router.store.redis_parts import fresh_prefix, open_quick, until

DAYS = 3 * 86_400.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server_clock(monkeypatch: pytest.MonkeyPatch) -> ServerClock:
    """A clock that is read when the steady one says 0."""
    monkeypatch.setattr(clock, "steady", lambda: 0.0)
    return ServerClock()


def test_the_first_answer_is_taken_to_be_of_the_middle_of_its_way(server_clock: ServerClock) -> None:
    server_clock.learn(1000.0, 10.0, 12.0)
    assert server_clock.now() == 989.0


def test_a_slow_answer_that_agrees_changes_nothing(server_clock: ServerClock) -> None:
    server_clock.learn(1000.0, 10.0, 10.0)
    server_clock.learn(1005.0, 10.5, 19.0)
    assert server_clock.now() == 990.0


@pytest.mark.parametrize(("said", "ahead"), [(1000.0 + DAYS, 988.0 + DAYS), (1000.0 - DAYS, 990.0 - DAYS)])
def test_a_server_whose_clock_is_another_is_followed(server_clock: ServerClock, said: float, ahead: float) -> None:
    server_clock.learn(1000.0, 11.0, 11.0)
    server_clock.learn(said, 10.0, 12.0)
    assert server_clock.now() == ahead


@pytest.mark.anyio
@pytest.mark.redis
async def test_stores_tell_the_servers_time_and_not_their_machines(
    shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, true = fresh_prefix(), time.time
    async with open_quick(shared_redis, prefix) as one:
        monkeypatch.setattr(time, "time", lambda: true() + DAYS)
        async with open_quick(shared_redis, prefix) as other:
            await stores_tell_the_same_time(one, other)
            assert abs(other.now() - true()) < 60.0


@pytest.mark.anyio
@pytest.mark.redis
async def test_the_servers_time_is_looked_at_again(shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = clock.steady
    async with open_quick(shared_redis, fresh_prefix()) as store:
        for module in (clock, redis_store):
            monkeypatch.setattr(module, "steady", lambda: before() + DAYS)
        assert store.now() - time.time() > DAYS / 2
        await until(lambda: abs(store.now() - time.time()) < 60.0)
