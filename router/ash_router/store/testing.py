"""The suite that every `Store` passes. Implementers call `check_store`; ours run the checks one by one.

The checks use real, short times, because a store's clock may be another machine's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from ash_mcp.errors import CapacityExceeded, RunEnded, RunTaken, SessionTaken
from ash_mcp.types import DEFAULT_SCOPE, RunId, SandboxId, Scope, SessionName
from ash_router.store.base import (
    CHOSEN_NUMBERS,
    IDLE_SCOPES,
    LAYOUT,
    LOST,
    MAX_REPLICAS,
    ROUTE_NEWS,
    Place,
    PlaceLimits,
    Run,
    RunLimits,
    RunState,
    Shelf,
    Store,
)

__all__ = ["STORE_CHECKS", "check_store", "stores_tell_the_same_time"]

Check = Callable[[Store], Awaitable[None]]

_LONG: Final = 60.0
_SHORT: Final = 0.05
_PATIENCE: Final = 10.0
ONE, TWO, THREE = SandboxId("sbx-one"), SandboxId("sbx-two"), SandboxId("sbx-three")
RUN: Final = Scope("run42")
SHELF: Final = Shelf("books", most=3, most_bytes=100, seconds=_LONG)


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


def _route(sandbox_id: SandboxId, **more: Any) -> dict[str, Any]:
    return {"sandbox_id": sandbox_id, **more}


async def routes_are_kept_in_the_order_in_which_they_came(store: Store) -> None:
    for sandbox_id in (TWO, ONE, THREE):
        await store.put_route(_route(sandbox_id))
    await store.put_route(_route(TWO, session="new"))
    assert [record["sandbox_id"] for record in await store.routes()] == [TWO, ONE, THREE]


async def a_route_keeps_its_whole_record(store: Store) -> None:
    record = _route(ONE, endpoint={"unix": "/x", "host": None, "port": None}, tool_names={"a": "ä"}, scope="")
    await store.put_route(record)
    assert [dict(kept) for kept in await store.routes()] == [record]


async def the_route_that_was_put_last_stays(store: Store) -> None:
    for session in ("old", "new", "newer", "old"):
        await store.put_route(_route(ONE, session=session))
        assert [record["session"] for record in await store.routes()] == [session]


async def older_news_of_shares_changes_no_route(store: Store) -> None:
    def shared(version: int, *held: str) -> dict[str, Any]:
        return _route(ONE, shares={"version": version, "held": [{"id": share} for share in held]})

    await store.put_route(shared(1, "revoked"))
    await store.put_route(shared(2))
    start = await store.route_changes(None)
    for older in (shared(1, "revoked"), _route(ONE)):
        await store.put_route(older)
        assert [dict(record) for record in await store.routes()] == [shared(2)]
    assert (await store.route_changes(start.version)).bound == []
    await store.put_route(shared(10, "new"))
    await store.put_route(shared(9, "revoked"))
    assert [dict(record) for record in await store.routes()] == [shared(10, "new")]
    await store.drop_route(ONE)
    await store.put_route(_route(ONE))
    assert [dict(record) for record in await store.routes()] == [_route(ONE)]


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
    await store.put_route(_route(TWO, session="new"))
    await store.drop_route(ONE)
    later = await store.route_changes(start.version)
    assert not later.complete
    assert [dict(record) for record in later.bound] == [_route(THREE), _route(TWO, session="new")]
    assert list(later.unbound) == [ONE]
    end = await store.route_changes(later.version)
    assert (end.version, end.bound, end.unbound, end.complete) == (later.version, [], [], False)


async def a_changed_route_is_news_and_an_unchanged_one_is_not(store: Store) -> None:
    async with store.subscribe(ROUTE_NEWS) as news:
        await store.put_route(_route(ONE))
        start = await store.route_changes(None)
        await store.put_route(_route(ONE))
        await store.put_route(_route(TWO))
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


async def places_are_bounded_for_an_owner_and_for_the_hive(store: Store) -> None:
    most = PlaceLimits(owner=2, hive=3)
    for sandbox_id in (ONE, TWO):
        await store.reserve_session("me", DEFAULT_SCOPE, None, sandbox_id, most=most)
    await store.reserve_session("me", RUN, SessionName("again"), ONE, most=most)  # a place of its own already
    full = await raises(CapacityExceeded, store.reserve_session("me", RUN, None, THREE, most=most))
    assert isinstance(full, CapacityExceeded) and full.data["limit"] == "owner" and full.retry_after_seconds > 0
    await store.reserve_session("you", DEFAULT_SCOPE, None, THREE, most=most)
    full = await raises(CapacityExceeded, store.reserve_session("they", RUN, None, SandboxId("sbx-4"), most=most))
    assert isinstance(full, CapacityExceeded) and full.data["limit"] == "hive"
    assert (await store.places())[THREE] == Place("you", DEFAULT_SCOPE, SessionName("sb1"))
    await store.release_session("me", DEFAULT_SCOPE, SessionName("sb1"), ONE)
    await store.reserve_session("they", RUN, None, SandboxId("sbx-4"), most=most)
    await store.reserve_session("they", RUN, None, SandboxId("sbx-5"), most=most, restoring=True)
    assert len(await store.places()) == 4


async def a_place_counts_as_starting_until_its_sandbox_has_a_route(store: Store) -> None:
    most = PlaceLimits(owner=5, starting=1)
    await store.reserve_session("me", DEFAULT_SCOPE, None, ONE, most=most)
    await store.reserve_session("me", RUN, None, ONE, most=most)
    await store.reserve_session("you", DEFAULT_SCOPE, None, SandboxId("sbx-4"), most=most)
    full = await raises(CapacityExceeded, store.reserve_session("me", RUN, None, TWO, most=most))
    assert isinstance(full, CapacityExceeded) and full.data["limit"] == "owner" and "not ready" in full.message
    for _ in range(2):
        await store.put_route(_route(ONE))
    await store.reserve_session("me", RUN, SessionName("two"), TWO, most=most)
    await raises(CapacityExceeded, store.reserve_session("me", RUN, None, THREE, most=most))
    for _ in range(2):
        await store.release_session("me", RUN, SessionName("two"), TWO)
    await store.reserve_session("me", RUN, None, THREE, most=most, restoring=True)
    await store.reserve_session("me", RUN, None, TWO, most=most)
    await raises(CapacityExceeded, store.reserve_session("me", RUN, None, SandboxId("sbx-5"), most=most))


async def of_many_who_start_no_more_than_may_are_given_a_place(store: Store) -> None:
    async def reserve(number: int) -> bool:
        sandbox_id = SandboxId(f"sbx-{number}")
        try:
            await store.reserve_session("me", DEFAULT_SCOPE, None, sandbox_id, most=PlaceLimits(starting=3))
        except CapacityExceeded:
            return False
        return True

    assert sum(await asyncio.gather(*(reserve(number) for number in range(20)))) == 3


async def of_many_who_want_the_last_places_no_more_get_one(store: Store) -> None:
    async def reserve(number: int) -> bool:
        sandbox_id = SandboxId(f"sbx-{number}")
        try:
            await store.reserve_session("me", DEFAULT_SCOPE, None, sandbox_id, most=PlaceLimits(owner=5))
        except CapacityExceeded:
            return False
        return True

    assert sum(await asyncio.gather(*(reserve(number) for number in range(20)))) == 5


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


def _run(number: int = 1, **more: Any) -> Run:
    given: dict[str, Any] = {
        "owner": "me",
        "scope": DEFAULT_SCOPE,
        "name": "train",
        "lease_seconds": _LONG,
        "opened_at": number + 0.25,
    }
    return Run(id=RunId(f"run-{number}"), **{**given, **more})


ROOM: Final = RunLimits(owner=10, hive=20)


async def _is_open(store: Store, run: Run, quiet_seconds: float = _LONG) -> bool:
    judged = await store.judge_runs([run.id], quiet_seconds=quiet_seconds)
    return run.id in judged and judged[run.id].state is RunState.OPEN


async def a_run_is_open_until_it_is_ended(store: Store) -> None:
    run = _run(key="k", name="träin", scope=RUN)
    opened = await store.open_run(run, most=ROOM, quiet_seconds=0.0)
    assert (opened.run, opened.state) == (run, RunState.OPEN)
    assert _LONG - 5 < opened.left_seconds <= _LONG
    assert [lease.run for lease in await store.runs()] == [run]
    for _ in range(2):
        await store.end_run(run.id)
    await store.end_run(RunId("run-unknown"))
    assert await store.runs() == []
    judged = await store.judge_runs([run.id, RunId("run-unknown")], quiet_seconds=_LONG)
    assert {run_id: (lease.run, lease.state) for run_id, lease in judged.items()} == {
        run.id: (run, RunState.DESTROYED)
    }
    late = await store.renew_run(run.id, run)
    assert late is not None and late.state is RunState.DESTROYED, "an ended run never opens again"


async def a_name_is_of_one_open_run_of_its_owner_and_scope(store: Store) -> None:
    await store.open_run(_run(1), most=ROOM, quiet_seconds=0.0)
    for number, more in enumerate(({"owner": "you"}, {"scope": RUN}, {"name": "eval"}), 2):
        await store.open_run(_run(number, **more), most=ROOM, quiet_seconds=0.0)
    for key in (None, "k"):
        taken = await raises(RunTaken, store.open_run(_run(9, key=key), most=ROOM, quiet_seconds=0.0))
        assert isinstance(taken, RunTaken) and 0 < taken.data["left_seconds"] <= _LONG
    await store.end_run(RunId("run-1"))
    assert (await store.open_run(_run(9), most=ROOM, quiet_seconds=0.0)).run.id == "run-9"
    assert [lease.run.id for lease in await store.runs()] == ["run-2", "run-3", "run-4", "run-9"]


async def opening_a_run_again_with_its_key_opens_no_other(store: Store) -> None:
    await store.open_run(_run(1, key="k"), most=ROOM, quiet_seconds=0.0)
    again = await store.open_run(_run(2, key="k"), most=RunLimits(1, 1), quiet_seconds=0.0)
    assert again.run == _run(1, key="k") and again.state is RunState.OPEN
    await raises(RunTaken, store.open_run(_run(3, key="other"), most=ROOM, quiet_seconds=0.0))
    assert len(await store.runs()) == 1


async def open_runs_are_bounded_for_an_owner_and_for_the_hive(store: Store) -> None:
    most = RunLimits(owner=1, hive=2)
    await store.open_run(_run(1), most=most, quiet_seconds=0.0)
    full = await raises(CapacityExceeded, store.open_run(_run(2, name="b"), most=most, quiet_seconds=0.0))
    assert isinstance(full, CapacityExceeded) and full.data["limit"] == "owner"
    await store.open_run(_run(3, owner="you"), most=most, quiet_seconds=0.0)
    full = await raises(CapacityExceeded, store.open_run(_run(4, owner="they"), most=most, quiet_seconds=0.0))
    assert isinstance(full, CapacityExceeded) and full.data["limit"] == "hive"
    await raises(CapacityExceeded, store.renew_run(RunId("run-4"), _run(4, owner="they"), most=most))
    await store.end_run(RunId("run-1"))
    await store.open_run(_run(5), most=most, quiet_seconds=0.0)


async def a_run_ends_when_its_lease_was_not_renewed(store: Store) -> None:
    silent, renewed = _run(1, lease_seconds=_SHORT), _run(2, name="b", lease_seconds=_SHORT)
    await store.open_run(silent, most=ROOM, quiet_seconds=0.0)
    await store.open_run(renewed, most=ROOM, quiet_seconds=0.0)
    await asyncio.sleep(2 * _SHORT)
    lease = await store.renew_run(renewed.id)
    assert lease is not None and 0 < lease.left_seconds <= _SHORT
    judged = await store.judge_runs([silent.id, renewed.id], quiet_seconds=_LONG)
    assert judged[silent.id].state is RunState.OVER and judged[renewed.id].state is RunState.OPEN
    over = await store.renew_run(silent.id, silent)
    assert over is not None and (over.state, over.left_seconds) == (RunState.OVER, 0.0)


async def no_lease_counts_from_before_renewals_came(store: Store) -> None:
    run = _run(lease_seconds=_SHORT)
    await store.open_run(run, most=ROOM, quiet_seconds=0.0)
    await asyncio.sleep(2 * _SHORT)
    judged = await store.judge_runs([run.id], quiet_seconds=_SHORT / 5)
    assert judged[run.id].state is RunState.OPEN and judged[run.id].left_seconds >= _SHORT / 2
    await raises(RunTaken, store.open_run(_run(2), most=ROOM, quiet_seconds=_SHORT / 5))
    assert (await store.open_run(_run(2), most=ROOM, quiet_seconds=_SHORT)).run.id == "run-2"
    assert not await _is_open(store, run)


async def a_run_that_was_lost_can_be_put_back(store: Store) -> None:
    run, short = _run(1), _run(2, name="b", lease_seconds=_SHORT)
    assert await store.renew_run(run.id) is None
    for restoring in (True, False):
        lease = await store.renew_run(run.id, run, restoring=restoring)
        assert lease is not None and lease.state is RunState.OPEN and lease.left_seconds > _LONG - 5
    await store.open_run(short, most=ROOM, quiet_seconds=0.0)
    await asyncio.sleep(2 * _SHORT)
    lease = await store.renew_run(short.id, short, restoring=True)
    assert lease is not None and lease.left_seconds == 0.0, "what is there is not renewed by whoever restores"
    beside = await store.renew_run(RunId("run-3"), _run(3))
    assert beside is not None and beside.state is RunState.OPEN, "another run has its name, and it goes on"
    assert len(await store.runs()) == 3


async def no_place_is_given_in_a_run_that_is_not_open(store: Store) -> None:
    run = _run()
    await store.open_run(run, most=ROOM, quiet_seconds=0.0)
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, ONE, run=run.id) == "sb1"
    await store.end_run(run.id)
    for late in (run.id, RunId("run-unknown")):
        await raises(RunEnded, store.reserve_session("me", DEFAULT_SCOPE, None, TWO, run=late))
    assert set(await store.places()) == {ONE}


async def last_calls_never_go_backwards(store: Store) -> None:
    await store.put_route(_route(ONE))
    await store.put_route(_route(TWO))
    await store.touch({ONE: 100.0, TWO: 7.5})
    await store.touch({ONE: 50.0})
    assert dict(await store.last_calls()) == {ONE: 100.0, TWO: 7.5}
    await store.touch({ONE: 200.0})
    await store.touch({})
    assert (await store.last_calls())[ONE] == 200.0


async def dropping_a_route_drops_its_last_call(store: Store) -> None:
    await store.put_route(_route(ONE))
    await store.put_route(_route(TWO))
    await store.touch({ONE: 100.0, TWO: 100.0})
    await store.drop_route(ONE)
    assert dict(await store.last_calls()) == {TWO: 100.0}


async def a_call_that_ends_after_its_sandbox_leaves_no_record(store: Store) -> None:
    await store.put_route(_route(ONE))
    await store.drop_route(ONE)
    await store.touch({ONE: 100.0})
    assert dict(await store.last_calls()) == {}


async def a_scope_that_was_long_without_a_sandbox_is_forgotten(store: Store) -> None:
    async def use(scope: Scope, sandbox_id: SandboxId) -> SessionName:
        session = await store.reserve_session("me", scope, None, sandbox_id)
        await store.release_session("me", scope, session, sandbox_id)
        return session

    living, other = Scope("living"), Scope("other")
    assert await store.reserve_session("me", living, None, ONE) == "sb1"
    assert await use(RUN, TWO) == await use(other, TWO) == "sb1"
    assert await use(RUN, TWO) == "sb2"  # so that the other was idle for longer
    for first in range(1, IDLE_SCOPES, 100):
        scopes = [Scope(f"s{number}") for number in range(first, min(first + 100, IDLE_SCOPES))]
        assert set(await asyncio.gather(*(use(scope, THREE) for scope in scopes))) == {"sb1"}
    assert await use(RUN, TWO) == "sb3"
    assert await use(other, TWO) == "sb1"
    assert await store.reserve_session("me", living, None, TWO) == "sb2"


async def of_too_many_chosen_numbers_the_count_passes_the_lower_ones(store: Store) -> None:
    async def choose(number: int) -> None:
        session = SessionName(f"sb{number}")
        await store.reserve_session("me", DEFAULT_SCOPE, session, ONE)
        await store.release_session("me", DEFAULT_SCOPE, session, ONE)

    for number in range(CHOSEN_NUMBERS):
        await choose(1000 - 2 * number)
    assert await store.reserve_session("me", DEFAULT_SCOPE, None, TWO) == "sb1"
    await choose(2000)
    lowest = 1000 - 2 * (CHOSEN_NUMBERS - 1)
    passed = lowest + 2 * (CHOSEN_NUMBERS // 2 - 1)
    for odd in (passed + 1, passed + 3):
        assert await store.reserve_session("me", DEFAULT_SCOPE, None, THREE) == f"sb{odd}"
        await store.release_session("me", DEFAULT_SCOPE, SessionName(f"sb{odd}"), THREE)


async def what_was_kept_first_under_a_name_stays(store: Store) -> None:
    other = Shelf("others", most=3, most_bytes=100, seconds=_LONG)
    for text in ("ä:\x00\n", "second"):
        await store.keep(SHELF, "a", text)
    await store.keep(SHELF, "b", "")
    await store.keep(other, "a", "elsewhere")
    assert list((await store.kept(SHELF)).items()) == [("a", "ä:\x00\n"), ("b", "")]
    assert dict(await store.kept(SHELF, "a")) == {"a": "ä:\x00\n"}
    assert dict(await store.kept(SHELF, "c")) == {}


async def the_oldest_texts_make_room_for_new_ones(store: Store) -> None:
    for name in "dcba":
        await store.keep(SHELF, name, name)
    assert list(await store.kept(SHELF)) == ["c", "b", "a"]
    await store.keep(SHELF, "larger than all", 51 * "ä")
    assert list(await store.kept(SHELF)) == ["c", "b", "a"]
    await store.keep(SHELF, "e", 49 * "ä")  # 98 bytes
    assert list(await store.kept(SHELF)) == ["b", "a", "e"]
    await store.keep(SHELF, "f", 50 * "ä")
    assert list(await store.kept(SHELF)) == ["f"]


async def a_text_is_kept_for_its_time(store: Store) -> None:
    short = Shelf("short", most=10, most_bytes=100, seconds=_SHORT)
    longer = Shelf("short", most=10, most_bytes=100, seconds=_LONG)
    await store.keep(short, "a", "first")
    await store.keep(longer, "b", "stays")
    async with asyncio.timeout(_PATIENCE):
        while "a" in await store.kept(longer):  # noqa: ASYNC110 - a store's clock has no event
            await asyncio.sleep(_SHORT / 5)
    assert dict(await store.kept(longer, "a")) == {}
    await store.keep(longer, "a", "again")
    await store.keep(short, "c", "")
    await asyncio.sleep(2 * _SHORT)
    assert dict(await store.kept(longer)) == {"b": "stays", "a": "again"}


async def a_ticket_is_given_to_the_first_who_takes_it(store: Store) -> None:
    await store.put_ticket(ONE, "a", "ä:b\n", ttl_seconds=_LONG, most=9)
    await store.put_ticket(TWO, "a", "", ttl_seconds=_LONG, most=9)
    assert await store.take_ticket(ONE, "b", "me") is None
    for _ in range(2):  # the answer may have been lost
        assert await store.take_ticket(ONE, "a", "me") == "ä:b\n"
    assert await store.take_ticket(ONE, "a", "other") is None
    assert await store.take_ticket(TWO, "a", "other") == ""


async def of_several_who_take_a_ticket_one_gets_it(store: Store) -> None:
    await store.put_ticket(ONE, "a", "text", ttl_seconds=_LONG, most=9)
    taken = await asyncio.gather(*(store.take_ticket(ONE, "a", str(by)) for by in range(20)))
    assert taken.count("text") == 1 and taken.count(None) == 19


async def a_ticket_is_good_for_its_time(store: Store) -> None:
    await store.put_ticket(ONE, "short", "text", ttl_seconds=_SHORT, most=1)
    full = await raises(CapacityExceeded, store.put_ticket(ONE, "more", "text", ttl_seconds=_LONG, most=1))
    assert "1 tickets" in str(full)
    await asyncio.sleep(2 * _SHORT)
    assert await store.take_ticket(ONE, "short", "me") is None
    await store.put_ticket(ONE, "more", "text", ttl_seconds=_LONG, most=1)
    assert await store.take_ticket(ONE, "more", "me") == "text"


async def tickets_of_a_sandbox_are_bounded_and_used_ones_make_room(store: Store) -> None:
    for number in range(200):
        await store.put_ticket(ONE, str(number), "text", ttl_seconds=_LONG, most=2)
        assert await store.take_ticket(ONE, str(number), "me") == "text"
    await store.put_ticket(ONE, "a", "text", ttl_seconds=_LONG, most=2)
    await store.put_ticket(ONE, "b", "text", ttl_seconds=_LONG, most=2)
    await raises(CapacityExceeded, store.put_ticket(ONE, "c", "text", ttl_seconds=_LONG, most=2))
    assert await store.take_ticket(ONE, "0", "me") is None


async def tickets_go_with_the_route(store: Store) -> None:
    await store.put_route(_route(ONE))
    await store.put_ticket(ONE, "a", "text", ttl_seconds=_LONG, most=9)
    await store.drop_route(ONE)
    assert await store.take_ticket(ONE, "a", "me") is None


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


async def a_store_tells_the_time_of_day(store: Store) -> None:
    began, before = time.monotonic(), store.now()
    await asyncio.sleep(_SHORT)
    after, took = store.now(), time.monotonic() - began
    assert _SHORT / 2 <= after - before <= took + _SHORT
    assert abs(after - time.time()) < _LONG  # its machine's clock may be somewhat off


async def a_store_has_the_layout_of_this_release(store: Store) -> None:
    assert store.layout() == LAYOUT


async def stores_tell_the_same_time(one: Store, other: Store) -> None:
    """Check two replicas' stores of one hive; beside the others, which take one store each."""
    assert abs(one.now() - other.now()) < 1.0


async def _silenced(store: Store, replica: str) -> None:
    async with asyncio.timeout(_PATIENCE):
        while True:
            if replica not in await store.replicas():
                return
            await asyncio.sleep(_SHORT / 5)


STORE_CHECKS: Sequence[Check] = (
    routes_are_kept_in_the_order_in_which_they_came,
    a_route_keeps_its_whole_record,
    the_route_that_was_put_last_stays,
    older_news_of_shares_changes_no_route,
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
    places_are_bounded_for_an_owner_and_for_the_hive,
    of_many_who_want_the_last_places_no_more_get_one,
    a_place_counts_as_starting_until_its_sandbox_has_a_route,
    of_many_who_start_no_more_than_may_are_given_a_place,
    many_who_want_any_name_get_different_ones,
    an_idempotency_key_belongs_to_the_first_who_comes,
    a_run_is_open_until_it_is_ended,
    a_name_is_of_one_open_run_of_its_owner_and_scope,
    opening_a_run_again_with_its_key_opens_no_other,
    open_runs_are_bounded_for_an_owner_and_for_the_hive,
    a_run_ends_when_its_lease_was_not_renewed,
    no_lease_counts_from_before_renewals_came,
    a_run_that_was_lost_can_be_put_back,
    no_place_is_given_in_a_run_that_is_not_open,
    last_calls_never_go_backwards,
    a_call_that_ends_after_its_sandbox_leaves_no_record,
    dropping_a_route_drops_its_last_call,
    a_scope_that_was_long_without_a_sandbox_is_forgotten,
    of_too_many_chosen_numbers_the_count_passes_the_lower_ones,
    what_was_kept_first_under_a_name_stays,
    the_oldest_texts_make_room_for_new_ones,
    a_text_is_kept_for_its_time,
    a_ticket_is_given_to_the_first_who_takes_it,
    of_several_who_take_a_ticket_one_gets_it,
    a_ticket_is_good_for_its_time,
    tickets_of_a_sandbox_are_bounded_and_used_ones_make_room,
    tickets_go_with_the_route,
    announced_replicas_live_until_they_are_withdrawn,
    a_replica_that_falls_silent_is_dead,
    of_too_many_replicas_those_that_end_first_are_dropped,
    every_subscriber_hears_what_is_published_after_it_came,
    a_subscriber_may_wait_for_what_comes_later,
    a_slow_subscriber_loses_the_oldest_and_nobody_waits_for_it,
    a_store_tells_the_time_of_day,
    a_store_has_the_layout_of_this_release,
)
