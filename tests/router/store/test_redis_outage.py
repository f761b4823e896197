"""Redis stopped, restarted, flushed, paused and full, also under load."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from ash_mcp.errors import ConnectFailed
from ash_mcp.types import DEFAULT_SCOPE, SandboxId, Scope, SessionName
from ash_router.store.base import LOST, Shelf
from ash_router.store.redis import RedisStore, opening
from ash_router.store.redis.link import Link
from tests.redis_server import RedisServer, running_redis
from tests.router.relay_parts import Clock
from tests.router.store.redis_parts import HURRY, PATIENCE, hurried, open_quick, record, until

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

ONE, TWO = SandboxId("sbx-1"), SandboxId("sbx-2")
SB1 = SessionName("sb1")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
async def store(server: RedisServer) -> AsyncGenerator[RedisStore]:
    async with open_quick(server, "ash") as store:
        yield store


@pytest.fixture
def grace(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By this clock a store that was flushed takes no new names for a while."""
    clock = Clock()
    monkeypatch.setattr(opening, "time", SimpleNamespace(monotonic=clock))
    return clock


class Restored:
    """Counts the calls of a store that lost what it held."""

    def __init__(self, store: RedisStore, fail: int = 0) -> None:
        self.calls = 0
        self._fail = fail
        store.on_flushed(self._restore)

    async def _restore(self) -> None:
        self.calls += 1
        if self.calls <= self._fail:
            raise ConnectFailed("the backend is away")


async def test_while_it_is_stopped_steps_fail_soon_and_typed_and_all_heals(server: RedisServer, store: RedisStore):
    server.stop()
    took: list[float] = []
    with hurried(store):
        for step in (
            store.reserve_session("me", DEFAULT_SCOPE, None, ONE),
            store.routes(),
            store.put_route(record(1)),
            store.claim_key("me", DEFAULT_SCOPE, "key", ONE),
            store.announce_replica("here", {}, 10),
            store.last_calls(),
        ):
            start = time.monotonic()
            with pytest.raises(ConnectFailed, match="try again in a moment") as caught:
                await step
            took.append(time.monotonic() - start)
            assert caught.value.retryable and not caught.value.trainable
            reason = store.unready()
            assert reason is not None and f"127.0.0.1:{server.port}" in reason
    assert min(took) < HURRY + 0.3  # a busy machine adds to some
    server.start()
    await until(lambda: store.unready() is None)
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, ONE) == "sb1"


async def test_what_is_given_back_while_it_is_paused_is_given_back_later(server: RedisServer, store: RedisStore):
    await store.put_route(record(1))
    await store.put_route(record(2))
    await store.reserve_session("me", DEFAULT_SCOPE, None, ONE)
    await store.claim_key("me", DEFAULT_SCOPE, "key", ONE)
    await store.announce_replica("here", {}, 30)
    server.pause()
    with hurried(store), pytest.raises(ConnectFailed):
        await store.routes()
    with anyio.fail_after(PATIENCE / 2):  # none of these asks Redis, which would not answer
        await store.drop_route(ONE)
        await store.release_session("me", DEFAULT_SCOPE, SB1, ONE)
        await store.release_key("me", DEFAULT_SCOPE, "key", ONE)
        await store.withdraw_replica("here")
        await store.touch({TWO: 5.0})
        await store.touch({TWO: 4.0})
    server.resume()
    await until(lambda: store.unready() is None)
    await store.settle()
    assert [kept["sandbox_id"] for kept in await store.routes()] == [TWO]
    assert await store.reserve_session("me", DEFAULT_SCOPE, SB1, TWO) == "sb1"
    assert await store.claim_key("me", DEFAULT_SCOPE, "key", TWO) == TWO
    assert not await store.replicas()
    assert dict(await store.last_calls()) == {TWO: 5.0}


async def test_what_is_taken_again_is_not_given_back_later(server: RedisServer, store: RedisStore):
    await store.reserve_session("me", DEFAULT_SCOPE, SB1, ONE)
    await store.put_route(record(1))
    server.pause()
    with hurried(store):
        with pytest.raises(ConnectFailed):
            await store.routes()
        await store.release_session("me", DEFAULT_SCOPE, SB1, ONE)
        await store.drop_route(ONE)
        with pytest.raises(ConnectFailed):
            await store.reserve_session("me", DEFAULT_SCOPE, SB1, ONE)
        with pytest.raises(ConnectFailed):
            await store.put_route(record(1))
    server.resume()
    await until(lambda: store.unready() is None)
    await store.settle()
    assert [kept["sandbox_id"] for kept in await store.routes()] == [ONE]
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, ONE) == "sb1"


async def test_a_publisher_that_was_cut_off_says_later_that_something_was_lost(
    server: RedisServer, store: RedisStore, monkeypatch: pytest.MonkeyPatch
):
    async with open_quick(server, "ash") as other, other.subscribe("news") as news:

        async def cut_off(*_: Any) -> None:
            raise ConnectFailed("only this replica cannot reach Redis")

        with monkeypatch.context() as patched:
            patched.setattr(Link, "do", cut_off)
            await store.publish("news", "unsaid")
        await store.settle()
        await store.publish("news", "said")
        with anyio.fail_after(30):
            assert [await anext(news), await anext(news)] == [LOST, "said"]


async def test_readers_learn_that_their_connection_was_lost(server: RedisServer, store: RedisStore):
    async with open_quick(server, "ash") as other, store.subscribe("news") as news, store.subscribe("more") as more:
        server.ask("CLIENT", "KILL", "TYPE", "pubsub")
        with anyio.fail_after(30):
            assert [await anext(news), await anext(more)] == [LOST, LOST]
            await other.publish("news", "after")
            assert await anext(news) == "after"


async def test_a_subscription_made_while_it_is_away_begins_when_it_is_back(server: RedisServer, store: RedisStore):
    server.stop()
    with anyio.fail_after(PATIENCE / 2), hurried(store):
        async with store.subscribe("news") as news:
            server.start()
            assert await anext(news) == LOST
            await until(lambda: store.unready() is None)
            await store.publish("news", "hello")
            while (said := await anext(news)) == LOST:  # a server that is slow to start may be lost twice
                pass
            assert said == "hello"


async def test_one_channel_ends_without_harm_to_another(store: RedisStore):
    with anyio.fail_after(30):
        async with store.subscribe("a") as a:
            for number in range(20):
                async with store.subscribe("b") as b:
                    await store.publish("b", f"{number}")
                    assert await anext(b) == f"{number}"
            with anyio.move_on_after(0.01):
                async with store.subscribe("b") as b:
                    await anext(b)
            await store.publish("a", "still here")
            assert await anext(a) == "still here"


async def test_after_a_flush_it_asks_to_be_filled_again_until_that_is_done(server: RedisServer, store: RedisStore):
    restored = Restored(store, fail=2)
    server.ask("FLUSHALL")
    await until(lambda: restored.calls)
    assert "put back" in (store.unready() or "")
    await until(lambda: store.unready() is None)
    assert restored.calls == 3


async def test_every_replica_is_asked_after_a_flush(server: RedisServer, store: RedisStore):
    async with open_quick(server, "ash") as other:
        both = [Restored(store), Restored(other)]
        server.ask("FLUSHALL")
        await until(lambda: all(restored.calls == 1 for restored in both))


async def test_a_restart_asks_as_well_with_and_without_saved_data(tmp_path: Path, server: RedisServer):
    async with open_quick(server, "ash") as store:
        restored = Restored(store)
        for number, saves in enumerate((False, True), 1):
            await store.put_route(record(1))
            if saves:
                server.ask("SAVE")
            server.kill()
            server.start()
            await until(lambda number=number: restored.calls == number)
            await until(lambda: store.unready() is None)
            assert len(await store.routes()) == int(saves)


async def test_numbers_still_only_grow_after_a_flush(server: RedisServer, store: RedisStore, grace: Clock):
    restored = Restored(store)
    async with open_quick(server, "ash") as other:
        for sandbox_id in (ONE, TWO):
            await store.reserve_session("me", DEFAULT_SCOPE, None, sandbox_id)
        server.ask("FLUSHALL")
        for taking in (
            store.reserve_session("me", DEFAULT_SCOPE, None, SandboxId("sbx-3")),
            other.reserve_session("me", DEFAULT_SCOPE, SessionName("sb1"), SandboxId("sbx-3")),
            other.claim_key("me", DEFAULT_SCOPE, "key", TWO),
        ):
            with pytest.raises(ConnectFailed, match="filled again"):
                await taking
        assert await store.reserve_session("me", DEFAULT_SCOPE, SB1, ONE, restoring=True) == "sb1"
        assert await store.claim_key("me", DEFAULT_SCOPE, "key", ONE, restoring=True) == ONE
        await until(lambda: restored.calls and store.refilling and other.refilling)
        grace.now += 1
        await until(lambda: not store.unready() and not other.unready())
        assert await other.claim_key("me", DEFAULT_SCOPE, "key", TWO) == ONE
        assert await other.reserve_session("me", DEFAULT_SCOPE, None, SandboxId("sbx-4")) == "sb3"


async def test_numbers_still_only_grow_where_redis_evicted_the_names(server: RedisServer, store: RedisStore):
    await store.reserve_session("me", DEFAULT_SCOPE, None, ONE)
    assert server.ask("DEL", 'ash:names:["me",""]') == 1
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, TWO) == "sb2"


async def test_scripts_that_the_server_forgot_are_sent_again(server: RedisServer, store: RedisStore):
    await store.put_route(record(1))
    server.ask("SCRIPT", "FLUSH")
    await store.put_route(record(2))
    assert len(await store.routes()) == 2


async def test_a_full_server_is_a_typed_failure_and_ending_things_still_works(server: RedisServer, store: RedisStore):
    await store.put_route(record(1))
    server.ask("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(ConnectFailed, match="maxmemory"):
        await store.put_route(record(2))
    await store.drop_route(ONE)
    server.ask("CONFIG", "SET", "maxmemory", "0")
    await until(lambda: store.unready() is None)
    await store.settle()
    assert await store.routes() == []


@pytest.mark.parametrize("trouble", ["stop", "restart", "flush", "pause", "kill-connections"])
async def test_under_load_every_step_is_done_or_fails_typed_within_its_bound(server: RedisServer, trouble: str):
    patience, slowest, late = 1.0, 0.0, 0.0
    numbers = itertools.count()
    ended = anyio.Event()

    async def work(store: RedisStore) -> None:
        nonlocal slowest
        while not ended.is_set():
            sandbox_id = SandboxId(f"sbx-{next(numbers)}")
            start = time.monotonic()
            try:
                await store.put_route({"sandbox_id": sandbox_id})
                names.append(await store.reserve_session("me", DEFAULT_SCOPE, None, sandbox_id))
                await store.claim_key("me", DEFAULT_SCOPE, "key", sandbox_id)
                await store.touch({sandbox_id: 1.0})
                await store.publish("news", sandbox_id)
            except ConnectFailed as error:
                assert error.retryable
            await store.release_key("me", DEFAULT_SCOPE, "key", sandbox_id)
            await store.drop_route(sandbox_id)
            slowest = max(slowest, time.monotonic() - start)
            await anyio.sleep(0.005)

    async def notice() -> None:
        """Add up how long this process did not get to run what was due."""
        nonlocal late
        while not ended.is_set():
            due = time.monotonic() + 0.01
            await anyio.sleep(0.01)
            late += time.monotonic() - due

    names: list[str] = []
    async with open_quick(server, "ash") as one, open_quick(server, "ash") as two:
        with hurried(one, two, seconds=patience):
            async with anyio.create_task_group() as group:
                group.start_soon(notice)
                for number in range(10):
                    group.start_soon(work, (one, two)[number % 2])
                await until(lambda: len(names) > 20)
                await _make(trouble, server)
                before = len(names)
                await until(lambda: len(names) > before + 50 and not one.unready() and not two.unready())
                ended.set()
        assert len(names) == len(set(names)), "a number was given twice"
        for store in (one, two):
            await store.settle()
        assert await one.routes() == []
        assert await one.claim_key("me", DEFAULT_SCOPE, "key", ONE) == ONE
        assert slowest < 3 * patience + late


async def _make(trouble: str, server: RedisServer) -> None:
    if trouble == "stop":
        server.stop()
        await anyio.sleep(0.5)
        server.start()
    elif trouble == "restart":
        server.kill()
        server.start()
    elif trouble == "flush":
        server.ask("FLUSHALL")
    elif trouble == "pause":
        server.ask("CLIENT", "PAUSE", 700, "ALL")
        await anyio.sleep(0.7)
    else:
        for kind in ("normal", "pubsub"):
            server.ask("CLIENT", "KILL", "TYPE", kind)


async def test_a_call_that_is_told_before_a_flushed_store_is_filled_again_is_not_lost(
    server: RedisServer, store: RedisStore, grace: Clock
):
    await store.put_route(record(1))
    server.ask("FLUSHALL")
    await store.touch({ONE: 5.0})
    assert dict(await store.last_calls()) == {ONE: 5.0}


async def test_last_calls_of_what_ended_while_the_store_was_filled_again_do_not_stay(
    server: RedisServer, store: RedisStore, grace: Clock
):
    await store.put_route(record(1))
    server.ask("FLUSHALL")
    await store.touch({ONE: 5.0, TWO: 6.0})  # the second has ended meanwhile, and nobody drops its route
    await store.put_route(record(1))
    await until(lambda: store.refilling)
    grace.now += 1
    await until(lambda: not store.refilling)
    await store.touch({ONE: 7.0})
    assert dict(await store.last_calls()) == {ONE: 7.0}


async def test_a_scope_is_forgotten_a_day_after_its_last_sandbox(server: RedisServer, store: RedisStore):
    for scope, sandbox_id in (("old", ONE), ("new", ONE), ("new", TWO)):
        await store.reserve_session("me", Scope(scope), None, sandbox_id)
        await store.release_session("me", Scope(scope), SB1, sandbox_id)
    await store.release_session("me", Scope("new"), SessionName("sb2"), TWO)
    old, new = server.ask("ZRANGE", "ash:idle", 0, -1)
    server.ask("ZINCRBY", "ash:idle", -86_401_000_000, old)
    await store.reserve_session("me", Scope("new"), None, ONE)
    assert server.ask("ZRANGE", "ash:idle", 0, -1) == [old]
    await store.release_session("me", Scope("new"), SessionName("sb3"), ONE)
    assert server.ask("ZRANGE", "ash:idle", 0, -1) == [new]
    assert (server.ask("EXISTS", old), server.ask("EXISTS", new)) == (0, 1)


async def test_numbers_that_a_flushed_store_is_told_are_forgotten_in_time_as_well(
    server: RedisServer, store: RedisStore, grace: Clock
):
    await store.reserve_session("me", DEFAULT_SCOPE, None, ONE)
    await store.release_session("me", DEFAULT_SCOPE, SB1, ONE)
    server.ask("FLUSHALL")
    await until(lambda: store.refilling)
    grace.now += 1
    await until(lambda: not store.refilling)
    assert len(server.ask("ZRANGE", "ash:idle", 0, -1)) == 1


async def test_texts_are_not_waited_for_where_it_is_known_to_be_away(server: RedisServer, store: RedisStore):
    shelf = Shelf("books", most=3, most_bytes=100, seconds=60.0)
    with hurried(store):
        server.stop()
        await until(lambda: store.unready() is not None)
    with anyio.fail_after(PATIENCE / 2):
        for step in (store.keep(shelf, "a", "text"), store.kept(shelf)):
            with pytest.raises(ConnectFailed):
                await step
