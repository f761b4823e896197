"""How a replica announces itself and follows the others, with the store there, away and emptied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
import pytest

from ash_mcp.errors import ConnectFailed
from ash_router.replicas.membership import Replicas, new_replica_id, split_address
from ash_router.store.memory import MemoryStore

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class MoodyStore(MemoryStore):
    """A store that can be away or silent, and counts how often it is asked."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.away = self.silent = False
        self.asked = 0

    async def announce_replica(self, replica: str, record: Mapping[str, Any], ttl_seconds: float) -> None:
        await self._mood()
        await super().announce_replica(replica, record, ttl_seconds)

    async def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        self.asked += 1
        await self._mood()
        return await super().replicas()

    async def _mood(self) -> None:
        if self.silent:
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        if self.away:
            raise ConnectFailed("the store is away")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MoodyStore:
    return MoodyStore(clock)


def replica(store: MoodyStore, clock: Clock, name: str, **more: Any) -> Replicas:
    return Replicas(store, name, f"{name}:1", clock=clock, **more)


def test_ids_are_short_and_random():
    made = {new_replica_id() for _ in range(100)}
    assert len(made) == 100
    assert all(len(one) == 8 and one.isascii() and one.isalnum() and one == one.lower() for one in made)


async def test_replicas_find_each_other_with_what_they_say_of_themselves(store: MoodyStore, clock: Clock):
    pending = ["sbx-1"]
    one = replica(store, clock, "one", details=lambda: {"pending": list(pending)})
    two = replica(store, clock, "two")
    for _ in range(2):
        await one.tick()
        await two.tick()
    assert one.living() == two.living() == {"one", "two"}
    assert await two.address_of("one") == "one:1"
    assert await two.address_of("two") == "two:1"
    assert two.others()["one"]["pending"] == ["sbx-1"]
    pending.clear()
    await one.tick()
    await two.tick()
    assert two.others()["one"]["pending"] == []


async def test_an_unknown_replica_is_asked_for_at_once_and_a_known_one_is_not(store: MoodyStore, clock: Clock):
    one, two = replica(store, clock, "one"), replica(store, clock, "two")
    await two.tick()
    await one.tick()
    asked = store.asked
    assert await two.address_of("one") == "one:1"
    assert await two.address_of("one") == "one:1"
    assert store.asked == asked + 1
    assert await two.address_of("nobody") is None


async def test_many_who_ask_at_once_share_the_question(store: MoodyStore, clock: Clock):
    one = replica(store, clock, "one")
    await one.tick()
    asked = store.asked
    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(one.address_of, "nobody")
    assert store.asked - asked <= 2


async def test_what_was_known_holds_for_a_while_without_the_store(store: MoodyStore, clock: Clock):
    one, two = replica(store, clock, "one"), replica(store, clock, "two")
    await two.tick()
    await one.tick()
    store.away = True
    clock.now += 14
    await one.tick()
    assert await one.address_of("two") == "two:1"
    assert await one.address_of("nobody") is None
    clock.now += 2
    assert await one.address_of("two") is None
    assert one.living() == {"one"}
    store.away = False
    await two.tick()
    assert await one.address_of("two") == "two:1"


async def test_a_silent_store_is_not_waited_for(store: MoodyStore, clock: Clock):
    one = replica(store, clock, "one")
    await one.tick()
    store.silent = True
    with anyio.fail_after(30):
        assert await one.address_of("nobody") is None


async def test_a_replica_that_left_is_told_of_once(store: MoodyStore, clock: Clock):
    one, two = replica(store, clock, "one"), replica(store, clock, "two")
    left: list[str] = []
    one.on_left.append(left.append)
    await two.tick()
    await one.tick()
    for _ in range(8):
        clock.now += 1
        await one.tick()
    assert left == ["two"]
    assert one.living() == {"one"}


async def test_an_emptied_store_is_told_again_before_anybody_is_missed(store: MoodyStore, clock: Clock):
    one, two = replica(store, clock, "one"), replica(store, clock, "two")
    left: list[str] = []
    one.on_left.append(left.append)
    await two.tick()
    await one.tick()
    await store.withdraw_replica("one")
    await store.withdraw_replica("two")
    clock.now += 1
    await one.tick()
    assert await one.address_of("two") == "two:1"
    await two.tick()
    clock.now += 1
    await one.tick()
    assert (one.living(), left) == ({"one", "two"}, [])


async def test_an_outage_of_the_store_makes_no_replica_dead(store: MoodyStore, clock: Clock):
    one, two = replica(store, clock, "one"), replica(store, clock, "two")
    left: list[str] = []
    one.on_left.append(left.append)
    for _ in range(6):
        clock.now += 1
        await two.tick()
        await one.tick()
    assert one.can_judge()
    store.away = True
    for _ in range(10):
        clock.now += 1
        await two.tick()
        await one.tick()
    assert not one.can_judge()
    store.away = False
    await one.tick()  # first of all: `two` has said nothing yet
    assert "two" in one.living() and not one.can_judge() and await one.address_of("two") == "two:1"
    assert await one.leave()
    clock.now += 2
    await two.tick()
    await one.tick()
    clock.now += 2
    await one.tick()
    assert (one.can_judge(), one.living(), left) == (True, {"one", "two"}, [])


async def test_one_that_died_in_an_outage_is_found_dead_after_it(store: MoodyStore, clock: Clock):
    one, two = replica(store, clock, "one"), replica(store, clock, "two")
    await two.tick()
    await one.tick()
    store.away = True
    for _ in range(10):
        clock.now += 1
        await one.tick()
    store.away = False
    for _ in range(6):
        clock.now += 1
        await one.tick()
    assert one.can_judge() and one.living() == {"one"}


async def test_a_replica_that_begins_judges_nobody_at_once(store: MoodyStore, clock: Clock):
    one = replica(store, clock, "one")
    await one.tick()
    assert not one.can_judge()
    for _ in range(4):
        clock.now += 1
        await one.tick()
    assert one.can_judge() and not await one.leave()


async def test_running_announces_first_and_withdraws_at_the_end(store: MoodyStore, clock: Clock):
    one = replica(store, clock, "one")
    async with anyio.create_task_group() as group:
        await group.start(one.run)
        assert set(await store.replicas()) == {"one"}
        group.cancel_scope.cancel()
    assert set(await store.replicas()) == set()


async def test_running_starts_without_the_store(store: MoodyStore, clock: Clock):
    store.away = True
    one = replica(store, clock, "one")
    async with anyio.create_task_group() as group:
        with anyio.fail_after(5):
            await group.start(one.run)
        group.cancel_scope.cancel()


def test_addresses_are_hosts_with_ports():
    assert split_address("10.0.0.7:8421") == ("10.0.0.7", 8421)
    assert split_address("[::1]:1") == ("::1", 1)
    assert split_address("hive-0.hives:65535") == ("hive-0.hives", 65535)
    for wrong in ("", "host", "host:", ":1", "host:0", "host:65536", "host:x", "::1:5", "[]:1", "a b:1", "x/y:1"):
        with pytest.raises(ValueError, match="host:port"):
            split_address(wrong)
