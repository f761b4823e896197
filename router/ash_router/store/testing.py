"""The suite that every `Store` passes. Implementers call `check_store`; ours run the checks one by one.

The checks use real, short times, because a store's clock may be another machine's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Final

from ash_mcp.errors import LeaseHeld, LeaseLost, SessionTaken
from ash_mcp.types import DEFAULT_SCOPE, SandboxId, Scope, SessionName
from ash_router.store.base import LOST, MAX_REPLICAS, ROUTE_NEWS, Lease, Store

__all__ = ["STORE_CHECKS", "check_store"]

Check = Callable[[Store], Awaitable[None]]

_LONG: Final = 60.0
_SHORT: Final = 0.05
_PATIENCE: Final = 10.0
ONE, TWO, THREE = SandboxId("sbx-one"), SandboxId("sbx-two"), SandboxId("sbx-three")
RUN: Final = Scope("run42")


async def check_store(make: Callable[[], AbstractAsyncContextManager[Store]]) -> None:
    """Run every check against a fresh store of its own.

    Raises:
        AssertionError: The store does not do what `Store` promises; the traceback names the check.
    """
    for check in STORE_CHECKS:
        async with make() as store:
            await check(store)


async def raises(error: type[Exception], step: Awaitable[Any]) -> Exception:
    """Await `step` and return the error of this type that it must raise."""
    try:
        await step
    except error as found:
        return found
    raise AssertionError(f"expected {error.__name__}, and nothing was raised")


def _route(sandbox_id: SandboxId, generation: int = 1, **more: Any) -> dict[str, Any]:
    return {"sandbox_id": sandbox_id, "generation": generation, **more}


async def routes_are_kept_in_the_order_in_which_they_came(store: Store) -> None:
    for sandbox_id in (TWO, ONE, THREE):
        await store.put_route(_route(sandbox_id))
    await store.put_route(_route(TWO, 2))
    assert [record["sandbox_id"] for record in await store.routes()] == [TWO, ONE, THREE]


async def a_route_keeps_its_whole_record(store: Store) -> None:
    record = _route(ONE, endpoint={"unix": "/x", "host": None, "port": None}, tool_names={"a": "ä"}, scope="")
    await store.put_route(record)
    assert [dict(kept) for kept in await store.routes()] == [record]


async def a_route_of_an_earlier_generation_does_not_replace_a_later_one(store: Store) -> None:
    await store.put_route(_route(ONE, 2, session="new"))
    await store.put_route(_route(ONE, 1, session="old"))
    assert [record["session"] for record in await store.routes()] == ["new"]
    await store.put_route(_route(ONE, 2, session="newer"))
    assert [record["session"] for record in await store.routes()] == ["newer"]


async def dropping_a_route_is_idempotent(store: Store) -> None:
    await store.put_route(_route(ONE))
    await store.drop_route(ONE)
    await store.drop_route(ONE)
    assert await store.routes() == []


async def whoever_knows_a_version_is_told_what_changed_since(store: Store) -> None:
    await store.put_route(_route(ONE))
    await store.put_route(_route(TWO))
    start = await store.route_changes(None)
    assert start.complete and [dict(record) for record in start.bound] == [_route(ONE), _route(TWO)]
    await store.put_route(_route(THREE))
    await store.put_route(_route(TWO, 2))
    await store.drop_route(ONE)
    later = await store.route_changes(start.version)
    assert not later.complete
    assert [dict(record) for record in later.bound] == [_route(THREE), _route(TWO, 2)]
    assert list(later.unbound) == [ONE]
    end = await store.route_changes(later.version)
    assert (end.version, end.bound, end.unbound, end.complete) == (later.version, [], [], False)


async def a_changed_route_is_news_and_an_unchanged_one_is_not(store: Store) -> None:
    async with store.subscribe(ROUTE_NEWS) as news:
        await store.put_route(_route(ONE))
        start = await store.route_changes(None)
        await store.put_route(_route(ONE))
        await store.put_route(_route(TWO, 2))
        await store.put_route(_route(TWO, 1))
        await store.drop_route(THREE)
        await store.drop_route(ONE)
        async with asyncio.timeout(_PATIENCE):
            assert [await anext(news) for _ in range(3)] == [ONE, TWO, ONE]
        assert [record["sandbox_id"] for record in (await store.route_changes(start.version)).bound] == [TWO]


async def session_numbers_count_up_and_are_not_given_again(store: Store) -> None:
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, ONE) == "sb1"
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, TWO) == "sb2"
    await store.release_session("me", DEFAULT_SCOPE, SessionName("sb1"), ONE)
    await store.release_session("me", DEFAULT_SCOPE, SessionName("sb2"), TWO)
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, THREE) == "sb3"


async def a_sandbox_that_asks_again_gets_the_name_that_it_holds(store: Store) -> None:
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, ONE) == "sb1"
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, ONE) == "sb1"
    await store.release_session("me", DEFAULT_SCOPE, SessionName("sb1"), ONE)
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, ONE) == "sb2"


async def what_a_sandbox_held_can_be_put_back(store: Store) -> None:
    box = SessionName("box")
    for _ in range(2):
        assert await store.reserve_session("me", DEFAULT_SCOPE, box, ONE, restoring=True) == box
        assert await store.claim_key("me", DEFAULT_SCOPE, "k", ONE, restoring=True) == ONE
    await raises(SessionTaken, store.reserve_session("me", DEFAULT_SCOPE, box, TWO, restoring=True))
    assert await store.claim_key("me", DEFAULT_SCOPE, "k", TWO) == ONE


async def a_chosen_number_is_skipped_even_after_it_is_free(store: Store) -> None:
    await store.reserve_session("me", DEFAULT_SCOPE, SessionName("sb2"), ONE)
    await store.release_session("me", DEFAULT_SCOPE, SessionName("sb2"), ONE)
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, TWO) == "sb1"
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, THREE) == "sb3"


async def owners_and_scopes_have_names_of_their_own(store: Store) -> None:
    for owner, scope in (("me", DEFAULT_SCOPE), ("you", DEFAULT_SCOPE), ("me", RUN)):
        assert await store.reserve_session(owner, scope, None, ONE) == "sb1"
        assert await store.reserve_session(owner, scope, SessionName("box"), TWO) == "box"


async def a_taken_name_is_refused_until_its_holder_lets_it_go(store: Store) -> None:
    box = SessionName("box")
    await store.reserve_session("me", DEFAULT_SCOPE, box, ONE)
    assert await store.reserve_session("me", DEFAULT_SCOPE, box, ONE) == box
    taken = await raises(SessionTaken, store.reserve_session("me", DEFAULT_SCOPE, box, TWO))
    assert isinstance(taken, SessionTaken) and taken.data["holder"] == ONE
    await store.release_session("me", DEFAULT_SCOPE, box, TWO)
    await raises(SessionTaken, store.reserve_session("me", DEFAULT_SCOPE, box, TWO))
    await store.release_session("me", DEFAULT_SCOPE, box, ONE)
    await store.release_session("me", DEFAULT_SCOPE, box, ONE)
    assert await store.reserve_session("me", DEFAULT_SCOPE, box, TWO) == box


async def of_many_who_want_one_name_one_gets_it(store: Store) -> None:
    async def reserve(number: int) -> bool:
        try:
            await store.reserve_session("me", DEFAULT_SCOPE, SessionName("box"), SandboxId(f"sbx-{number}"))
        except SessionTaken:
            return False
        return True

    assert sum(await asyncio.gather(*(reserve(number) for number in range(20)))) == 1


async def many_who_want_any_name_get_different_ones(store: Store) -> None:
    wanted = (store.reserve_session("me", DEFAULT_SCOPE, None, SandboxId(f"sbx-{n}")) for n in range(20))
    assert len(set(await asyncio.gather(*wanted))) == 20


async def an_idempotency_key_belongs_to_the_first_who_comes(store: Store) -> None:
    assert await store.claim_key("me", DEFAULT_SCOPE, "k", ONE) == ONE
    assert await store.claim_key("me", DEFAULT_SCOPE, "k", TWO) == ONE
    assert await store.claim_key("me", RUN, "k", TWO) == TWO
    assert await store.claim_key("you", DEFAULT_SCOPE, "k", THREE) == THREE
    await store.release_key("me", DEFAULT_SCOPE, "k", TWO)
    assert await store.claim_key("me", DEFAULT_SCOPE, "k", TWO) == ONE
    await store.release_key("me", DEFAULT_SCOPE, "k", ONE)
    await store.release_key("me", DEFAULT_SCOPE, "k", ONE)
    assert await store.claim_key("me", DEFAULT_SCOPE, "k", TWO) == TWO


async def a_lease_has_one_holder(store: Store) -> None:
    first = await store.grant("reaper", "a", _LONG)
    found = await raises(LeaseHeld, store.grant("reaper", "b", _LONG))
    assert isinstance(found, LeaseHeld) and found.data["holder"] == "a"
    other = await store.grant("another", "b", _LONG)
    assert (first.holder, other.holder) == ("a", "b")


async def its_holder_may_take_a_lease_again(store: Store) -> None:
    first = await store.grant("reaper", "a", _LONG)
    again = await store.grant("reaper", "a", 2 * _LONG)
    assert again.token == first.token
    assert again.expires_at > first.expires_at
    renewed = await store.renew(first, 3 * _LONG)
    assert (renewed.token, renewed.expires_at > again.expires_at) == (first.token, True)


async def a_released_lease_is_free_and_its_token_grows(store: Store) -> None:
    first = await store.grant("reaper", "a", _LONG)
    await store.release(first)
    await store.release(first)
    await raises(LeaseLost, store.renew(first, _LONG))
    second = await store.grant("reaper", "b", _LONG)
    assert second.token > first.token
    await store.release(first)
    await raises(LeaseHeld, store.grant("reaper", "a", _LONG))


async def an_expired_lease_is_lost_to_the_next(store: Store) -> None:
    first = await store.grant("reaper", "a", _SHORT)
    second = await _granted_in_the_end(store, "reaper", "b")
    assert second.token > first.token
    await raises(LeaseLost, store.renew(first, _LONG))
    await store.release(first)
    await store.renew(second, _LONG)


async def of_many_who_want_one_lease_one_gets_it(store: Store) -> None:
    async def take(number: int) -> bool:
        try:
            await store.grant("reaper", f"holder-{number}", _LONG)
        except LeaseHeld:
            return False
        return True

    assert sum(await asyncio.gather(*(take(number) for number in range(20)))) == 1


async def last_calls_never_go_backwards(store: Store) -> None:
    await store.touch({ONE: 100.0, TWO: 7.5})
    await store.touch({ONE: 50.0})
    assert dict(await store.last_calls()) == {ONE: 100.0, TWO: 7.5}
    await store.touch({ONE: 200.0})
    await store.touch({})
    assert (await store.last_calls())[ONE] == 200.0


async def dropping_a_route_drops_its_last_call(store: Store) -> None:
    await store.put_route(_route(ONE))
    await store.touch({ONE: 100.0, TWO: 100.0})
    await store.drop_route(ONE)
    assert dict(await store.last_calls()) == {TWO: 100.0}


async def announced_replicas_live_until_they_are_withdrawn(store: Store) -> None:
    assert dict(await store.replicas()) == {}
    await store.announce_replica("a", {"address": "10.0.0.1:9", "details": {"ä": ["x:y"]}}, _LONG)
    await store.announce_replica("b", {"address": None}, _LONG)
    await store.announce_replica("b", {"address": "b:1"}, _LONG)
    assert {name: dict(record) for name, record in (await store.replicas()).items()} == {
        "a": {"address": "10.0.0.1:9", "details": {"ä": ["x:y"]}},
        "b": {"address": "b:1"},
    }
    for _ in range(2):
        await store.withdraw_replica("a")
    await store.withdraw_replica("unknown")
    assert set(await store.replicas()) == {"b"}


async def a_replica_that_falls_silent_is_dead(store: Store) -> None:
    await store.announce_replica("living", {}, _LONG)
    await store.announce_replica("silent", {}, _SHORT)
    await store.announce_replica("renewed", {}, _SHORT)
    await store.announce_replica("renewed", {}, _LONG)
    await _silenced(store, "silent")
    assert set(await store.replicas()) == {"living", "renewed"}
    await store.announce_replica("silent", {"again": True}, _LONG)
    assert (await store.replicas())["silent"] == {"again": True}


async def of_too_many_replicas_those_that_end_first_are_dropped(store: Store) -> None:
    await store.announce_replica("first", {}, _LONG)
    announce = [store.announce_replica(f"replica-{n}", {}, 2 * _LONG) for n in range(MAX_REPLICAS)]
    for one in announce:
        await one
    kept = await store.replicas()
    assert len(kept) == MAX_REPLICAS and "first" not in kept


async def every_subscriber_hears_what_is_published_after_it_came(store: Store) -> None:
    await store.publish("news", "before")
    async with store.subscribe("news") as first, store.subscribe("news") as second:
        await store.publish("other", "elsewhere")
        for number in range(3):
            await store.publish("news", f"{number}")
        async with asyncio.timeout(_PATIENCE):
            for reader in (first, second):
                assert [await anext(reader) for _ in range(3)] == ["0", "1", "2"]
    await store.publish("news", "after")


async def a_subscriber_may_wait_for_what_comes_later(store: Store) -> None:
    async with store.subscribe("news") as reader:
        waiting = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        await store.publish("news", "now")
        async with asyncio.timeout(_PATIENCE):
            assert await waiting == "now"


async def a_slow_subscriber_loses_the_oldest_and_nobody_waits_for_it(store: Store) -> None:
    async with store.subscribe("news") as reader:
        async with asyncio.timeout(_PATIENCE):
            for number in range(1500):
                await store.publish("news", f"{number}")
            heard, is_told, gaps = -1, False, 0
            while heard != 1499:
                message = await anext(reader)
                if message == LOST:
                    is_told = True
                    continue
                is_gap = int(message) != heard + 1
                assert int(message) > heard and (is_told or not is_gap)
                heard, is_told, gaps = int(message), False, gaps + is_gap
            assert gaps


async def _granted_in_the_end(store: Store, name: str, holder: str) -> Lease:
    async with asyncio.timeout(_PATIENCE):
        while True:
            with suppress(LeaseHeld):
                return await store.grant(name, holder, _LONG)
            await asyncio.sleep(_SHORT / 5)


async def _silenced(store: Store, replica: str) -> None:
    async with asyncio.timeout(_PATIENCE):
        while True:
            if replica not in await store.replicas():
                return
            await asyncio.sleep(_SHORT / 5)


STORE_CHECKS: Sequence[Check] = (
    routes_are_kept_in_the_order_in_which_they_came,
    a_route_keeps_its_whole_record,
    a_route_of_an_earlier_generation_does_not_replace_a_later_one,
    dropping_a_route_is_idempotent,
    whoever_knows_a_version_is_told_what_changed_since,
    a_changed_route_is_news_and_an_unchanged_one_is_not,
    session_numbers_count_up_and_are_not_given_again,
    a_sandbox_that_asks_again_gets_the_name_that_it_holds,
    what_a_sandbox_held_can_be_put_back,
    a_chosen_number_is_skipped_even_after_it_is_free,
    owners_and_scopes_have_names_of_their_own,
    a_taken_name_is_refused_until_its_holder_lets_it_go,
    of_many_who_want_one_name_one_gets_it,
    many_who_want_any_name_get_different_ones,
    an_idempotency_key_belongs_to_the_first_who_comes,
    a_lease_has_one_holder,
    its_holder_may_take_a_lease_again,
    a_released_lease_is_free_and_its_token_grows,
    an_expired_lease_is_lost_to_the_next,
    of_many_who_want_one_lease_one_gets_it,
    last_calls_never_go_backwards,
    dropping_a_route_drops_its_last_call,
    announced_replicas_live_until_they_are_withdrawn,
    a_replica_that_falls_silent_is_dead,
    of_too_many_replicas_those_that_end_first_are_dropped,
    every_subscriber_hears_what_is_published_after_it_came,
    a_subscriber_may_wait_for_what_comes_later,
    a_slow_subscriber_loses_the_oldest_and_nobody_waits_for_it,
)
