"""Every cell of the table of `decide`, and what holds of every view."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_hub.backends.base import Phase
from ash_hub.lifecycle.decide import (
    DELETE_SECONDS,
    RUN_MESSAGES,
    TOOLS_SECONDS,
    Decision,
    Step,
    View,
    Where,
    decide,
    idle_since,
)
from ash_hub.lifecycle.record import Ending, Record
from ash_mcp.types import DEFAULT_SCOPE, Cause, EndReason, SessionName, State

NOW = 1000.0
STARTING = Record(
    owner="me",
    scope=DEFAULT_SCOPE,
    session=SessionName("sb1"),
    recipe="test",
    maker="a",
    created_at=NOW - 10,
    start_by=NOW + 60,
    expires_at=NOW + 600,
    idle_seconds=None,
)
READY = replace(STARTING, ready_at=NOW - 1)
IDLE = replace(READY, idle_seconds=30.0)
REQUESTED = Ending(reason=EndReason.DESTROYED, cause=Cause.AGENT, at=NOW - 1, by="a", message="asked for")
ENDING = replace(READY, ending=REQUESTED)
DONE = Decision(Step.NONE)
LEASE_OVER = RUN_MESSAGES[EndReason.RUN_ENDED]
RUN_DESTROYED = RUN_MESSAGES[EndReason.DESTROYED]
ENDS_OF_RUNS = ((EndReason.RUN_ENDED, LEASE_OVER), (EndReason.DESTROYED, RUN_DESTROYED))


def view(**more: Any) -> View:
    given: dict[str, Any] = {"state": State.READY, "record": READY, "phase": Phase.RUNNING, **more}
    return View(**given)


def absent(**more: Any) -> View:
    return view(phase=None, has_route=False, **more)


def starting(**more: Any) -> View:
    return view(**{"state": State.STARTING, "record": STARTING, **more})


BURIED = {"state": State.GONE, "ended_at": NOW - 5, "kept_seconds": 60.0}


@pytest.mark.parametrize(
    ("seen", "decision"),
    [
        # absent
        (view(state=None, record=None, phase=None), Decision(Step.UNROUTE)),
        (absent(state=None, record=None), DONE),
        (view(phase=None, **BURIED), Decision(Step.UNROUTE)),
        (absent(**{**BURIED, "ended_at": NOW - 60}), Decision(Step.FORGET)),
        (absent(**BURIED), Decision(Step.NONE, at=NOW + 55)),
        (
            starting(phase=None, is_starting_here=True, requested_end=REQUESTED),
            Decision(Step.CANCEL_START, REQUESTED.reason, "asked for"),
        ),
        (starting(phase=None, is_starting_here=True, requested_end=REQUESTED, is_cancelled=True), DONE),
        *[
            (starting(phase=None, is_starting_here=True, run_end=reason), Decision(Step.CANCEL_START, reason, why))
            for reason, why in ENDS_OF_RUNS
        ],
        (starting(phase=None, is_starting_here=True, run_end=EndReason.RUN_ENDED, is_cancelled=True), DONE),
        (
            starting(phase=None, is_starting_here=True, run_end=EndReason.RUN_ENDED, requested_end=REQUESTED),
            Decision(Step.CANCEL_START, REQUESTED.reason, "asked for"),
        ),
        (starting(phase=None, is_starting_here=True, run_over_at=NOW, is_held=False), Decision(Step.LEARN_RUN)),
        (starting(phase=None, is_starting_here=True, run_over_at=NOW + 9), Decision(Step.NONE, at=NOW + 9)),
        (starting(phase=None, is_starting_here=True, is_held=False), Decision(Step.HOLD)),
        # absent, and not starting here: a run says no more
        (absent(run_end=EndReason.RUN_ENDED), Decision(Step.BURY, EndReason.LOST)),
        (absent(run_over_at=NOW), Decision(Step.BURY, EndReason.LOST)),
        (absent(**BURIED, run_end=EndReason.RUN_ENDED, run_over_at=NOW), Decision(Step.NONE, at=NOW + 55)),
        (starting(phase=None, is_starting_here=True), DONE),
        (absent(record=ENDING), Decision(Step.BURY, REQUESTED.reason, "asked for")),
        (absent(requested_end=REQUESTED), Decision(Step.BURY, REQUESTED.reason, "asked for")),
        (
            absent(record=ENDING, requested_end=replace(REQUESTED, reason=EndReason.TTL_EXPIRED)),
            Decision(Step.BURY, REQUESTED.reason, "asked for"),
        ),
        (absent(record=STARTING), Decision(Step.BURY, EndReason.START_FAILED, "its start broke off")),
        (absent(record=STARTING, exit_message="died"), Decision(Step.BURY, EndReason.START_FAILED, "died")),
        (absent(exit_message="died"), Decision(Step.BURY, EndReason.PROCESS_DIED, "died")),
        (absent(), Decision(Step.BURY, EndReason.LOST)),
        # unreadable
        (view(record=None), DONE),
        (view(record=None, requested_end=REQUESTED, phase=Phase.ENDED), DONE),
        (view(record=None, run_end=EndReason.RUN_ENDED, run_over_at=NOW), DONE),
        # ending
        (view(record=ENDING, is_starting_here=True), Decision(Step.CANCEL_START, REQUESTED.reason, "asked for")),
        (
            view(record=ENDING, is_starting_here=True, is_cancelled=True),
            Decision(Step.NONE, REQUESTED.reason, "asked for"),
        ),
        *[
            (view(record=ENDING, state=state), Decision(Step.WITHDRAW, REQUESTED.reason, "asked for"))
            for state in (State.PENDING, State.STARTING, State.READY, State.STOPPING)
        ],
        (
            view(record=ENDING, state=State.STOPPING, is_withdrawn=True, phase=Phase.ENDED, ender=Where.ELSEWHERE),
            Decision(Step.BURY, REQUESTED.reason, "asked for"),
        ),
        (
            view(record=ENDING, state=State.STOPPING, is_withdrawn=True, phase=Phase.ENDED),
            Decision(Step.DELETE, REQUESTED.reason),
        ),
        (view(record=ENDING, phase=Phase.ENDED, **BURIED), Decision(Step.DELETE, REQUESTED.reason)),
        (view(record=ENDING, state=State.STOPPING, is_withdrawn=True), Decision(Step.DELETE, REQUESTED.reason)),
        (
            view(record=ENDING, state=State.STOPPING, is_withdrawn=True, ender=Where.DEAD),
            Decision(Step.DELETE, REQUESTED.reason),
        ),
        (
            view(record=ENDING, state=State.STOPPING, is_withdrawn=True, ender=Where.ELSEWHERE),
            Decision(Step.NONE, at=REQUESTED.at + DELETE_SECONDS),
        ),
        (
            view(
                record=replace(READY, ending=replace(REQUESTED, at=NOW - DELETE_SECONDS)),
                state=State.STOPPING,
                is_withdrawn=True,
                ender=Where.ELSEWHERE,
            ),
            Decision(Step.DELETE, REQUESTED.reason),
        ),
        # requested, or buried here
        (view(requested_end=REQUESTED, is_lost=True, **BURIED), Decision(Step.FORGET)),
        (
            view(requested_end=REQUESTED, is_lost=True, phase=Phase.ENDED, **BURIED),
            Decision(Step.END, REQUESTED.reason, "asked for"),
        ),
        (
            starting(requested_end=REQUESTED, is_starting_here=True),
            Decision(Step.CANCEL_START, REQUESTED.reason, "asked for"),
        ),
        (
            starting(requested_end=REQUESTED, is_starting_here=True, is_cancelled=True),
            Decision(Step.NONE, REQUESTED.reason, "asked for"),
        ),
        (view(requested_end=REQUESTED), Decision(Step.END, REQUESTED.reason, "asked for")),
        # starting
        (starting(is_starting_here=True, phase=Phase.ENDED), Decision(Step.NONE, at=NOW + 60)),
        (starting(is_starting_here=True, is_held=False), Decision(Step.HOLD, at=NOW + 60)),
        (
            starting(phase=Phase.ENDED, exit_message="died", maker=Where.ELSEWHERE),
            Decision(Step.END, EndReason.START_FAILED, "died"),
        ),
        (
            starting(record=replace(STARTING, start_by=NOW), maker=Where.ELSEWHERE),
            Decision(Step.END, EndReason.START_FAILED, "its start took too long"),
        ),
        *[
            (starting(maker=maker), Decision(Step.END, EndReason.START_FAILED, "the replica that started it died"))
            for maker in (Where.HERE, Where.DEAD)
        ],
        (
            starting(is_starting_here=True, run_end=EndReason.RUN_ENDED),
            Decision(Step.CANCEL_START, EndReason.RUN_ENDED, LEASE_OVER),
        ),
        (
            starting(is_starting_here=True, run_end=EndReason.RUN_ENDED, is_cancelled=True),
            Decision(Step.NONE, at=NOW + 60),
        ),
        (starting(is_starting_here=True, run_over_at=NOW), Decision(Step.LEARN_RUN)),
        (starting(is_starting_here=True, run_over_at=NOW + 9), Decision(Step.NONE, at=NOW + 9)),
        (starting(is_starting_here=True, run_over_at=NOW + 90), Decision(Step.NONE, at=NOW + 60)),
        *[
            (starting(maker=Where.ELSEWHERE, run_end=reason), Decision(Step.END, reason, why))
            for reason, why in ENDS_OF_RUNS
        ],
        (
            starting(maker=Where.DEAD, run_end=EndReason.RUN_ENDED),
            Decision(Step.END, EndReason.RUN_ENDED, LEASE_OVER),
        ),
        (
            starting(maker=Where.DEAD, run_over_at=NOW),
            Decision(Step.END, EndReason.START_FAILED, "the replica that started it died"),
        ),
        (
            starting(maker=Where.ELSEWHERE, phase=Phase.ENDED, exit_message="died", run_end=EndReason.RUN_ENDED),
            Decision(Step.END, EndReason.START_FAILED, "died"),
        ),
        (starting(maker=Where.ELSEWHERE, run_over_at=NOW, is_held=False), Decision(Step.LEARN_RUN)),
        (starting(maker=Where.ELSEWHERE, run_over_at=NOW + 9), Decision(Step.NONE, at=NOW + 9)),
        (starting(maker=Where.ELSEWHERE, is_held=False), Decision(Step.HOLD, at=NOW + 60)),
        (starting(maker=Where.ELSEWHERE), Decision(Step.NONE, at=NOW + 60)),
        # ready
        (view(phase=Phase.ENDED, exit_message="died"), Decision(Step.END, EndReason.PROCESS_DIED, "died")),
        (view(record=replace(READY, expires_at=NOW)), Decision(Step.END, EndReason.TTL_EXPIRED)),
        (view(record=replace(READY, expires_at=NOW), is_busy=True), Decision(Step.END, EndReason.TTL_EXPIRED)),
        *[(view(run_end=reason), Decision(Step.END, reason, why)) for reason, why in ENDS_OF_RUNS],
        (view(run_end=EndReason.RUN_ENDED, is_busy=True), Decision(Step.END, EndReason.RUN_ENDED, LEASE_OVER)),
        (view(run_end=EndReason.RUN_ENDED, phase=Phase.ENDED), Decision(Step.END, EndReason.PROCESS_DIED)),
        (
            view(run_end=EndReason.RUN_ENDED, record=replace(READY, expires_at=NOW)),
            Decision(Step.END, EndReason.TTL_EXPIRED),
        ),
        (
            view(run_end=EndReason.RUN_ENDED, requested_end=REQUESTED),
            Decision(Step.END, REQUESTED.reason, "asked for"),
        ),
        (view(run_over_at=NOW), Decision(Step.LEARN_RUN)),
        (view(run_over_at=NOW, has_tools=False), Decision(Step.LEARN_RUN)),
        (view(run_over_at=NOW, is_held=False), Decision(Step.LEARN_RUN)),
        (view(run_over_at=NOW, record=IDLE, idle_since=NOW - 30), Decision(Step.LEARN_RUN)),
        (view(run_over_at=NOW + 9), Decision(Step.NONE, at=NOW + 9)),
        (view(run_over_at=NOW + 9, has_tools=False, is_alone=False), Decision(Step.NONE, at=NOW + 9)),
        (view(record=IDLE, idle_since=NOW - 30), Decision(Step.END, EndReason.IDLE_EXPIRED)),
        (view(record=IDLE, idle_since=NOW - 29), Decision(Step.NONE, at=NOW + 1)),
        (view(record=IDLE, idle_since=NOW - 31, report_seconds=2.0), Decision(Step.NONE, at=NOW + 1)),
        (
            view(record=IDLE, idle_since=NOW - 32, report_seconds=2.0, calls_known_at=NOW - 0.5),
            Decision(Step.LEARN_CALLS),
        ),
        (
            view(record=IDLE, idle_since=NOW - 32, report_seconds=2.0, calls_known_at=NOW),
            Decision(Step.END, EndReason.IDLE_EXPIRED),
        ),
        (view(record=IDLE, idle_since=NOW - 40, is_busy=True), Decision(Step.NONE, at=NOW + 1)),
        (view(record=IDLE, idle_since=NOW, is_busy=True), Decision(Step.NONE, at=NOW + 30)),
        (view(is_busy=True), Decision(Step.NONE, at=NOW + 600)),
        (view(has_tools=False), Decision(Step.END, EndReason.LOST, "this hive does not know its tools")),
        (view(has_tools=False, is_alone=False), Decision(Step.NONE, at=NOW + TOOLS_SECONDS)),
        (
            view(has_tools=False, is_alone=False, record=replace(READY, expires_at=NOW + 3)),
            Decision(Step.NONE, at=NOW + 3),
        ),
        (view(is_held=False), Decision(Step.HOLD)),
        (view(has_route=False), Decision(Step.HOLD)),
        (view(has_route=False, maker=Where.DEAD), Decision(Step.HOLD)),
        (view(has_route=False, maker=Where.ELSEWHERE), Decision(Step.HOLD)),
        (view(state=State.STARTING), Decision(Step.MARK_READY)),
        (view(state=State.STARTING, has_route=False, maker=Where.ELSEWHERE), Decision(Step.HOLD)),
        (view(), Decision(Step.NONE, at=NOW + 600)),
    ],
)
def test_each_row_of_the_table(seen: View, decision: Decision) -> None:
    assert decide(seen, NOW) == decision


@pytest.mark.parametrize(
    ("record", "last_call_at", "restored_at", "since"),
    [
        (READY, None, 0.0, NOW - 1),
        (READY, NOW - 5, 0.0, NOW - 1),
        (READY, NOW + 5, 0.0, NOW + 5),
        (READY, NOW + 5, NOW + 9, NOW + 9),
        (STARTING, None, 7.0, 7.0),
    ],
)
def test_idle_time_counts_from_the_latest_of_ready_call_and_restoration(
    record: Record, last_call_at: float | None, restored_at: float, since: float
) -> None:
    assert idle_since(record, last_call_at, restored_at) == since


records = st.sampled_from((None, STARTING, READY, IDLE, ENDING, replace(STARTING, ending=REQUESTED)))
views = st.builds(
    View,
    state=st.sampled_from((None, *State)),
    record=records,
    phase=st.sampled_from((None, *Phase)),
    exit_message=st.sampled_from((None, "died")),
    requested_end=st.sampled_from((None, REQUESTED)),
    is_starting_here=st.booleans(),
    is_cancelled=st.booleans(),
    maker=st.sampled_from(Where),
    ender=st.sampled_from(Where),
    is_held=st.booleans(),
    has_route=st.booleans(),
    has_tools=st.booleans(),
    is_alone=st.booleans(),
    is_busy=st.booleans(),
    idle_since=st.sampled_from((-math.inf, NOW - 32, NOW)),
    calls_known_at=st.sampled_from((-math.inf, NOW, math.inf)),
    report_seconds=st.sampled_from((0.0, 2.0)),
    ended_at=st.sampled_from((None, NOW - 5, NOW - 4000)),
    is_lost=st.booleans(),
    is_withdrawn=st.booleans(),
    run_end=st.sampled_from((None, EndReason.RUN_ENDED, EndReason.DESTROYED)),
    run_over_at=st.sampled_from((-math.inf, NOW, NOW + 5, math.inf)),
)


@given(views)
def test_what_holds_of_every_view(seen: View) -> None:
    found = decide(seen, NOW)
    if found.step is Step.DELETE:
        assert seen.record is not None and seen.record.ending is not None, "the reason is recorded first"
        assert found.reason is seen.record.ending.reason
    if found.step is Step.END:
        assert seen.record is not None and seen.record.ending is None, "the first reason holds"
    if found.step in (Step.END, Step.WITHDRAW, Step.BURY, Step.CANCEL_START):
        assert found.reason is not None
    if seen.record is None and seen.phase is not None:
        assert found == DONE, "what cannot be read is left alone"
    assert found.step is not Step.NONE or found.at > NOW, "waiting for what is over would be a busy loop"
    assert found.step is not Step.BURY or seen.phase is not Phase.RUNNING


@given(views)
def test_that_the_store_lacks_something_is_no_reason_to_end(seen: View) -> None:
    seen = replace(seen, run_end=None)  # that a run has ended is said by the store, not lacking in it
    lacking = replace(
        seen, run_over_at=NOW, is_held=False, has_route=False, maker=Where.ELSEWHERE, calls_known_at=-math.inf
    )
    there = replace(
        seen, run_over_at=math.inf, is_held=True, has_route=True, maker=Where.ELSEWHERE, calls_known_at=math.inf
    )
    ends = (Step.END, Step.DELETE, Step.BURY, Step.WITHDRAW)
    assert decide(lacking, NOW).step not in ends or decide(lacking, NOW) == decide(there, NOW)
