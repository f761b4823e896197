"""One sandbox as the hub knows it, and the record of it that its backend keeps for the next hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio

from ash_hub import _state
from ash_hub._state import Life, Step
from ash_hub.tools import Toolset
from ash_mcp.errors import SandboxGone
from ash_mcp.types import Endpoint, EndReason, SandboxId, SandboxInfo, Scope, SessionName, State

__all__ = ["Sandbox"]

RECORD_VERSION = 3

_WHY: Mapping[EndReason, str] = {
    EndReason.DESTROYED: "it was destroyed",
    EndReason.TTL_EXPIRED: "its time to live was over",
    EndReason.IDLE_EXPIRED: "it was idle for too long",
    EndReason.HIVE_STOPPED: "the hive was stopped",
    EndReason.START_FAILED: "it did not start",
    EndReason.PROCESS_DIED: "its main process died",
    EndReason.LOST: "the host it ran on no longer has it",
}


@dataclass(slots=True, eq=False, kw_only=True)
class Sandbox:
    """A sandbox from the moment it is asked for until an hour after its end."""

    id: SandboxId
    owner: str
    scope: Scope
    session: SessionName
    recipe: str
    life: Life
    labels: Mapping[str, str]
    key: str | None = None
    """The idempotency key of its spawn."""
    maker: str = ""
    """The replica that spawned it; before it is ready, only that one knows how it stands."""
    revision: int = 0
    """Of its record: what a replica knows is not undone by an older one that comes late."""
    ending_here: bool = False
    """Whether it is this process that ends it."""
    generation: int = 1
    warnings: tuple[str, ...] = ()
    toolset: Toolset | None = None
    endpoint: Endpoint | None = None
    settled: anyio.Event = field(default_factory=anyio.Event)
    """Set when it is ready or has ended."""
    ended: anyio.Event = field(default_factory=anyio.Event)
    starting: anyio.CancelScope | None = None
    """The spawn that makes it, while it does."""

    def step(self, step: Step, now: float, reason: EndReason | None = None, message: str | None = None) -> None:
        """Take one step of its life and wake whoever waits for it."""
        self.life = _state.advance(self.life, step, now, reason, message)
        if self.life.state.ended:
            self.ended.set()
        if self.life.state.ended or self.life.state is State.READY:
            self.settled.set()

    def info(self, last_call_at: float | None) -> SandboxInfo:
        """Return what its owner may see."""
        life = self.life
        return SandboxInfo(
            id=self.id,
            session=self.session,
            scope=self.scope,
            recipe=self.recipe,
            state=life.state,
            created_at=life.created_at,
            ready_at=life.ready_at,
            expires_at=life.expires_at,
            idle_seconds=life.idle_seconds,
            last_call_at=last_call_at,
            ended_at=life.ended_at,
            reason=life.reason,
            message=life.message,
            labels=self.labels,
            warnings=self.warnings,
        )

    def gone(self, now: float) -> SandboxGone:
        """Return why it ended as the failure of a call that came too late."""
        reason = self.life.reason or EndReason.LOST
        ago = f" {max(0, int(now - self.life.ended_at))} s ago" if self.life.ended_at is not None else ""
        detail = f" ({self.life.message})" if self.life.message else ""
        return SandboxGone(
            f"sandbox {self.session} ended{ago}: {_WHY[reason]}{detail}. Call spawn for a new one; "
            "its files and processes are gone.",
            session=self.session,
            sandbox_id=self.id,
            reason=reason.value,
        )

    def record(self, last_call_at: float | None = None) -> dict[str, Any]:
        """Return what a new hub needs to take this sandbox over; no secret is in it.

        Args:
            last_call_at: When it was last called; None before any call, and where the store keeps that.
        """
        return {
            "version": RECORD_VERSION,
            "revision": self.revision,
            "maker": self.maker,
            "owner": self.owner,
            "scope": self.scope,
            "session": self.session,
            "recipe": self.recipe,
            "key": self.key,
            "created_at": self.life.created_at,
            "ready_at": self.life.ready_at,
            "expires_at": self.life.expires_at,
            "idle_seconds": self.life.idle_seconds,
            "last_call_at": last_call_at,
            "labels": dict(self.labels),
            "warnings": list(self.warnings),
            "toolset": self.toolset.digest if self.toolset is not None else None,
            "ending": self.life.reason,
        }

    @classmethod
    def from_record(cls, sandbox_id: SandboxId, record: Mapping[str, Any]) -> Sandbox:
        """Rebuild a sandbox as its maker wrote it down, which is starting or ready.

        Raises:
            KeyError, TypeError, ValueError: The record is of another version or no record at all.
        """
        if record["version"] != RECORD_VERSION:
            raise ValueError(f"record version {record['version']!r}")
        is_ready = record["ready_at"] is not None
        return cls(
            id=sandbox_id,
            owner=str(record["owner"]),
            scope=Scope(str(record["scope"])),
            session=SessionName(str(record["session"])),
            recipe=str(record["recipe"]),
            key=record["key"],
            maker=str(record["maker"]),
            revision=int(record["revision"]),
            labels=dict(record["labels"]),
            warnings=tuple(record["warnings"]),
            life=Life(
                state=State.READY if is_ready else State.STARTING,
                created_at=float(record["created_at"]),
                ready_at=float(record["ready_at"]) if is_ready else None,
                expires_at=float(record["expires_at"]),
                idle_seconds=record["idle_seconds"],
            ),
        )
