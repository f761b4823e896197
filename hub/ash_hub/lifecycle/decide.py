"""The decision table of the lifecycle: the next step for one sandbox, from what this replica sees. No I/O, no clock.

The first row that fits holds. "Present" means that the backend has the instance; "ended" is a phase of it, "buried" a
state of the sandbox here. `requested_end` is an end that this replica wants and has not recorded yet.

| instance | record          | and                                    | step         |
|----------|-----------------|----------------------------------------|--------------|
| absent   |                 | not known here, but it has a route     | UNROUTE      |
| absent   |                 | not known here                         | -            |
| absent   |                 | buried, but it has a route             | UNROUTE      |
| absent   |                 | buried, for longer than it is kept     | FORGET       |
| absent   |                 | buried                                 | -            |
| absent   |                 | starts here, and an end is requested   | CANCEL_START |
| absent   |                 | starts here, and its run has ended     | CANCEL_START |
| absent   |                 | starts here, over its run's lease      | LEARN_RUN    |
| absent   |                 | starts here, names not in the store    | HOLD         |
| absent   |                 | starts here                            | -            |
| absent   |                 | otherwise                              | BURY         |
| present  | unreadable      |                                        | -            |
| present  | ending          | starts here                            | CANCEL_START |
| present  | ending          | not withdrawn and not buried           | WITHDRAW     |
| present  | ending          | ours to delete                         | DELETE       |
| ended    | ending          | another replica deletes it, not buried | BURY         |
| present  | ending          | another replica deletes it             | -            |
| running  | not ending      | buried as lost                         | FORGET       |
| present  | not ending      | buried, or an end is requested         | CANCEL_START |
|          |                 |                     (if it starts here) | or END       |
| ended    | starting        | starts here: the start finds out       | -            |
| ended    | starting        | otherwise                              | END failed   |
| present  | starting        | its run has ended                      | END run's    |
|          |                 |                     (if it starts here)| CANCEL_START |
| present  | starting        | over `start_by`, or nobody starts it   | END failed   |
| present  | starting        | over its run's lease                   | LEARN_RUN    |
| present  | starting        | names not in the store                 | HOLD         |
| present  | starting        | otherwise                              | -            |
| ended    | ready           |                                        | END died     |
| present  | ready           | over its time to live                  | END expired  |
| present  | ready           | its run has ended                      | END run's    |
| present  | ready           | over its run's lease                   | LEARN_RUN    |
| present  | ready           | over its idle time                     | LEARN_CALLS, |
|          |                 |                                        | then END idle|
| present  | ready           | its tools are not known, one replica   | END lost     |
| present  | ready           | its tools are not known                | -            |
| present  | ready           | names or route not in the store        | HOLD         |
| present  | ready           | not shown as ready                     | MARK_READY         |
| present  | ready           | otherwise                              | -            |

An end is recorded before anything is deleted, so the reason outlives whoever decided. That the store lacks something
is never a reason to end a sandbox: a run has ended when the store says so, and what it does not know LEARN_RUN puts
back, with a new lease.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ash_hub.backends.base import Phase
from ash_hub.lifecycle.record import Ending, Record
from ash_mcp.types import EndReason, State

__all__ = ["DELETE_SECONDS", "Decision", "Step", "View", "Where", "decide", "idle_since"]

DELETE_SECONDS: Final = 15.0
"""How long the replica that recorded an end has for the delete before any other takes it over."""
RUN_MESSAGES: Final = {
    EndReason.RUN_ENDED: "whoever held its run did not renew the lease",
    EndReason.DESTROYED: "its run was destroyed",
}
TOOLS_SECONDS: Final = 30.0
"""How often a replica that does not know a sandbox's tools looks for them."""


class Step(StrEnum):
    """One idempotent thing to do."""

    NONE = "none"
    UNROUTE = "unroute"
    """Drop the route of a sandbox that nobody has."""
    FORGET = "forget"
    """Drop what is known of a sandbox that is buried."""
    CANCEL_START = "cancel_start"
    """Break off the start that runs in this process."""
    HOLD = "hold"
    """Tell the store of its names and, if it is ready, of its route."""
    MARK_READY = "mark_ready"
    """Show it as ready."""
    LEARN_CALLS = "learn_calls"
    """Ask the store when it was last called."""
    LEARN_RUN = "learn_run"
    """Ask the store how its run stands, and have it put back there if it is lost."""
    END = "end"
    """Record that it is to end, and why."""
    WITHDRAW = "withdraw"
    """Take its tools away from callers, and end the calls in flight with the reason."""
    DELETE = "delete"
    """Delete the instance."""
    BURY = "bury"
    """Give its names back, and keep why it ended."""


class Where(StrEnum):
    """Which replica does something."""

    HERE = "here"
    ELSEWHERE = "elsewhere"
    """Another one, which lives or may live."""
    DEAD = "dead"
    """One that lives no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One sandbox as this replica sees it."""

    state: State | None
    """What callers of this replica are shown; None: it is not known here."""
    record: Record | None
    """The newest one that was read; None where it cannot be read."""
    phase: Phase | None
    """None: the backend has no such instance."""
    exit_message: str | None = None
    requested_end: Ending | None = None
    is_starting_here: bool = False
    """Whether a start runs in this process."""
    is_cancelled: bool = False
    """Whether that start was told to break off."""
    maker: Where = Where.HERE
    ender: Where = Where.HERE
    is_held: bool = True
    """Whether the store was told of its names since it was last empty."""
    has_route: bool = True
    has_tools: bool = True
    is_alone: bool = True
    """Whether there can be no other replica."""
    is_busy: bool = False
    """Whether a call of this replica is in flight."""
    idle_since: float = -math.inf
    """Since when no call is known: see `idle_since`."""
    calls_known_at: float = math.inf
    """When the calls through other replicas were last asked for."""
    report_seconds: float = 0.0
    """How much later than a call the store may know of it."""
    run_end: EndReason | None = None
    """Why it is to end with its run; None: the run is not known to have ended, or there is none."""
    run_over_at: float = math.inf
    """When its run's lease is over, as far as it is known here that it was renewed."""
    is_withdrawn: bool = False
    """Whether its tools were taken away from callers."""
    ended_at: float | None = None
    is_lost: bool = False
    """Whether it was buried because the backend no longer had it."""
    kept_seconds: float = math.inf
    """How long why it ended is kept."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The next step; with `NONE`, `at` says when to look again if nothing happens before."""

    step: Step
    reason: EndReason | None = None
    message: str | None = None
    at: float = math.inf


def decide(view: View, now: float) -> Decision:
    """Return the next step for a sandbox. The table is in the module's docstring."""
    if view.phase is None:
        return _absent(view, now)
    if view.record is None:
        return Decision(Step.NONE)
    if view.record.ending is not None:
        return _ending(view, view.record.ending, now)
    if view.requested_end is not None:
        return _requested(view, view.requested_end)
    if view.record.ready_at is None:
        return _starting(view, view.record, now)
    return _ready(view, view.record, now)


def idle_since(record: Record, last_call_at: float | None, restored_at: float) -> float:
    """Return since when a sandbox is idle: its last call, but not before it was ready or calls were surely counted."""
    return max(at for at in (record.ready_at, last_call_at, restored_at) if at is not None)


def _absent(view: View, now: float) -> Decision:
    if view.has_route and (view.state is None or view.ended_at is not None):
        return Decision(Step.UNROUTE)
    if view.state is None:
        return Decision(Step.NONE)
    if view.ended_at is not None:
        over = view.ended_at + view.kept_seconds
        return Decision(Step.FORGET) if now >= over else Decision(Step.NONE, at=over)
    if view.is_starting_here:
        return _start_here(view, now)
    known = (view.record.ending if view.record is not None else None) or view.requested_end
    if known is not None:
        return Decision(Step.BURY, known.reason, known.message)
    if view.record is not None and view.record.ready_at is None:
        return Decision(Step.BURY, EndReason.START_FAILED, view.exit_message or "its start broke off")
    if view.exit_message is not None:
        return Decision(Step.BURY, EndReason.PROCESS_DIED, view.exit_message)
    return Decision(Step.BURY, EndReason.LOST)


def _start_here(view: View, now: float) -> Decision:
    if view.requested_end is not None and not view.is_cancelled:
        return Decision(Step.CANCEL_START, view.requested_end.reason, view.requested_end.message)
    return _going_on(view, now, math.inf)


def _going_on(view: View, now: float, at: float) -> Decision:
    """Decide on a start that runs in this process, and is not to end but with its run."""
    if view.is_cancelled:
        return Decision(Step.NONE if view.is_held else Step.HOLD, at=at)
    if view.run_end is not None:
        return _with_run(Step.CANCEL_START, view.run_end)
    if now >= view.run_over_at:
        return Decision(Step.LEARN_RUN)
    return Decision(Step.NONE if view.is_held else Step.HOLD, at=min(at, view.run_over_at))


def _with_run(step: Step, reason: EndReason) -> Decision:
    return Decision(step, reason, RUN_MESSAGES.get(reason))


def _ending(view: View, ending: Ending, now: float) -> Decision:
    if view.is_starting_here:
        return Decision(Step.NONE if view.is_cancelled else Step.CANCEL_START, ending.reason, ending.message)
    if view.ended_at is None and not view.is_withdrawn:
        return Decision(Step.WITHDRAW, ending.reason, ending.message)
    theirs_until = ending.at + DELETE_SECONDS
    if view.ender is not Where.ELSEWHERE or now >= theirs_until:
        return Decision(Step.DELETE, ending.reason)
    if view.phase is Phase.ENDED and view.ended_at is None:
        return Decision(Step.BURY, ending.reason, ending.message)
    return Decision(Step.NONE, at=theirs_until)


def _requested(view: View, ending: Ending) -> Decision:
    if view.is_lost and view.phase is not Phase.ENDED:
        return Decision(Step.FORGET)
    if view.is_starting_here:
        return Decision(Step.NONE if view.is_cancelled else Step.CANCEL_START, ending.reason, ending.message)
    return Decision(Step.END, ending.reason, ending.message)


def _starting(view: View, record: Record, now: float) -> Decision:
    if view.is_starting_here:
        return _going_on(view, now, record.start_by)
    if view.phase is Phase.ENDED:
        return Decision(Step.END, EndReason.START_FAILED, view.exit_message)
    if view.run_end is not None:
        return _with_run(Step.END, view.run_end)
    if now >= record.start_by:
        return Decision(Step.END, EndReason.START_FAILED, "its start took too long")
    if view.maker is not Where.ELSEWHERE:
        return Decision(Step.END, EndReason.START_FAILED, "the replica that started it died")
    if now >= view.run_over_at:
        return Decision(Step.LEARN_RUN)
    return Decision(Step.NONE if view.is_held else Step.HOLD, at=min(record.start_by, view.run_over_at))


def _ready(view: View, record: Record, now: float) -> Decision:
    if view.phase is Phase.ENDED:
        return Decision(Step.END, EndReason.PROCESS_DIED, view.exit_message)
    if now >= record.expires_at:
        return Decision(Step.END, EndReason.TTL_EXPIRED)
    if view.run_end is not None:
        return _with_run(Step.END, view.run_end)
    if now >= view.run_over_at:
        return Decision(Step.LEARN_RUN)
    idle_at = view.idle_since + record.idle_seconds if record.idle_seconds is not None else math.inf
    if now >= idle_at + view.report_seconds and not view.is_busy:
        is_sure = view.calls_known_at >= idle_at + view.report_seconds
        return Decision(Step.END, EndReason.IDLE_EXPIRED) if is_sure else Decision(Step.LEARN_CALLS)
    if not view.has_tools:
        return _without_tools(view, record, now)
    if not view.is_held or not view.has_route:
        return Decision(Step.HOLD)
    if view.state is not State.READY:
        return Decision(Step.MARK_READY)
    idle_look = idle_at + view.report_seconds
    look = max(idle_look, now + 1.0) if view.is_busy else idle_look
    return Decision(Step.NONE, at=min(record.expires_at, look, view.run_over_at))


def _without_tools(view: View, record: Record, now: float) -> Decision:
    if view.is_alone:
        return Decision(Step.END, EndReason.LOST, "this hive does not know its tools")
    return Decision(Step.NONE, at=min(now + TOOLS_SECONDS, record.expires_at, view.run_over_at))
