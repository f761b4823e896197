"""The Backend Protocol: where sandboxes are made, and the truth about which exist.

A backend is *not* a lifecycle: it knows nothing of owners, time to live, sessions or tools. It starts what it is
told to start, says when it has ended and why, and never ends anything unasked. `memory.py` is the in-memory twin;
`ash_hub.testing.conformance.check_backend` is the suite that every implementation passes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from ash_hub.backends.documents import Documents
from ash_mcp.types import Cause, Endpoint, SandboxId, SandboxSpec, SnapshotId

__all__ = [
    "Backend",
    "BackendEvent",
    "BackendFactory",
    "DocumentsFactory",
    "Exit",
    "HostClock",
    "Instance",
    "Phase",
    "Places",
    "Snapshot",
    "SnapshotLimits",
    "SnapshotOrder",
    "Snapshots",
    "Warming",
]


class Phase(StrEnum):
    """What the backend can see of a sandbox from outside."""

    STARTING = "starting"
    """Asked for; not yet known to run."""
    RUNNING = "running"
    """Its main process runs and its listener exists; whether the runner answers is the hub's to find out."""
    ENDED = "ended"
    """Its main process is gone. The backend may still hold its log."""


def _no_record() -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Exit:
    """How an instance ended, as its backend saw it from outside."""

    message: str
    """One sentence for a person, such as `exited with code 1` or `killed: out of memory`."""
    cause: Cause

    @property
    def cause_of_start(self) -> Cause:
        """Who caused it if it was the end of a start: no agent has been in what did not start."""
        return Cause.HIVE if self.cause is Cause.AGENT else self.cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One sandbox as its backend sees it."""

    id: SandboxId
    phase: Phase
    endpoint: Endpoint | None = None
    """Set from `RUNNING` on."""
    exit: Exit | None = None
    """Set in `ENDED`."""
    waits_for: str | None = None
    """In `STARTING`, why it does not run yet, where the platform says it: `no node takes it: …`."""
    warnings: tuple[str, ...] = ()
    """What the host could not enforce for this sandbox, a sentence each."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    record: Mapping[str, Any] = field(default_factory=_no_record)
    """The `SandboxSpec.record` (or the newest one given to `annotate`), stored unread."""
    revision: int = 0
    """Counts the changes of the record: 0 as it was created, one more with each `annotate` or `set_network`."""
    copy_of: str | None = None
    """What its server is a copy of, as it was before there was anything of a sandbox in it. Servers that are copies of
    the same have the same tools. None: it is no copy."""


@dataclass(frozen=True, slots=True)
class BackendEvent:
    """A change of one instance's phase or record. `lost` is True when events may have been missed: list again."""

    instance: Instance | None
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Places:
    """The directories of one hive, each its owner's alone."""

    state_dir: Path
    run_dir: Path
    log_dir: Path
    ports: tuple[int, ...] = ()
    """Where on this host the hive itself listens; no sandbox may reach that."""
    shared: str | None = None
    """What the replicas of one hive have in common, and no other hive; None: this hive is one process."""
    keep: bool = True
    """Whether sandboxes that are left wait for the next hive without a time limit."""


class BackendFactory(Protocol):
    """What an entry point `ash.backends` names: makes a backend from the settings beside its `kind`.

    Raises:
        pydantic.ValidationError: An option is wrong.
    """

    def __call__(self, options: Mapping[str, Any], places: Places) -> Backend: ...


class DocumentsFactory(Protocol):
    """What an entry point `ash.documents` names: opens the documents alone of a hive, while it runs or not.

    A backend of another kind than `local` has one, so that `ash key` can change the API keys that it keeps.

    Raises:
        pydantic.ValidationError: An option is wrong.
        ConfigError: Where they are kept cannot be found.
    """

    def __call__(self, options: Mapping[str, Any], places: Places) -> AbstractAsyncContextManager[Documents]: ...


class Backend(Protocol):
    """Where sandboxes are made. Entered once as an async context manager before any other call.

    Leaving the context lets go of the backend and must not end any sandbox: that is `delete`'s.
    """

    @property
    def kind(self) -> str:
        """The name under which settings choose it, such as `local`."""
        ...

    @property
    def documents(self) -> Documents:
        """Where the hive's own documents are kept."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    async def create(self, spec: SandboxSpec) -> Instance:
        """Start a sandbox and return it in phase `RUNNING` (or `STARTING`, where the platform schedules it).

        On any failure or cancellation nothing of the sandbox is left behind.

        Raises:
            StartFailed: With `step` and the last lines of the log.
            CapacityExceeded: The host cannot hold another now.
            ConfigError: The spec asks for something that this backend can never do (an unknown image, say).
            Conflict: There is a sandbox of this id already.
        """
        ...

    async def get(self, sandbox_id: SandboxId) -> Instance | None:
        """Return one sandbox, or None if there is none; one that is not known here may be another replica's.

        What this replica did is seen at once; what another did, once its event came.

        Raises:
            ConnectFailed: It is not known here and the backend does not answer.
        """
        ...

    async def list(self) -> list[Instance]:
        """Return every sandbox of this hive as it is now, whichever replica made it.

        Ended ones are included while the backend remembers them.

        Raises:
            ConnectFailed: The backend does not answer.
        """
        ...

    async def annotate(self, sandbox_id: SandboxId, record: Mapping[str, Any], *, revision: int) -> None:
        """Replace the stored record of a sandbox if it still has `revision`, whichever replica made it.

        Raises:
            Conflict: Its record was changed since, or there is no such sandbox: look again.
            ConnectFailed: The backend does not answer; it may have been done.
        """
        ...

    async def set_network(
        self, sandbox_id: SandboxId, network: str | tuple[str, ...], record: Mapping[str, Any], *, revision: int
    ) -> None:
        """Replace the network policy of a running sandbox, and its record, in one step as `annotate` does.

        When it returns, nothing new goes out that the policy refuses, and connections that it would refuse are closed.

        Args:
            network: As `SandboxSpec.network`.

        Raises:
            Conflict: Its record was changed since, or it does not run: look again.
            ConfigError: No such policy can be carried out here; nothing was changed.
            Unsupported: This sandbox's network cannot be changed, as of one that was started with `none`.
            ConnectFailed: The backend does not answer; it may have been done.
        """
        ...

    async def delete(self, sandbox_id: SandboxId, *, grace_seconds: float = 2.0) -> None:
        """End a sandbox and remove all that was made for it; idempotent, also for an unknown id.

        Its processes get SIGTERM, then after the grace SIGKILL. Returns when nothing is left, or, while the backend
        does not answer, when it is sure to be done once it does.

        Raises:
            ConnectFailed: The backend failed at it; it may be done later.
        """
        ...

    async def logs(self, sandbox_id: SandboxId, *, tail_bytes: int = 65_536) -> bytes:
        """Return the last bytes of what the sandbox's main process wrote; empty if unknown.

        Raises:
            ConnectFailed: The backend does not answer.
        """
        ...

    def watch(self) -> AsyncIterator[BackendEvent]:
        """Yield every change of phase or record from now on, whichever replica made it, until the backend is left.

        What another replica deletes comes as `ENDED`, with the last record that it had.

        A slow reader gets one event with `lost=True` instead of a growing queue.
        """
        ...

    def unready(self) -> str | None:
        """Say why sandboxes can be neither made nor ended now, or None. Those that run do not hang on it."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Return what this backend gives on this host, for `ash doctor` and `/readyz`: JSON values."""
        ...


@runtime_checkable
class HostClock(Protocol):
    """What a backend has, too, whose sandboxes all live on one host. Of any other the store tells the time."""

    def now(self) -> float:
        """Return the time, in seconds since the epoch, that records of sandboxes are written in.

        Every hub that has these sandboxes, at once or after another, is told the same, within a second; setting the
        machine's clock does not change it.
        """
        ...


@runtime_checkable
class Warming(Protocol):
    """What a backend has, too, that can make the next start of a recipe faster."""

    async def warm(self, spec: SandboxSpec) -> None:
        """Prepare for sandboxes like this one, of which none is made. Never fails."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotLimits:
    """How many snapshots there may be, and their bytes; what several stand on counts once."""

    per_owner: int
    hive: int
    owner_bytes: int
    hive_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotOrder:
    """The order to a backend for one snapshot."""

    id: SnapshotId
    owner: str
    """Whose limit it counts against."""
    limits: SnapshotLimits
    seconds: float
    """How long it is kept."""
    record: Mapping[str, Any]
    """What the hub needs to know of it; the backend stores it unread."""
    live: bool = False
    """Whether its files are copied while the sandbox goes on, each as it is at some moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot as its backend sees it."""

    id: SnapshotId
    owner: str
    size: int
    """What was written since the snapshot that it stands on, in bytes."""
    layers: int
    """How many snapshots it stands on, and itself."""
    left_seconds: float
    record: Mapping[str, Any]


@runtime_checkable
class Snapshots(Protocol):
    """What a backend has, too, that can freeze the files of sandboxes, and start others from them.

    A snapshot has files only: no process and no environment. It outlives its sandbox and the hub, but not the backend.
    `create` takes one by `SandboxSpec.snapshot`.
    """

    def no_snapshots(self) -> str | None:
        """Say why none can be taken here, and what to do; None: they can."""
        ...

    async def freeze(self, sandbox_id: SandboxId, order: SnapshotOrder) -> Snapshot:
        """End a sandbox's processes, freeze its files, and start it anew from them; it runs meanwhile, to all.

        A live one ends nothing, and takes the longer the more was written.

        Raises:
            Conflict: It does not run, is frozen or reset already, or its files could not be copied.
            CapacityExceeded: There would be more, or more bytes, than the limits say, or too many on one another.
            Unsupported: This one's files cannot be frozen.
            StartFailed: It did not start anew, and has ended; there is no snapshot.
            ConnectFailed: The backend does not answer; it may have been done.
        """
        ...

    async def reset(self, sandbox_id: SandboxId, snapshot_id: SnapshotId) -> None:
        """End a sandbox's processes and start it anew from a snapshot; it runs meanwhile, to all.

        Raises:
            SnapshotNotFound: There is none of that id; nothing was done.
            Conflict, Unsupported, StartFailed, ConnectFailed: As `freeze` does.
        """
        ...

    async def snapshots(self) -> Sequence[Snapshot]:
        """Return all snapshots of this hive, whichever replica took them.

        Raises:
            ConnectFailed: The backend does not answer.
        """
        ...

    async def drop_snapshot(self, snapshot_id: SnapshotId) -> None:
        """Give up a snapshot; idempotent. Sandboxes that stand on it go on.

        Raises:
            ConnectFailed: The backend does not answer; it may have been done.
        """
        ...
