"""The life of a sandbox, as a table and as a machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ash_hub import _state
from ash_hub._state import IllegalStep, Life, Step
from ash_mcp.types import EndReason, State


def life(state: State = State.READY, *, idle_seconds: float | None = 10.0, ready_at: float | None = 5.0) -> Life:
    return Life(state=state, created_at=0.0, expires_at=100.0, idle_seconds=idle_seconds, ready_at=ready_at)


def test_every_state_has_a_row_and_ends_have_no_way_on() -> None:
    assert set(_state.TABLE) == set(State)
    assert all(not _state.TABLE[state] for state in State if state.ended)


def test_a_spawn_goes_through_starting_to_ready() -> None:
    begun = _state.born(1.0, ttl_seconds=60.0, idle_seconds=None)
    ready = _state.advance(_state.advance(begun, Step.START, 2.0), Step.READY, 3.0)
    assert (ready.state, ready.ready_at, ready.expires_at) == (State.READY, 3.0, 61.0)


def test_the_first_reason_of_an_end_is_kept() -> None:
    stopping = _state.advance(life(), Step.STOP, 6.0, EndReason.TTL_EXPIRED)
    failed = _state.advance(stopping, Step.FAIL, 7.0, EndReason.PROCESS_DIED)
    assert (failed.state, failed.reason, failed.ended_at) == (State.FAILED, EndReason.TTL_EXPIRED, 7.0)


def test_a_ready_sandbox_cannot_start_again() -> None:
    with pytest.raises(IllegalStep, match="ready cannot start"):
        _state.advance(life(), Step.START, 6.0)


def test_the_ttl_counts_from_the_spawn() -> None:
    assert _state.due(life(idle_seconds=None), 99.9, None) is None
    assert _state.due(life(idle_seconds=None), 100.0, 99.9) is EndReason.TTL_EXPIRED


def test_the_idle_time_counts_from_the_last_call() -> None:
    assert _state.due(life(), 14.9, None) is None
    assert _state.due(life(), 15.0, None) is EndReason.IDLE_EXPIRED
    assert _state.due(life(), 15.0, 6.0) is None


def test_a_sandbox_that_is_starting_is_never_idle() -> None:
    assert _state.due(life(State.STARTING, ready_at=None), 99.0, None) is None


def test_what_has_ended_is_not_due_and_cannot_be_extended() -> None:
    gone = _state.advance(_state.advance(life(), Step.STOP, 6.0), Step.END, 7.0)
    assert _state.due(gone, 1e9, None) is None
    with pytest.raises(IllegalStep):
        _state.extended(gone, 8.0, 60.0)


def test_extending_counts_from_now() -> None:
    assert _state.extended(life(), 50.0, 60.0).expires_at == 110.0


class Lives(RuleBasedStateMachine):
    """Any order of steps: the state is always one of the table's, and an end is for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.life = _state.born(0.0, ttl_seconds=50.0, idle_seconds=5.0)
        self.ended: Life | None = None

    @rule(step=st.sampled_from(Step), reason=st.sampled_from(EndReason))
    def take(self, step: Step, reason: EndReason) -> None:
        self.now += 1.0
        try:
            self.life = _state.advance(self.life, step, self.now, reason)
        except IllegalStep:
            assert step not in _state.TABLE[self.life.state]

    @rule(ttl=st.floats(1.0, 100.0))
    def extend(self, ttl: float) -> None:
        try:
            self.life = _state.extended(self.life, self.now, ttl)
        except IllegalStep:
            assert self.life.state in (State.STOPPING, State.GONE, State.FAILED)

    @invariant()
    def an_end_has_a_time_and_stays(self) -> None:
        assert self.life.state.ended == (self.life.ended_at is not None)
        if self.ended is not None:
            assert self.life == self.ended
        if self.life.state.ended:
            self.ended = self.life


TestLives = Lives.TestCase


@given(st.floats(0.0, 200.0), st.none() | st.floats(0.0, 200.0))
def test_a_later_moment_never_makes_a_due_sandbox_undue(now: float, last_call: float | None) -> None:
    if _state.due(life(), now, last_call) is not None:
        assert _state.due(life(), now + 1.0, last_call) is not None
