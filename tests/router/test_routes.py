"""Routes of one process over a store that others change too: here the in-process one, with a hand on its answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest

from ash_mcp.errors import ConnectFailed
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Endpoint, Principal, SandboxId, Scope, SessionName
from ash_router.admission.shares import Share, Shares
from ash_router.routes import REFILL_SECONDS, Routes
from ash_router.store.base import RouteChanges
from ash_router.store.memory import CHANGES_REMEMBERED, MemoryStore
from tests.router.store.redis_parts import route, until

pytestmark = pytest.mark.anyio

ME, YOU = Principal("me"), Principal("you")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class HeldStore(MemoryStore):
    """Can be away, forget, and hold back an answer or a write."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.anew = False
        self.looks = 0
        self.answered: anyio.Event | None = None
        """Set when an answer is ready and waits to be let through."""
        self.let_through = anyio.Event()

    async def put_route(self, record: Mapping[str, Any]) -> None:
        self._refuse_when_away()
        await super().put_route(record)

    async def route_changes(self, since: str | None) -> RouteChanges:
        self.looks += 1
        if self.away and self.answered is not None:
            self.answered.set()
            await self.let_through.wait()
        self._refuse_when_away()
        answer = await super().route_changes(None if self.anew else since)
        if self.anew:
            self.anew = False
            answer = RouteChanges(version=answer.version, bound=answer.bound, complete=True, refilling=True)
        if self.answered is not None:
            self.answered.set()
            await self.let_through.wait()
        return answer

    def _refuse_when_away(self) -> None:
        if self.away:
            raise ConnectFailed("away")


@asynccontextmanager
async def following(routes: Routes) -> AsyncGenerator[None]:
    async with anyio.create_task_group() as group:
        group.start_soon(routes.run)
        yield
        group.cancel_scope.cancel()


async def test_a_route_bound_elsewhere_is_found_without_following():
    store = MemoryStore()
    here, there = Routes(store), Routes(store)
    await there.bind(route(1))
    assert here.resolve(ME, DEFAULT_SCOPE, "sb1") is None
    assert await here.find(ME, DEFAULT_SCOPE, "sb1") == route(1)
    assert here.resolve(ME, DEFAULT_SCOPE, "sbx-1") == route(1)
    assert await here.find(ME, EVERY_SCOPE, "sb1") == route(1)
    assert await here.find(YOU, DEFAULT_SCOPE, "sbx-1") is None


async def test_a_follower_takes_over_what_is_bound_and_unbound_elsewhere():
    store, gone = MemoryStore(), list[SandboxId]()
    here, there = Routes(store, forgotten=gone.append), Routes(store)
    await there.bind(route(1))
    async with following(here):
        await until(lambda: here.get(SandboxId("sbx-1")))
        await there.bind(route(1, moved=1))
        await there.bind(route(2, owner="you"))
        await until(lambda: len(here) == 2)
        assert here.resolve(ME, DEFAULT_SCOPE, "sb1") == route(1, moved=1)
        await there.unbind(SandboxId("sbx-1"))
        await until(lambda: len(here) == 1)
    assert gone == ["sbx-1"]
    assert here.resolve(ME, DEFAULT_SCOPE, "sb1") is None


async def test_own_routes_are_not_reported_as_gone():
    gone: list[SandboxId] = []
    routes = Routes(MemoryStore(), forgotten=gone.append)
    async with following(routes):
        await routes.bind(route(1))
        await routes.unbind(SandboxId("sbx-1"))
        await routes.catch_up()
    assert gone == []


async def test_callers_at_once_share_a_look_that_began_after_they_came():
    store = HeldStore()
    routes, there = Routes(store), Routes(store)
    store.answered = anyio.Event()
    found: list[Any] = []

    async def find() -> None:
        found.append(await routes.find(ME, DEFAULT_SCOPE, "sb1"))

    async with anyio.create_task_group() as group:
        group.start_soon(find)
        await store.answered.wait()
        await there.bind(route(1))
        for _ in range(20):
            group.start_soon(find)
        await anyio.wait_all_tasks_blocked()
        store.let_through.set()
    assert found == [None] + [route(1)] * 20
    assert store.looks == 2


async def test_what_is_bound_here_during_a_look_stays_although_the_look_lacks_it():
    store = HeldStore()
    routes, store.answered = Routes(store), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(routes.catch_up)
        await store.answered.wait()
        await routes.bind(route(1))
        store.let_through.set()
    assert routes.get(SandboxId("sbx-1")) == route(1)
    await routes.catch_up()
    assert len(routes) == 1


async def test_what_is_unbound_here_during_a_look_stays_away_although_the_look_has_it():
    store = HeldStore()
    routes, there = Routes(store), Routes(store)
    await there.bind(route(1))
    await routes.catch_up()
    await there.bind(route(1, moved=1))
    store.answered = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(routes.catch_up)
        await store.answered.wait()
        await routes.unbind(SandboxId("sbx-1"))
        store.let_through.set()
    assert len(routes) == 0
    await routes.catch_up()
    assert len(routes) == 0


async def test_while_the_store_is_away_known_routes_resolve_and_unknown_ones_fail_typed():
    store = HeldStore()
    routes, there = Routes(store), Routes(store)
    await there.bind(route(1))
    async with following(routes):
        await until(lambda: len(routes))
        store.away = True
        assert await routes.find(ME, DEFAULT_SCOPE, "sb1") == route(1)
        with pytest.raises(ConnectFailed):
            await routes.find(ME, DEFAULT_SCOPE, "sb2")
        with pytest.raises(ConnectFailed):
            await routes.bind(route(3))
        assert routes.get(SandboxId("sbx-3")) is None
        store.away = False
        await there.bind(route(2))
        await until(lambda: routes.get(SandboxId("sbx-2")))


async def test_callers_at_once_share_a_look_that_fails_too():
    store = HeldStore()
    routes, store.away, store.answered = Routes(store), True, anyio.Event()
    failed: list[ConnectFailed] = []

    async def find() -> None:
        with pytest.raises(ConnectFailed, match="away") as caught:
            await routes.find(ME, DEFAULT_SCOPE, "sb1")
        failed.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(find)
        await store.answered.wait()
        for _ in range(20):
            group.start_soon(find)
        await anyio.wait_all_tasks_blocked()
        store.let_through.set()
    assert (len(failed), store.looks) == (21, 2)
    assert len({id(error) for error in failed}) == 21  # each has a traceback of its own


async def test_a_follower_looks_again_soon_after_a_look_that_failed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ash_router.routes.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("ash_router.routes.BACKSTOP_SECONDS", 3600.0)
    store = HeldStore()
    routes, store.away = Routes(store), True
    await MemoryStore.put_route(store, _record(1))  # before it subscribes, so it never hears of it
    async with following(routes):
        await until(lambda: store.looks > 2)
        assert len(routes) == 0
        store.away = False
        await until(lambda: len(routes) == 1)
        looks = store.looks
        await anyio.wait_all_tasks_blocked()
        assert store.looks == looks


async def test_who_is_far_behind_is_told_everything():
    store = MemoryStore()
    routes, there = Routes(store), Routes(store)
    await there.bind(route(1))
    await there.bind(route(2))
    await routes.catch_up()
    await there.unbind(SandboxId("sbx-1"))
    for number in range(3, CHANGES_REMEMBERED + 10):
        await there.bind(route(number))
    await routes.catch_up()
    assert len(routes) == len(there) == CHANGES_REMEMBERED + 8
    assert routes.get(SandboxId("sbx-1")) is None


async def test_a_flushed_store_is_not_believed_before_it_can_be_full_again():
    now = 0.0
    store, gone = HeldStore(), list[SandboxId]()
    routes = Routes(store, forgotten=gone.append, clock=lambda: now)
    there = Routes(store)
    for number in (1, 2):
        await there.bind(route(number))
    await routes.catch_up()
    for number in (1, 2):
        await store.drop_route(SandboxId(f"sbx-{number}"))
    store.anew = True
    await routes.catch_up()
    assert len(routes) == 2
    await store.put_route({**_record(1)})
    now = REFILL_SECONDS - 0.1
    await routes.catch_up()
    assert len(routes) == 2 and gone == []
    now = REFILL_SECONDS
    await routes.catch_up()
    assert [r.sandbox_id for r in routes.of(ME, EVERY_SCOPE)] == ["sbx-1"] and gone == ["sbx-2"]


async def test_scopes_and_owners_come_over_as_they_were():
    store = MemoryStore()
    here, there = Routes(store), Routes(store)
    await there.bind(route(1, scope="run42"))
    await here.catch_up()
    assert here.resolve(ME, Scope("run42"), "sb1") == route(1, scope="run42")
    assert here.resolve(ME, DEFAULT_SCOPE, "sb1") is None
    bound = Principal("me", frozenset({DEFAULT_SCOPE}))
    assert await here.find(bound, EVERY_SCOPE, "sb1") is None


async def test_under_every_scope_a_name_of_the_default_one_wins_for_those_who_see_it():
    routes = Routes(MemoryStore())
    default, red, blue = [
        replace(route(number, scope=scope), session=SessionName("box"))
        for number, scope in enumerate((DEFAULT_SCOPE, "red", "blue"))
    ]
    for each in (default, red, blue):
        await routes.bind(each)
    assert routes.resolve(ME, EVERY_SCOPE, "box") == default
    assert routes.resolve(Principal("me", frozenset({"red"})), EVERY_SCOPE, "box") == red
    assert routes.resolve(Principal("me", frozenset({"red", "blue"})), EVERY_SCOPE, "box") is None
    assert routes.resolve(Principal("me", frozenset({"red"})), EVERY_SCOPE, default.sandbox_id) is None


def _record(number: int) -> dict[str, Any]:
    known = route(number)
    return {
        "sandbox_id": known.sandbox_id,
        "owner": known.owner,
        "scope": known.scope,
        "session": known.session,
        "endpoint": {"unix": None, "host": known.endpoint.host, "port": known.endpoint.port},
        "tool_names": dict(known.tool_names),
    }


async def test_an_alias_names_a_sandbox_on_every_process_while_it_lives():
    store = MemoryStore()
    here, there = Routes(store), Routes(store)
    await here.bind(replace(route(1, owner="me"), alias="trainer-1"))
    await here.bind(route(2, owner="me"))
    assert await there.holder("trainer-1") == "sbx-1"
    assert await there.holder("trainer-2") is None
    assert await there.holder("sbx-2") is None  # an id is no alias
    for routes in (here, there):
        found = routes.resolve(ME, DEFAULT_SCOPE, "trainer-1")
        assert found is not None and found.sandbox_id == "sbx-1"
        assert routes.resolve(YOU, EVERY_SCOPE, "trainer-1") is None
    moved = Endpoint(unix="/moved")
    await here.bind(replace(route(1, owner="me"), endpoint=moved, alias="trainer-1"))
    renewed = here.named("trainer-1")
    assert renewed is not None and renewed.endpoint.unix == "/moved"
    await here.unbind(SandboxId("sbx-1"))
    assert await here.holder("trainer-1") is None
    assert await there.holder("trainer-1") == "sbx-1"  # until it hears of the end
    await there.catch_up()
    assert await there.holder("trainer-1") is None


def shares(version: int, *ids: str) -> Shares:
    held = (Share(id=share, sha256="0", tools=("run",), created_at=0.0) for share in ids)
    return Shares(version, tuple(held))


async def test_older_news_gives_no_share_back():
    store = HeldStore()
    here, there = Routes(store), Routes(store)
    old, new = replace(route(1), shares=shares(1, "gone", "kept")), replace(route(1), shares=shares(2, "kept"))
    await there.bind(old)
    await here.bind(old)
    await there.bind(new)
    await here.bind(old)
    assert here.shared("gone") is not None, "it has not heard of it yet"
    await here.catch_up()
    for routes in (here, there):
        assert routes.shared("gone") is None
        found = routes.shared("kept")
        assert found is not None and (found.sandbox_id, found.names) == (old.id, {old.id, old.session})
    await store.drop_route(old.id)
    await here.bind(old)
    assert here.shared("gone") is None
    assert [record["shares"]["version"] for record in await store.routes()] == [2]
    await here.unbind(old.id)
    assert here.shared("kept") is None


async def test_a_store_that_lacks_shares_for_now_lets_nobody_be_refused_for_it():
    store = HeldStore()
    routes = Routes(store)
    await routes.learn_shares()
    store.anew = True
    with pytest.raises(ConnectFailed):
        await routes.learn_shares()
