"""One sandbox as this replica shows it: its record, where it listens, and how far its life has come here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import anyio

from ash_hub.backends.base import Exit
from ash_hub.lifecycle.record import Ending, Record
from ash_hub.spawning.toolsets import Toolset
from ash_mcp.errors import SandboxGone
from ash_mcp.types import Cause, Endpoint, EndReason, SandboxId, SandboxInfo, Scope, SessionName, State

__all__ = ["Sandbox"]

_WHY: Final[Mapping[EndReason, str]] = {
    EndReason.DESTROYED: "it was destroyed",
    EndReason.TTL_EXPIRED: "its time to live was over",
    EndReason.IDLE_EXPIRED: "it was idle for too long",
    EndReason.RUN_ENDED: "its run ended",
    EndReason.HIVE_STOPPED: "the hive was stopped",
    EndReason.START_FAILED: "it did not start",
    EndReason.PROCESS_DIED: "its main process died",
    EndReason.LOST: "the host it ran on no longer has it",
}
_CAUSES: Final[Mapping[EndReason, Cause]] = {
    EndReason.DESTROYED: Cause.AGENT,
    EndReason.TTL_EXPIRED: Cause.LIMIT,
    EndReason.IDLE_EXPIRED: Cause.LIMIT,
    EndReason.RUN_ENDED: Cause.LIMIT,
    EndReason.HIVE_STOPPED: Cause.OPERATOR,
    EndReason.START_FAILED: Cause.HIVE,
    EndReason.PROCESS_DIED: Cause.AGENT,
    EndReason.LOST: Cause.HOST,
}
"""Where the backend does not say more."""
_FAILURES: Final = (EndReason.START_FAILED, EndReason.PROCESS_DIED, EndReason.LOST)


@dataclass(slots=True, eq=False, kw_only=True)
class Sandbox:
    """A sandbox from the moment it is asked for until an hour after its end. The controller alone changes it."""

    id: SandboxId
    record: Record
    """The newest one that this replica has read or written."""
    seen_revision: int = 0
    """Of the record in the last look, on which every decision rests."""
    state: State = State.PENDING
    reason: EndReason | None = None
    cause: Cause | None = None
    message: str | None = None
    ended_at: float | None = None
    is_withdrawn: bool = False
    """Whether its route was dropped since it began to end, and callers told."""
    is_surplus: bool = False
    """Whether it ended before as many others as are remembered."""
    is_unannounced: bool = False
    """Whether whoever spawns it tells callers that it is ready, instead of the controller."""
    requested_end: Ending | None = None
    """An end that this replica wants and has not recorded yet."""
    exit: Exit | None = None
    """What the backend said of the end of its main process."""
    toolset: Toolset | None = None
    endpoint: Endpoint | None = None
    held_epoch: int | None = None
    """The `Controller.store_epoch` in which the store was last told of its names and route."""
    start: anyio.CancelScope | None = None
    """The start of it that runs in this process."""
    settled: anyio.Event = field(default_factory=anyio.Event)
    """Set when it is ready or has ended."""
    ended: anyio.Event = field(default_factory=anyio.Event)

    @property
    def owner(self) -> str:
        return self.record.owner

    @property
    def scope(self) -> Scope:
        return self.record.scope

    @property
    def session(self) -> SessionName:
        return self.record.session

    @property
    def recipe(self) -> str:
        return self.record.recipe

    @property
    def key(self) -> str | None:
        return self.record.key

    @property
    def labels(self) -> Mapping[str, str]:
        return self.record.labels

    @property
    def alias(self) -> str | None:
        return self.record.alias

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.record.warnings

    def cause_of(self, reason: EndReason) -> Cause:
        """Return who causes an end with this reason, as far as it is known now."""
        if self.record.ending is not None:
            return self.record.ending.cause
        if reason is EndReason.PROCESS_DIED and self.exit is not None:
            return self.exit.cause
        if reason is EndReason.START_FAILED and self.exit is not None:
            return self.exit.cause_of_start
        if self.requested_end is not None and self.requested_end.reason is reason:
            return self.requested_end.cause
        return _CAUSES[reason]

    def withdraw(self, reason: EndReason, message: str | None) -> None:
        """Show it as ending."""
        self.state, self.reason, self.message = State.STOPPING, reason, message
        self.cause = self.cause_of(reason)

    def bury(self, reason: EndReason, message: str | None, now: float, cause: Cause | None = None) -> None:
        """Show it as ended; the reason that was shown first stays. None: the cause follows from the reason."""
        self.cause = self.cause or cause or self.cause_of(reason)
        self.reason, self.message = self.reason or reason, self.message or message
        self.state = State.FAILED if self.reason in _FAILURES else State.GONE
        self.ended_at = now
        self.settled.set()
        self.ended.set()

    def info(self, last_call_at: float | None) -> SandboxInfo:
        """Return what its owner may see."""
        return SandboxInfo(
            id=self.id,
            session=self.session,
            scope=self.scope,
            recipe=self.recipe,
            state=self.state,
            created_at=self.record.created_at,
            ready_at=self.record.ready_at,
            expires_at=self.record.expires_at,
            idle_seconds=self.record.idle_seconds,
            last_call_at=last_call_at,
            ended_at=self.ended_at,
            reason=self.reason,
            cause=self.cause,
            message=self.message,
            labels=self.labels,
            network=self.record.network,
            warnings=self.warnings,
            run=self.record.run.name if self.record.run is not None else None,
            ports=self.record.ports,
        )

    def gone(self, now: float) -> SandboxGone:
        """Return why it ended as the failure of a call that came too late."""
        decided = self.record.ending or self.requested_end
        reason = self.reason or (decided.reason if decided is not None else EndReason.LOST)
        message = self.message or (decided.message if decided is not None else None)
        ago = f" {max(0, int(now - self.ended_at))} s ago" if self.ended_at is not None else ""
        detail = f" ({message})" if message else ""
        return SandboxGone(
            f"sandbox {self.session} ended{ago}: {_WHY[reason]}{detail}. Call spawn for a new one; "
            "its files and processes are gone.",
            session=self.session,
            sandbox_id=self.id,
            reason=reason.value,
            cause=(self.cause or self.cause_of(reason)).value,
        )
