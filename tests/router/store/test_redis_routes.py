"""Two replicas' routes over one real Redis."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_mcp.errors import ConnectFailed
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Principal, SandboxId
from ash_router.routes import Route, Routes
from ash_router.store.redis import RedisStore
from ash_router.store.redis import store as redis_store
from tests.redis_server import RedisServer, running_redis
from tests.router.store.redis_parts import hurried, open_quick, record, route, until

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

ME = Principal("me")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


def _moved(found: Route) -> int:
    """Return how many times the route was moved, as its port says."""
    assert found.endpoint.port is not None
    return found.endpoint.port // 1000 - 1


class Replica:
    """The routes of one replica, which puts its own back when Redis lost them."""

    def __init__(self, store: RedisStore) -> None:
        self.store = store
        self.routes = Routes(store)
        self.own: dict[int, int] = {}

    async def bind(self, number: int, moved: int = 0) -> None:
        self.own[number] = moved
        await self.routes.bind(route(number, moved=moved))

    async def bind_in_the_end(self, number: int) -> None:
        with anyio.fail_after(30):
            while number not in self.own or f"sbx-{number}" not in self.sees():
                with contextlib.suppress(ConnectFailed):
                    await self.bind(number)

    async def unbind(self, number: int) -> None:
        del self.own[number]
        await self.routes.unbind(SandboxId(f"sbx-{number}"))

    async def restore(self) -> None:
        for number, moved in list(self.own.items()):
            await self.routes.bind(route(number, moved=moved))

    def sees(self) -> dict[str, int]:
        return {found.sandbox_id: _moved(found) for found in self.routes.of(ME, EVERY_SCOPE)}


@pytest.fixture
async def replicas(server: RedisServer) -> AsyncGenerator[list[Replica]]:
    async with open_quick(server, "ash") as one, open_quick(server, "ash") as two:
        both: list[Replica] = []
        async with anyio.create_task_group() as group:
            for store in (one, two):
                replica = Replica(store)
                store.on_flushed(replica.restore)
                group.start_soon(replica.routes.run)
                both.append(replica)
            yield both
            group.cancel_scope.cancel()


async def test_what_one_binds_the_other_finds_at_once_and_forgets_with_it(replicas: list[Replica]):
    one, two = replicas
    await one.bind(1)
    assert await two.routes.find(ME, DEFAULT_SCOPE, "sb1") == route(1)
    await two.bind(2)
    await until(lambda: one.sees() == two.sees() == {"sbx-1": 0, "sbx-2": 0})
    await one.unbind(1)
    await until(lambda: one.sees() == two.sees() == {"sbx-2": 0})
    assert await two.routes.find(ME, DEFAULT_SCOPE, "sb1") is None


async def test_a_burst_of_changes_on_both_ends_the_same_on_both(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(redis_store, "CHANGES_REMEMBERED", 20)

    async def churn(replica: Replica, first: int) -> None:
        for number in range(first, first + 100):
            await replica.bind(number)
            if number % 3:
                await replica.bind(number, moved=1)
            if number % 2:
                await replica.unbind(number)

    async with anyio.create_task_group() as group:
        group.start_soon(churn, replicas[0], 0)
        group.start_soon(churn, replicas[1], 100)
    left = {f"sbx-{number}": 1 if number % 3 else 0 for number in range(0, 200, 2)}
    await until(lambda: all(replica.sees() == left for replica in replicas))


async def test_only_who_knows_an_older_version_than_is_remembered_is_told_all(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(redis_store, "CHANGES_REMEMBERED", 3)
    async with open_quick(server, "ash") as store:
        versions: list[str] = []
        for number in range(5):
            versions.append((await store.route_changes(None)).version)
            await store.put_route(record(number))
        answers = [await store.route_changes(version) for version in versions]
    assert [answer.complete for answer in answers] == [True, True, False, False, False]
    assert [len(answer.bound) for answer in answers] == [5, 5, 3, 2, 1]
    assert not any(answer.refilling for answer in answers)


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_calls_on_known_routes_go_on_while_it_is_away_and_others_fail_typed(
    server: RedisServer, replicas: list[Replica], how: str
):
    one, two = replicas
    await one.bind(1)
    await until(lambda: two.sees())
    getattr(server, how)()
    with hurried(one.store, two.store):
        assert await two.routes.find(ME, DEFAULT_SCOPE, "sb1") == route(1)
        with pytest.raises(ConnectFailed):
            await two.routes.find(ME, DEFAULT_SCOPE, "sb2")
        await one.unbind(1)
    server.start()
    await two.bind_in_the_end(3)
    await until(lambda: one.sees().keys() == {"sbx-3"})


async def test_a_flush_takes_no_route_away_and_both_fill_it_again(server: RedisServer, replicas: list[Replica]):
    one, two = replicas
    await one.bind(1)
    await two.bind(2)
    everything = {"sbx-1": 0, "sbx-2": 0}
    await until(lambda: one.sees() == two.sees() == everything)
    server.ask("FLUSHALL")
    with anyio.fail_after(30):
        while server.ask("HLEN", "ash:routes") != 2:
            assert one.sees() == two.sees() == everything
            await anyio.sleep(0.01)
    await one.unbind(1)
    await until(lambda: two.sees() == {"sbx-2": 0})
