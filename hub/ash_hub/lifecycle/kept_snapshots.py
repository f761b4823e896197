"""The snapshots that the backend keeps, as callers may see them: whose they are, of which recipe, when they end."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import anyio

from ash_hub.backends.base import Backend, Snapshot, Snapshots
from ash_hub.lifecycle.runs import Runs
from ash_mcp.errors import AshError, SnapshotNotFound, Unsupported
from ash_mcp.types import Principal, SandboxId, Scope, SessionName, SnapshotId, SnapshotInfo
from ash_router.routes import visible
from ash_router.store.base import Run

__all__ = ["KeptSnapshot", "KeptSnapshots", "SnapshotRecord"]

SNAPSHOT_VERSION: Final = 1
_LOOK_SECONDS: Final = 1.0
"""How often the runs that snapshots belong to are looked at, while there are any."""
_IDLE_LOOK_SECONDS: Final = 30.0
"""How often it is looked whether another replica has taken one of a run."""
log = logging.getLogger("ash.hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRecord:
    """The hive's word on one snapshot. It never changes."""

    owner: str
    scope: Scope
    recipe: str
    recipe_digest: str | None
    toolset: str
    """The digest of the tools of its sandbox, which all that are started from it have."""
    sandbox_id: SandboxId
    session: SessionName
    created_at: float
    run: Run | None
    """What it ends with."""

    def to_json(self) -> dict[str, Any]:
        run = self.run.to_json() if self.run is not None else None
        named = ("owner", "scope", "recipe", "recipe_digest", "toolset", "sandbox_id", "session", "created_at")
        return {"version": SNAPSHOT_VERSION, **{name: getattr(self, name) for name in named}, "run": run}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> SnapshotRecord | None:
        """Read a record; None where it is of another version."""
        try:
            if found["version"] != SNAPSHOT_VERSION:
                return None
            return cls(
                owner=str(found["owner"]),
                scope=Scope(str(found["scope"])),
                recipe=str(found["recipe"]),
                recipe_digest=found["recipe_digest"],
                toolset=str(found["toolset"]),
                sandbox_id=SandboxId(str(found["sandbox_id"])),
                session=SessionName(str(found["session"])),
                created_at=float(found["created_at"]),
                run=Run.from_json(found["run"]) if found["run"] is not None else None,
            )
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class KeptSnapshot:
    """A snapshot that a caller may use."""

    id: SnapshotId
    record: SnapshotRecord
    info: SnapshotInfo


class KeptSnapshots:
    """The snapshots of one hive."""

    def __init__(self, backend: Backend, runs: Runs) -> None:
        self._backend = backend
        self._runs = runs
        self._look = anyio.Event()

    def look_soon(self) -> None:
        """Look at the runs of snapshots from now on: there may be a first one."""
        self._look.set()

    def shown(self, snapshot: Snapshot, now: float) -> KeptSnapshot:
        """Return a snapshot that was just taken."""
        kept = _kept(snapshot, now)
        assert kept is not None, "this replica has written its record"
        return kept

    def require(self) -> Snapshots:
        """Return what takes snapshots.

        Raises:
            Unsupported: This backend, or this host, has none; the message says what to do.
        """
        if not isinstance(self._backend, Snapshots):
            raise Unsupported(
                f"the backend {self._backend.kind} has no snapshots: spawn a new sandbox and copy files into it, or "
                "use a hive whose backend is local (docs/snapshots.md)"
            )
        if (why := self._backend.no_snapshots()) is not None:
            raise Unsupported(f"this hive has no snapshots: {why}")
        return self._backend

    async def list(self, principal: Principal, scope: Scope, *, now: float) -> Sequence[KeptSnapshot]:
        """Return a caller's snapshots, oldest first.

        Raises:
            ConnectFailed: The backend does not answer.
        """
        if not isinstance(self._backend, Snapshots):
            return ()
        found = [_kept(snapshot, now) for snapshot in await self._backend.snapshots()]
        return [it for it in found if it is not None and _sees(principal, scope, it.record)]

    async def find(self, principal: Principal, scope: Scope, name: str, *, now: float) -> KeptSnapshot:
        """Return a caller's snapshot.

        Raises:
            SnapshotNotFound: The caller has none of that id, whoever else has.
            Unsupported: There are none here.
        """
        self.require()
        kept = {it.id: it for it in await self.list(principal, scope, now=now)}
        if (found := kept.get(SnapshotId(name))) is not None:
            return found
        ids = list(kept)
        has = f"; you have: {', '.join(ids[-20:])}" if ids else ", and no other"
        raise SnapshotNotFound(f"you have no snapshot {name!r}, or no longer{has}", snapshot=name)

    async def remove(self, principal: Principal, scope: Scope, ids: Sequence[str], *, now: float) -> Sequence[str]:
        """Remove snapshots of a caller, and return those that there were."""
        backend = self.require()
        named = [it.id for it in await self.list(principal, scope, now=now) if it.id in ids]
        for snapshot_id in named:
            await backend.drop_snapshot(snapshot_id)
        return named

    async def run(self) -> None:
        """Remove the snapshots of runs that have ended, until cancelled."""
        while isinstance(self._backend, Snapshots):
            has_any, self._look = False, anyio.Event()
            try:
                has_any = await self.remove_of_ended_runs()
            except AshError as error:
                log.info("snapshots of runs are looked at later: %s", error)
            except Exception:
                log.exception("snapshots of runs could not be looked at")
            if has_any:
                await anyio.sleep(_LOOK_SECONDS)
            else:
                with anyio.move_on_after(_IDLE_LOOK_SECONDS):
                    await self._look.wait()

    async def remove_of_ended_runs(self) -> bool:
        """Remove what belongs to ended runs; return whether there are snapshots of others."""
        backend = self._backend
        if not isinstance(backend, Snapshots) or backend.no_snapshots() is not None:
            return False
        runs: dict[SnapshotId, Run] = {}
        for snapshot in await backend.snapshots():
            record = SnapshotRecord.from_json(snapshot.record)
            if record is not None and record.run is not None:
                runs[snapshot.id] = record.run
        if not runs:
            return False
        await self._runs.learn(runs.values())
        ended = [snapshot_id for snapshot_id, run in runs.items() if self._runs.end_of(run) is not None]
        for snapshot_id in ended:
            await backend.drop_snapshot(snapshot_id)
        return len(ended) < len(runs)


def _kept(snapshot: Snapshot, now: float) -> KeptSnapshot | None:
    record = SnapshotRecord.from_json(snapshot.record)
    if record is None:
        return None
    info = SnapshotInfo(
        id=snapshot.id,
        scope=record.scope,
        recipe=record.recipe,
        sandbox_id=record.sandbox_id,
        session=record.session,
        size=snapshot.size,
        created_at=record.created_at,
        expires_at=now + snapshot.left_seconds,
        run=record.run.name if record.run is not None else None,
    )
    return KeptSnapshot(snapshot.id, record, info)


def _sees(principal: Principal, scope: Scope, record: SnapshotRecord) -> bool:
    return visible(principal, scope, record.sandbox_id, record.owner, record.scope)
