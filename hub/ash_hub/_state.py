"""The life of a sandbox as a table: no I/O, no clock of its own.

    pending --start--> starting --ready--> ready --stop--> stopping --end--> gone
       |                  |                  |               |
       +------ fail ------+------ fail ------+---- fail -----+--> failed(reason)

`stop` is also legal before `ready`: a spawn can be cancelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from ash_mcp.types import EndReason, State

__all__ = ["IllegalStep", "Life", "Step", "advance", "born", "due", "extended"]


class Step(StrEnum):
    START = "start"
    READY = "ready"
    STOP = "stop"
    END = "end"
    FAIL = "fail"


TABLE: Mapping[State, Mapping[Step, State]] = {
    State.PENDING: {Step.START: State.STARTING, Step.STOP: State.STOPPING, Step.FAIL: State.FAILED},
    State.STARTING: {Step.READY: State.READY, Step.STOP: State.STOPPING, Step.FAIL: State.FAILED},
    State.READY: {Step.STOP: State.STOPPING, Step.FAIL: State.FAILED},
    State.STOPPING: {Step.END: State.GONE, Step.FAIL: State.FAILED},
    State.GONE: {},
    State.FAILED: {},
}


class IllegalStep(Exception):
    """The table has no such step from that state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """The part of a sandbox that changes with time. Times are seconds since the epoch."""

    state: State
    created_at: float
    expires_at: float
    idle_seconds: float | None
    ready_at: float | None = None
    ended_at: float | None = None
    reason: EndReason | None = None
    message: str | None = None


def born(now: float, *, ttl_seconds: float, idle_seconds: float | None) -> Life:
    """Return the life of a sandbox that was just asked for."""
    return Life(state=State.PENDING, created_at=now, expires_at=now + ttl_seconds, idle_seconds=idle_seconds)


def advance(life: Life, step: Step, now: float, reason: EndReason | None = None, message: str | None = None) -> Life:
    """Return `life` after `step`.

    Raises:
        IllegalStep: The table has no such step from this state.
    """
    state = TABLE[life.state].get(step)
    if state is None:
        raise IllegalStep(f"a sandbox that is {life.state} cannot {step}")
    return replace(
        life,
        state=state,
        ready_at=now if state is State.READY else life.ready_at,
        ended_at=now if state.ended else life.ended_at,
        reason=life.reason or reason,
        message=life.message or message,
    )


def due(life: Life, now: float, last_call_at: float | None) -> EndReason | None:
    """Say why a sandbox should be ended now, or None.

    The TTL counts from the spawn and the idle time from the last call or from `ready`, whichever came later.
    """
    if life.state.ended or life.state is State.STOPPING:
        return None
    if now >= life.expires_at:
        return EndReason.TTL_EXPIRED
    if life.idle_seconds is None or life.ready_at is None:
        return None
    if now >= max(life.ready_at, last_call_at or 0.0) + life.idle_seconds:
        return EndReason.IDLE_EXPIRED
    return None


def extended(life: Life, now: float, ttl_seconds: float) -> Life:
    """Return `life` with `ttl_seconds` left from now.

    Raises:
        IllegalStep: It has ended or is about to.
    """
    if life.state.ended or life.state is State.STOPPING:
        raise IllegalStep(f"a sandbox that is {life.state} cannot be extended")
    return replace(life, expires_at=now + ttl_seconds)
