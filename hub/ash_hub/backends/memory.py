"""The in-memory twin of a backend: it starts nothing, or whatever stand-in it is given."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from types import TracebackType
from typing import Any, Self

from ash_hub.backends._broadcast import Broadcast
from ash_hub.backends.base import BackendEvent, Exit, Instance, Phase, Snapshot, SnapshotOrder
from ash_hub.backends.documents import DocumentKind, Tell, check_document
from ash_hub.backends.following import read_repeatedly
from ash_hub.backends.network import require_network
from ash_mcp.errors import AshError, CapacityExceeded, Conflict, SnapshotNotFound, StartFailed, Unsupported
from ash_mcp.types import Cause, Endpoint, SandboxId, SandboxSpec, SnapshotId
from ash_router.store.clock import even_clock

__all__ = ["MemoryBackend", "MemoryDocuments"]

Serve = Callable[[SandboxSpec], Awaitable[Endpoint]]


class MemoryBackend:
    """Keeps instances in a dict. Tests decide what they serve, when they die and which starts fail."""

    kind = "memory"

    def __init__(self, serve: Serve | None = None, *, said: bytes = b"") -> None:
        """Make a backend.

        Args:
            serve: Starts a stand-in for the runner of a spec and returns where it listens; whoever gave it ends
                it. None gives every sandbox an address at which nobody listens.
            said: What every sandbox is said to have written when it starts.
        """
        self._serve = serve
        self._said = said
        self.documents = MemoryDocuments(even_clock())
        self._events = Broadcast()
        self._replicas = [self]
        self._instances: dict[SandboxId, Instance] = {}
        self._starting: set[SandboxId] = set()
        self._logs: dict[SandboxId, bytearray] = {}
        self.networks: dict[SandboxId, str | tuple[str, ...]] = {}
        """The policy of each sandbox that was started with a network."""
        self.copy_of: str | None = None
        """What sandboxes that are made from now on are copies of."""
        self._failures: list[AshError] = []
        self._snapshots: dict[SnapshotId, tuple[Snapshot, float]] = {}
        """With when their time is over."""
        self.stands_on: dict[SandboxId, SnapshotId | None] = {}
        """The snapshot that each sandbox was last started from."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._events.close()

    async def create(self, spec: SandboxSpec) -> Instance:
        if spec.id in self._instances or spec.id in self._starting:
            raise Conflict(f"sandbox {spec.id} exists")
        if self._failures:
            raise self._failures.pop(0)
        self._require(spec.snapshot)
        self._starting.add(spec.id)
        try:
            endpoint = Endpoint(unix=f"/nowhere/{spec.id}") if self._serve is None else await self._serve(spec)
        finally:
            self._starting.discard(spec.id)
        instance = Instance(
            id=spec.id,
            phase=Phase.RUNNING,
            endpoint=endpoint,
            labels=dict(spec.labels),
            record=dict(spec.record),
            copy_of=self.copy_of,
        )
        self._logs[spec.id] = bytearray(self._said)
        self.stands_on[spec.id] = spec.snapshot
        if spec.network != "none":
            self.networks[spec.id] = spec.network
        return self._record(instance)

    async def get(self, sandbox_id: SandboxId) -> Instance | None:
        return self._instances.get(sandbox_id)

    async def list(self) -> list[Instance]:
        return list(self._instances.values())

    async def annotate(self, sandbox_id: SandboxId, record: Mapping[str, Any], *, revision: int) -> None:
        instance = self._unchanged(sandbox_id, revision)
        self._record(replace(instance, record=dict(record), revision=revision + 1))

    async def set_network(
        self, sandbox_id: SandboxId, network: str | tuple[str, ...], record: Mapping[str, Any], *, revision: int
    ) -> None:
        require_network(network, private=True)
        instance = self._unchanged(sandbox_id, revision)
        if instance.phase is not Phase.RUNNING:
            raise Conflict(f"sandbox {sandbox_id} does not run")
        if sandbox_id not in self.networks:
            raise Unsupported(f"sandbox {sandbox_id} was started without a network")
        self.networks[sandbox_id] = network
        self._record(replace(instance, record=dict(record), revision=revision + 1))

    def _unchanged(self, sandbox_id: SandboxId, revision: int) -> Instance:
        instance = self._instances.get(sandbox_id)
        if instance is None or instance.revision != revision:
            raise Conflict(f"the record of sandbox {sandbox_id} is not at revision {revision}")
        return instance

    def no_snapshots(self) -> str | None:
        return None

    async def freeze(self, sandbox_id: SandboxId, order: SnapshotOrder) -> Snapshot:
        self._require_running(sandbox_id)
        held = await self.snapshots()
        if len(held) >= order.limits.hive or sum(it.owner == order.owner for it in held) >= order.limits.per_owner:
            raise CapacityExceeded("there are too many snapshots", retryable=False)
        below = self.stands_on[sandbox_id]
        layers = 1 if below is None or below not in self._snapshots else self._snapshots[below][0].layers + 1
        snapshot = Snapshot(
            id=order.id,
            owner=order.owner,
            size=0,
            layers=layers,
            left_seconds=order.seconds,
            record=dict(order.record),
        )
        self._snapshots[order.id] = snapshot, monotonic() + order.seconds
        if not order.live:
            self.stands_on[sandbox_id] = order.id
        return snapshot

    async def reset(self, sandbox_id: SandboxId, snapshot_id: SnapshotId) -> None:
        self._require_running(sandbox_id)
        self._require(snapshot_id)
        if self._failures:
            message = "it did not start anew"
            self.die(sandbox_id, message, Cause.HIVE)
            raise self._failures.pop(0)
        self.stands_on[sandbox_id] = snapshot_id

    async def snapshots(self) -> Sequence[Snapshot]:
        now = monotonic()
        left = [(snapshot, until - now) for snapshot, until in self._snapshots.values() if until > now]
        return [replace(snapshot, left_seconds=seconds) for snapshot, seconds in left]

    async def drop_snapshot(self, snapshot_id: SnapshotId) -> None:
        self._snapshots.pop(snapshot_id, None)

    def _require(self, snapshot_id: SnapshotId | None) -> None:
        if snapshot_id is not None and (snapshot_id not in self._snapshots):
            raise SnapshotNotFound(f"there is no snapshot {snapshot_id}")

    def _require_running(self, sandbox_id: SandboxId) -> None:
        instance = self._instances.get(sandbox_id)
        if instance is None or instance.phase is not Phase.RUNNING:
            raise Conflict(f"sandbox {sandbox_id} does not run")

    async def delete(self, sandbox_id: SandboxId, *, grace_seconds: float = 2.0) -> None:
        instance = self._instances.pop(sandbox_id, None)
        self._logs.pop(sandbox_id, None)
        self.networks.pop(sandbox_id, None)
        if instance is not None and instance.phase is not Phase.ENDED:
            self._publish(replace(instance, phase=Phase.ENDED, exit=Exit("deleted", Cause.HIVE)))

    async def logs(self, sandbox_id: SandboxId, *, tail_bytes: int = 65_536) -> bytes:
        log = self._logs.get(sandbox_id, bytearray())
        return bytes(log[-tail_bytes:]) if tail_bytes > 0 else b""

    def watch(self) -> AsyncIterator[BackendEvent]:
        return self._events.watch()

    def unready(self) -> str | None:
        return None

    def describe(self) -> Mapping[str, Any]:
        return {"kind": self.kind, "warnings": []}

    def another(self) -> MemoryBackend:
        """Return what another replica of the same hive would have, not entered yet."""
        other = copy.copy(self)
        other._events = Broadcast()
        self._replicas.append(other)
        return other

    def die(self, sandbox_id: SandboxId, message: str = "exited with code 1", cause: Cause = Cause.AGENT) -> None:
        """End a sandbox as if its main process had died."""
        self._record(replace(self._instances[sandbox_id], phase=Phase.ENDED, exit=Exit(message, cause)))

    def write_log(self, sandbox_id: SandboxId, data: bytes) -> None:
        """Add to what its main process is said to have written."""
        self._logs[sandbox_id] += data

    def fail_next(self, error: AshError | None = None) -> None:
        """Make the next `create` fail, after those that were already told to; by default with `StartFailed`."""
        self._failures.append(error or StartFailed("told to fail", step="launch", log="the last line"))

    def _record(self, instance: Instance) -> Instance:
        self._instances[instance.id] = instance
        self._publish(instance)
        return instance

    def _publish(self, instance: Instance) -> None:
        for replica in self._replicas:
            replica._events.publish(instance)


class MemoryDocuments:
    """The in-memory twin: one dict, shared by the replicas that have this object."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: dict[tuple[DocumentKind, str], tuple[bytes, float]] = {}

    async def read(self, kind: DocumentKind, name: str) -> bytes | None:
        check_document(kind, name)
        body, _ = self._kept.get((kind, name), (None, 0.0))
        return body

    async def follow(self, kind: DocumentKind, name: str, tell: Tell) -> None:
        await read_repeatedly(self, kind, name, tell)

    async def keep(self, kind: DocumentKind, name: str, body: bytes) -> None:
        check_document(kind, name, body)
        first, _ = self._kept.get((kind, name), (body, 0.0))
        self._kept[kind, name] = (first, self._clock())

    async def replace(self, kind: DocumentKind, name: str, body: bytes, *, instead_of: bytes | None) -> None:
        check_document(kind, name, body)
        if await self.read(kind, name) != instead_of:
            raise Conflict(f"the document {name} was replaced meanwhile")
        self._kept[kind, name] = (body, self._clock())

    async def used(self, kind: DocumentKind) -> Mapping[str, float]:
        return {name: at for (of, name), (_, at) in self._kept.items() if of is kind}

    async def drop(self, kind: DocumentKind, name: str, *, used_at: float) -> None:
        check_document(kind, name)
        _, at = self._kept.get((kind, name), (b"", used_at))
        if at <= used_at:
            self._kept.pop((kind, name), None)
