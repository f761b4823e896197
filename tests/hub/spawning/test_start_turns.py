"""Turns to start: bounded, in rotation among owners, and none lost when a waiter leaves."""

from __future__ import annotations

import asyncio
from collections import Counter

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as some

from ash_hub.spawning.start_turns import RETRY_AFTER_SECONDS, StartTurns
from ash_mcp.errors import CapacityExceeded
from ash_router.bounds.effective_limits import EffectiveLimit


class Starts:
    """Starts that go on until the test ends them, in the order in which they got their turns."""

    def __init__(self, group: anyio.abc.TaskGroup, turns: StartTurns, share: EffectiveLimit | None = None) -> None:
        self._share = share
        self.order: list[str] = []
        self.refused: Counter[str] = Counter()
        self._group = group
        self._turns = turns
        self._ends: list[anyio.Event] = []
        self._scopes: list[anyio.CancelScope] = []

    async def ask(self, *owners: str) -> None:
        for owner in owners:
            self._group.start_soon(self._start, owner)
            await settled()

    async def end(self, number: int) -> None:
        """End the start that got its turn as this one, counted from 0."""
        self._ends[number].set()
        await settled()

    async def cancel(self, number: int) -> None:
        """Cancel the request that was asked as this one, whether it waits or runs."""
        self._scopes[number].cancel()
        await settled()

    async def _start(self, owner: str) -> None:
        with anyio.CancelScope() as scope:
            self._scopes.append(scope)
            try:
                async with self._turns.turn(owner, self._share):
                    self.order.append(owner)
                    end = anyio.Event()
                    self._ends.append(end)
                    await end.wait()
            except CapacityExceeded:
                self.refused[owner] += 1


async def settled() -> None:
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_an_owner_with_a_long_queue_delays_another_by_one_start_only() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=2, waiting=100))
        await starts.ask(*["many"] * 20, "one", "other")
        assert starts.order == ["many", "many"]
        await starts.end(0)
        await starts.end(1)
        assert starts.order == ["many", "many", "one", "other"]
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_owners_with_queues_take_turns() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=1, waiting=100))
        await starts.ask("a", "a", "a", "b", "b", "c")
        for number in range(5):
            await starts.end(number)
        assert starts.order == ["a", "b", "c", "a", "b", "a"]
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_owners_who_come_back_again_and_again_keep_no_other_waiting() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=1, waiting=100))
        await starts.ask("b", "b", "b", "x", "y", "z")
        for number in range(12):
            await starts.end(number)
            await starts.ask(starts.order[number] if starts.order[number] != "b" else "x")
        assert [number for number, owner in enumerate(starts.order) if owner == "b"] == [0, 4, 8]
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_of_owners_with_as_many_turns_the_one_whose_last_began_first_is_next() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=5, waiting=100))
        await starts.ask("x", "x", "x", "a", "c", "a", "a", "b", "b", "c", "c")
        for number in range(3):
            await starts.end(number)
        assert starts.order == ["x", "x", "x", "a", "c", "b", "a", "c"]
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_turns_that_ended_count_for_nothing() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=2, waiting=100))
        await starts.ask("a", "a")
        await starts.end(0)
        await starts.end(1)
        await starts.ask("x", "x", "a", "b")
        await starts.end(2)
        assert starts.order == ["a", "a", "x", "x", "a"]
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_full_queue_is_shared_among_those_who_wait_in_it() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=1, waiting=4))
        await starts.ask("x", "a", "a", "b", "b")
        assert not starts.refused
        await starts.ask("a", "b", "c", "c")
        assert starts.refused == {"a": 1, "b": 1, "c": 1}
        await starts.end(0)
        assert starts.order == ["x", "a"]
        group.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize("waiting", [0, 1])
async def test_who_is_refused_is_told_why_and_when_to_come_again(waiting: int) -> None:
    turns = StartTurns(at_once=1, waiting=waiting)
    async with anyio.create_task_group() as group:
        await Starts(group, turns).ask(*["a"] * (1 + waiting))
        with pytest.raises(CapacityExceeded, match="ASH_HUB_LIMITS__WAITING") as refused:
            async with turns.turn("a"):
                pass
        assert refused.value.retryable and refused.value.retry_after_seconds == RETRY_AFTER_SECONDS > 1
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_full_queue_refuses_the_owner_who_fills_it_and_lets_another_wait() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=1, waiting=3))
        await starts.ask(*["many"] * 6)
        assert starts.refused == {"many": 2}
        await starts.ask("one")
        await starts.ask("one", "many")
        assert starts.refused == {"many": 3, "one": 1}
        await starts.end(0)
        assert starts.order == ["many", "one"]
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_where_none_may_wait_whoever_comes_too_late_is_refused() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=1, waiting=0))
        await starts.ask("a", "b")
        assert (starts.order, starts.refused) == (["a"], {"b": 1})
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_an_owner_has_no_more_waiting_than_its_own_limit() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=1, waiting=10), EffectiveLimit(1, by_key=True))
        await starts.ask(*["a"] * 4, "b")
        assert (starts.order, starts.refused) == (["a"], {"a": 2})
        await starts.end(0)
        assert starts.order == ["a", "b"]
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_waiter_that_leaves_takes_no_turn_with_it() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=1, waiting=10))
        await starts.ask("a", "b", "c")
        await starts.cancel(1)
        await starts.end(0)
        assert starts.order == ["a", "c"]
        await starts.cancel(2)
        await starts.ask("d")
        assert starts.order == ["a", "c", "d"]
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_waiter_cancelled_as_it_gets_its_turn_passes_it_on() -> None:
    async with anyio.create_task_group() as group:
        turns = StartTurns(at_once=1, waiting=10)
        starts = Starts(group, turns)
        await starts.ask("a", "b", "c")
        starts._ends[0].set()  # pyright: ignore[reportPrivateUsage]
        await anyio.lowlevel.checkpoint()  # a has ended and b's turn is given; b has not run yet
        starts._scopes[1].cancel()  # pyright: ignore[reportPrivateUsage]
        await settled()
        assert starts.order[-1] == "c"
        group.cancel_scope.cancel()


@given(some.lists(some.tuples(some.sampled_from("abc"), some.booleans()), max_size=30), some.integers(1, 3))
def test_no_more_than_allowed_run_and_all_get_their_turn(asked: list[tuple[str, bool]], at_once: int) -> None:
    async def run() -> None:
        running = 0
        most = 0
        done = 0

        async def one(owner: str, leaves: bool) -> None:
            nonlocal running, most, done
            with anyio.CancelScope() as scope:
                if leaves:
                    scope.deadline = anyio.current_time()
                async with turns.turn(owner):
                    running += 1
                    most = max(most, running)
                    try:
                        await anyio.lowlevel.checkpoint()
                    finally:
                        running -= 1
                    done += 1

        turns = StartTurns(at_once=at_once, waiting=100)
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                for owner, leaves in asked:
                    group.start_soon(one, owner, leaves)
            async with anyio.create_task_group() as group:
                for owner in "abc" * at_once:
                    group.start_soon(one, owner, False)
        assert most <= at_once and running == 0
        assert done >= sum(not leaves for _, leaves in asked) + 3 * at_once

    anyio.run(run)


@pytest.mark.anyio
async def test_of_equals_the_owner_whose_turn_ended_last_comes_last() -> None:
    async with anyio.create_task_group() as group:
        starts = Starts(group, StartTurns(at_once=3, waiting=9))
        await starts.ask("a", "a", "b", "a", "b")
        await starts.end(0)
        assert starts.order == ["a", "a", "b", "b"]
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_turn_given_to_a_task_that_is_cancelled_at_that_moment_is_given_on() -> None:
    turns, order = StartTurns(at_once=1, waiting=9), list[str]()

    async def wait() -> None:
        async with turns.turn("b"):
            order.append("b")

    async with turns.turn("a"):
        waiter = asyncio.create_task(wait())
        await settled()
    waiter.cancel()  # before it has run again; a scope of anyio's would let it go on to its next wait
    with pytest.raises(asyncio.CancelledError):
        await waiter
    with anyio.fail_after(5):
        async with turns.turn("c"):
            order.append("c")
    assert order == ["c"]
