"""Runs: what owns the sandboxes that are spawned in it, and ends them all when its lease is not renewed.

A run is in the store, and in the record of each of its sandboxes, from which a store that was emptied learns of it
again. The store alone says that one has ended, in one step for all replicas; `decide` then ends its sandboxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from ash_mcp.errors import ConfigError, RunEnded, RunNotFound
from ash_mcp.types import (
    DEFAULT_SCOPE,
    EVERY_SCOPE,
    EndReason,
    Principal,
    RunId,
    RunInfo,
    SandboxId,
    Scope,
    is_run_id,
    new_run_id,
    valid_run_name,
)
from ash_router.routes import visible
from ash_router.store.base import Run, RunLease, RunLimits, RunState, Store

__all__ = ["RUN_NEWS", "Runs"]

RUN_NEWS: Final = "runs"
"""The channel that names a run which its owner has ended."""

_SHORTEST_LOOK_SECONDS: Final = 0.05
_REASONS: Final = {RunState.OVER: EndReason.RUN_ENDED, RunState.DESTROYED: EndReason.DESTROYED}
_NOBODY: Final = SandboxId("")


class Runs:
    """The runs of one hive, as its callers and this replica's controller need them.

    Args:
        limits: How many a principal may have open.
        restored_at: Since when, by `clock`, renewals have surely reached the store.
    """

    def __init__(
        self,
        store: Store,
        limits: Callable[[Principal], RunLimits],
        clock: Callable[[], float],
        restored_at: Callable[[], float],
    ) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self._restored_at = restored_at
        self._over_at: dict[RunId, float] = {}
        """When the leases of open runs are over, by what was learned last."""
        self._ended: dict[RunId, EndReason] = {}

    # -- for callers

    async def open(
        self, principal: Principal, scope: Scope, name: str, lease_seconds: float, key: str | None = None
    ) -> RunInfo:
        """Open a run, or return the open one that the same idempotency key opened before, renewed.

        Raises:
            ConfigError: It cannot have that name.
            RunTaken: The caller has an open run of that name.
            CapacityExceeded: The caller, or the hive, has as many as may be.
            ConnectFailed: The store is away.
        """
        run = self._new(principal, scope, name, lease_seconds, key)
        most = self._limits(principal)
        return self._shown(await self._store.open_run(run, most=most, quiet_seconds=self._quiet_seconds()))

    async def renew(
        self,
        principal: Principal,
        scope: Scope,
        name: str,
        run_id: RunId | None = None,
        lease_seconds: float | None = None,
    ) -> RunInfo:
        """Restart the lease of an open run.

        Args:
            run_id: Which of that name; None: the open one.
            lease_seconds: With `run_id`, what the run's lease was: a store that was emptied is told of it again.

        Raises:
            RunEnded: It has ended before; the message says why and what to do.
            RunNotFound: The caller has no such run.
            ConnectFailed: The store is away.
        """
        if run_id is None:
            run_id = (await self.find(principal, scope, name)).id
        elif not is_run_id(run_id):
            raise ConfigError(f"{run_id!r} is no run's id; give the run_id that its opening was answered with")
        else:
            judged = await self._store.judge_runs([run_id], quiet_seconds=self._quiet_seconds())
            if run_id in judged:  # before anything is renewed
                self._require_open(principal, scope, name, judged[run_id])
        lost: Run | None = None
        if lease_seconds is not None:
            lost = self._new(principal, scope, name, lease_seconds, None, run_id)
        lease = await self._store.renew_run(run_id, lost, most=self._limits(principal))
        return self._shown(self._require_open(principal, scope, name, lease))

    async def find(self, principal: Principal, scope: Scope, name: str) -> Run:
        """Return the open run that a caller means by a name or an id.

        Raises:
            RunEnded: It has ended before; the message says why and what to do.
            RunNotFound: The caller has no such run.
            ConnectFailed: The store is away.
        """
        if is_run_id(name):
            run_id = RunId(name)
            judged = await self._store.judge_runs([run_id], quiet_seconds=self._quiet_seconds())
            return self._require_open(principal, scope, name, judged.get(run_id)).run
        found = [lease for lease in await self._open_runs(principal, scope) if lease.run.name == name]
        in_default = [lease for lease in found if lease.run.scope == DEFAULT_SCOPE]
        return self._require_open(principal, scope, name, next(iter(in_default or found), None)).run

    async def list(self, principal: Principal, scope: Scope) -> list[RunInfo]:
        """Return the open runs that a caller sees; none while the store is away is never said: it raises.

        Raises:
            ConnectFailed: The store is away.
        """
        return [self._shown(lease) for lease in await self._open_runs(principal, scope)]

    async def end(self, run: Run) -> None:
        """End a run for its owner, and tell every replica; its sandboxes are still to be ended.

        Raises:
            ConnectFailed: The store is away, and it goes on.
        """
        await self._store.end_run(run.id)
        self._note(RunLease(run, RunState.DESTROYED))
        await self._store.publish(RUN_NEWS, run.id)

    async def _open_runs(self, principal: Principal, scope: Scope) -> list[RunLease]:
        await self._store.judge_runs([], quiet_seconds=self._quiet_seconds())
        return [lease for lease in await self._store.runs() if _sees(principal, scope, lease.run)]

    def _new(
        self,
        principal: Principal,
        scope: Scope,
        name: str,
        lease_seconds: float,
        key: str | None,
        run_id: RunId | None = None,
    ) -> Run:
        if not valid_run_name(name):
            raise ConfigError(
                f"{name!r} cannot be a run's name: letters, digits, '.', '_' and '-', at most 64, the first a letter "
                "or a digit"
            )
        return Run(
            id=run_id or new_run_id(),
            owner=principal.subject,
            scope=DEFAULT_SCOPE if scope == EVERY_SCOPE else scope,
            name=name,
            lease_seconds=lease_seconds,
            key=key,
            opened_at=self._clock(),
        )

    def _require_open(self, principal: Principal, scope: Scope, name: str, lease: RunLease | None) -> RunLease:
        if lease is None or not _sees(principal, scope, lease.run):
            raise RunNotFound(f"you have no open run {name!r}; `list` shows yours, `run` opens one", run=name)
        self._note(lease)
        run = lease.run
        if lease.state is RunState.OPEN:
            return lease
        why = "it was destroyed" if lease.state is RunState.DESTROYED else f"{_lease_text(run)} was not renewed"
        raise RunEnded(
            f"run {run.name} has ended: {why}. What was in it is gone, and nothing can be spawned in it; open "
            "another one, with a longer lease if its holder or the way to the hive was away for longer",
            run=run.name,
            run_id=run.id,
            reason=_REASONS[lease.state].value,
        )

    def _shown(self, lease: RunLease) -> RunInfo:
        self._note(lease)
        run = lease.run
        return RunInfo(
            id=run.id,
            name=run.name,
            scope=run.scope,
            lease_seconds=run.lease_seconds,
            left_seconds=lease.left_seconds,
            opened_at=run.opened_at,
        )

    # -- for the controller

    def over_at(self, run: Run | None) -> float:
        """Return when a run's lease is over, as far as it is known here that it was renewed; infinity for no run."""
        if run is None:
            return math.inf
        return max(self._over_at.get(run.id, -math.inf), self._restored_at() + run.lease_seconds)

    def end_of(self, run: Run | None) -> EndReason | None:
        """Return why the sandboxes of a run are to end; None while it is not known to have ended."""
        return self._ended.get(run.id) if run is not None else None

    async def learn(self, runs: Iterable[Run]) -> None:
        """Ask the store how runs stand, and put back those that it has lost; ends all whose leases are over.

        Raises:
            ConnectFailed: The store is away.
        """
        wanted = {run.id: run for run in runs}
        judged = await self._store.judge_runs(list(wanted), quiet_seconds=self._quiet_seconds())
        for run_id, run in wanted.items():
            lease = judged.get(run_id) or await self._store.renew_run(run_id, run, restoring=True)
            if lease is not None:
                self._note(lease)

    def forget_but(self, runs: Iterable[Run]) -> None:
        """Forget all runs but these."""
        kept = {run.id for run in runs}
        for known in (self._over_at, self._ended):
            for run_id in known.keys() - kept:
                del known[run_id]

    def _note(self, lease: RunLease) -> None:
        run_id = lease.run.id
        if lease.state is RunState.OPEN:
            self._over_at[run_id] = self._clock() + max(lease.left_seconds, _SHORTEST_LOOK_SECONDS)
        else:
            self._over_at.pop(run_id, None)
            self._ended[run_id] = _REASONS[lease.state]

    def _quiet_seconds(self) -> float:
        return max(0.0, self._clock() - self._restored_at())


def _sees(principal: Principal, scope: Scope, run: Run) -> bool:
    return visible(principal, scope, _NOBODY, run.owner, run.scope)


def _lease_text(run: Run) -> str:
    return f"its lease of {run.lease_seconds:g} s"
