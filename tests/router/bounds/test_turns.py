"""Turns of the loop: a part of each principal's requests in each, whatever waits behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as some

from ash_router.bounds.turns import Turns


class Loop:
    """Turns of a loop that the test makes, and what began in each."""

    def __init__(self, part: int = 1) -> None:
        self.turns = Turns(self._soon, part)
        self.begun: list[list[str]] = [[]]
        self._next: list[Callable[[], None]] = []

    def _soon(self, work: Callable[[], None]) -> None:
        self._next.append(work)

    def ask(self, owner: str, work: int = 1) -> Request:
        request = Request(self, owner)
        self.turns.take(owner, request, work)
        return request

    @property
    def is_counting(self) -> bool:
        return bool(self._next)

    def turn(self) -> None:
        self.begun.append([])
        due, self._next = self._next, []
        for work in due:
            work()

    def turn_to_the_end(self) -> None:
        while self._next:
            self.turn()


class Request:
    def __init__(self, loop: Loop, owner: str) -> None:
        self._loop = loop
        self.owner = owner

    def begin(self) -> None:
        self._loop.begun[-1].append(self.owner)


def test_a_request_begins_at_once_beside_anothers_that_wait() -> None:
    loop = Loop()
    for _ in range(3):
        loop.ask("ann")
    loop.ask("bob")
    assert loop.begun == [["ann", "bob"]]
    loop.turn_to_the_end()
    assert loop.begun[1:3] == [["ann"], ["ann"]]


def test_who_asks_once_in_a_turn_never_waits_beside_a_flood() -> None:
    loop = Loop()
    for _ in range(5):
        loop.ask("bob")
    for _ in range(3):
        loop.ask("ann")
        loop.turn()
    assert loop.begun == [["bob", "ann"], ["bob", "ann"], ["bob", "ann"], ["bob"]]


def test_no_turn_is_counted_where_nobody_waits() -> None:
    loop = Loop(part=2)
    for _ in range(3):
        assert not loop.is_counting
        loop.ask("ann")
    assert loop.is_counting
    loop.turn_to_the_end()
    assert loop.begun == [["ann", "ann"], ["ann"]]


def test_what_is_more_work_takes_up_more_turns() -> None:
    loop = Loop()
    loop.ask("ann", work=3)
    loop.ask("ann")
    loop.ask("bob")
    loop.turn_to_the_end()
    assert loop.begun[:4] == [["ann", "bob"], [], [], ["ann"]]


def test_a_part_is_made_up_of_what_it_holds() -> None:
    loop = Loop(part=2)
    for work in (1, 3, 1, 1):
        loop.ask("ann", work=work)
    loop.turn_to_the_end()
    assert loop.begun == [["ann", "ann"], [], ["ann", "ann"]]


def test_who_left_does_not_begin_and_takes_no_turn() -> None:
    loop = Loop()
    loop.ask("ann")
    gone = loop.ask("ann")
    loop.ask("ann")
    loop.turns.leave("ann", gone)
    loop.turns.leave("ann", gone)
    loop.turn_to_the_end()
    assert loop.begun[:2] == [["ann"], ["ann"]]


def test_nothing_turns_where_nobody_asks() -> None:
    loop = Loop()
    loop.ask("ann")
    loop.turns.leave("ann", loop.ask("ann"))
    loop.turn_to_the_end()
    passed = len(loop.begun)
    loop.turn()
    assert loop.begun[passed:] == [[]]
    assert len(loop.turns) == 0


def test_a_defect_in_one_request_keeps_no_other_waiting() -> None:
    class Defect(Request):
        def begin(self) -> None:
            raise ValueError("a defect")

    loop = Loop()
    loop.ask("ann")
    loop.turns.take("ann", Defect(loop, "ann"))
    loop.ask("ann")
    loop.turn_to_the_end()
    assert [owner for begun in loop.begun for owner in begun] == ["ann", "ann"]


@given(some.lists(some.sampled_from(["ann", "bob", "turn"]), max_size=60), some.integers(1, 3))
def test_each_begins_once_and_no_more_than_a_part_of_an_owner_in_a_turn(steps: list[str], part: int) -> None:
    loop = Loop(part)
    asked = [step for step in steps if step != "turn"]
    for step in steps:
        if step == "turn":
            loop.turn()
        else:
            loop.ask(step)
    loop.turn_to_the_end()
    begun = [owner for owners in loop.begun for owner in owners]
    assert sorted(begun) == sorted(asked)
    assert all(max(Counter(owners).values(), default=0) <= part for owners in loop.begun)


def test_work_that_took_no_turn_is_made_up_for_by_its_principal_alone() -> None:
    loop = Loop()
    loop.turns.spend("ann", 2.5)
    loop.ask("ann")
    loop.ask("bob")
    assert loop.begun == [["bob"]]
    loop.turn_to_the_end()
    assert loop.begun == [["bob"], [], ["ann"]]
