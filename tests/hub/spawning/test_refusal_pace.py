"""Refused spawns: the first are answered at once, those of an owner who does not stop at a steady pace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from ash_hub.spawning.refusal_pace import BURST, MAX_DELAY_SECONDS, PER_SECOND, RefusalPace


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_first_refusals_are_answered_at_once_and_later_ones_at_the_pace() -> None:
    pace = RefusalPace(Clock())
    assert [pace.delay("ann") for _ in range(BURST)] == pytest.approx([0.0] * BURST)
    assert [pace.delay("ann") for _ in range(3)] == pytest.approx([1 / PER_SECOND, 2 / PER_SECOND, 3 / PER_SECOND])


def test_an_owner_does_not_wait_for_another() -> None:
    pace = RefusalPace(Clock())
    for _ in range(3 * BURST):
        pace.delay("ann")
    assert pace.delay("bob") == 0.0


def test_an_owner_who_pauses_is_answered_at_once_again() -> None:
    clock = Clock()
    pace = RefusalPace(clock)
    for _ in range(10 * BURST):
        pace.delay("ann")
    clock.now += MAX_DELAY_SECONDS + BURST / PER_SECOND
    assert [pace.delay("ann") for _ in range(BURST)] == pytest.approx([0.0] * BURST)


@given(some.lists(some.floats(0.0, 3.0), max_size=200))
def test_no_refusal_is_later_than_the_bound(pauses: list[float]) -> None:
    clock = Clock()
    pace = RefusalPace(clock)
    for pause in pauses:
        clock.now += pause
        assert 0.0 <= pace.delay("ann") <= MAX_DELAY_SECONDS


@given(some.integers(1, 20))
def test_callers_that_ask_again_at_each_answer_get_no_more_than_the_pace(callers: int) -> None:
    clock = Clock()
    pace = RefusalPace(clock)
    due = [clock.now] * callers
    answered, seconds = 0, 30.0
    while (now := min(due)) < 1000.0 + seconds:
        clock.now = now
        due[due.index(now)] = now + pace.delay("ann") + 0.001
        answered += 1
    assert answered <= BURST + PER_SECOND * seconds + callers


def test_owners_that_were_refused_once_are_forgotten() -> None:
    clock = Clock()
    pace = RefusalPace(clock)
    for number in range(5000):
        pace.delay(f"owner {number}")
        clock.now += 1.0
    assert len(pace._next) <= 1000  # pyright: ignore[reportPrivateUsage]
