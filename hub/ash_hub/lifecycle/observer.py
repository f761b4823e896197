"""Observation of one sandbox by a replica: its record, its instance, and what the store was told of it.

The controller hands each look, a `View`, to `decide`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from ash_hub.backends.base import Instance
from ash_hub.lifecycle.decide import View, Where, idle_since
from ash_hub.lifecycle.endings import Endings
from ash_hub.lifecycle.parts import Parts
from ash_hub.lifecycle.record import Ending, Record, UnreadableRecord
from ash_hub.lifecycle.registry import Registry
from ash_hub.lifecycle.runs import Runs
from ash_hub.lifecycle.sandbox import Sandbox
from ash_mcp.types import EndReason, SandboxId, State
from ash_router.store.base import Run

__all__ = ["REPORT_SECONDS", "Observer", "record_of", "runs_of"]

REPORT_SECONDS: Final = 1.0
"""How often a replica tells the store when sandboxes were last called through it."""


class Observer:
    """Looks at sandboxes, and enters in the registry those that it did not know."""

    def __init__(self, parts: Parts, registry: Registry, endings: Endings) -> None:
        self._parts = parts
        self._registry = registry
        self._endings = endings
        self._calls_known_at = -math.inf if parts.siblings.possible else math.inf
        """When the store was last asked for the calls through other replicas; infinity where there can be none."""
        self.store_epoch = 0
        """Grows when the store has lost what it held."""
        self._restored_at = parts.clock()
        """When this replica began, or the store was last empty or away: it may lack earlier calls, so idle times count
        from here at least.
        """
        self.runs = Runs(parts.store, parts.settings.limits.runs_allowed, parts.clock, lambda: self._restored_at)

    def note_outage(self) -> None:
        """Note that the store is away, or was until now."""
        self._restored_at = self._parts.clock()

    def note_loss(self) -> None:
        """Note that the store has lost what it held."""
        self.store_epoch += 1
        self.note_outage()

    def is_held(self, sandbox: Sandbox) -> bool:
        """Return whether the store was told of a sandbox's names and route since it was last empty."""
        return sandbox.held_epoch == self.store_epoch

    async def learn_calls(self) -> None:
        """Ask the store for the last calls through other replicas."""
        asked_at = self._parts.clock()
        self._parts.ledger.learn_last_calls(await self._parts.store.last_calls())
        self._calls_known_at = asked_at

    async def look(self, sandbox_id: SandboxId) -> View:
        """Return what `decide` is told of a sandbox."""
        while True:
            sandbox = self._registry.by_id(sandbox_id)
            # before the backend is asked: a start that ends meanwhile has made the instance that was not there yet
            is_starting = sandbox is not None and sandbox.start is not None
            instance = await self._parts.backend.get(sandbox_id)
            if self._registry.by_id(sandbox_id) is sandbox:
                break  # else it was entered meanwhile, and its instance may be younger than the answer
        record = record_of(instance) if instance is not None else None
        if sandbox is None and record is not None:
            is_held = await self.where(record.maker) is Where.ELSEWHERE  # its maker has told the store of it
            held_epoch = self.store_epoch if is_held else None
            sandbox = Sandbox(id=sandbox_id, record=record, state=State.STARTING, held_epoch=held_epoch)
            self._registry.add(sandbox)
        has_route = self._parts.routes.get(sandbox_id) is not None
        if sandbox is None:
            return View(state=None, record=None, phase=instance.phase if instance else None, has_route=has_route)
        if instance is not None:
            await self._take_over(sandbox, instance, record)
            has_route = self._has_route(sandbox)
        elif not is_starting and not sandbox.state.ended and sandbox.record.ending is None:
            await self._learn_end(sandbox)
        view = await self._view(sandbox, instance, record if instance is not None else sandbox.record, has_route)
        return replace(view, is_starting_here=True) if is_starting else view

    def _has_route(self, sandbox: Sandbox) -> bool:
        """Return whether a sandbox has a route with all of its shares that its record has, and with none less."""
        route = self._parts.routes.get(sandbox.id)
        return route is not None and route.shares.version >= sandbox.record.shares.version

    async def _take_over(self, sandbox: Sandbox, instance: Instance, record: Record | None) -> None:
        self._parts.watch.tell(instance)  # its event may be missing
        if record is not None:
            sandbox.record, sandbox.seen_revision = record, instance.revision
        sandbox.exit = instance.exit or sandbox.exit
        if instance.endpoint is not None:
            sandbox.endpoint = instance.endpoint
        is_wanted = sandbox.record.ending is None and not sandbox.state.ended
        if sandbox.toolset is None and sandbox.record.toolset is not None and is_wanted:
            sandbox.toolset = await self._parts.shelf.get(sandbox.record.toolset)

    async def _learn_end(self, sandbox: Sandbox) -> None:
        """Read why a sandbox is gone from what the replica that ended it kept, whose event was missed here."""
        kept = await self._endings.find(sandbox.id, self._parts.clock())
        if kept is not None:
            sandbox.record = replace(kept.record, ending=kept.record.ending or _end_of_buried(kept))

    async def _view(self, sandbox: Sandbox, instance: Instance | None, record: Record | None, has_route: bool) -> View:
        parts, known = self._parts, sandbox.record
        last_call = parts.ledger.last_call(sandbox.id)
        return View(
            state=sandbox.state,
            record=record,
            phase=instance.phase if instance is not None else None,
            exit_message=sandbox.exit.message if sandbox.exit is not None else None,
            requested_end=sandbox.requested_end or _end_of_buried(sandbox),
            is_starting_here=sandbox.start is not None,
            is_cancelled=sandbox.start is not None and sandbox.start.cancel_called,
            maker=await self.where(known.maker),
            ender=await self.where(known.ending.by) if known.ending is not None else Where.HERE,
            is_held=self.is_held(sandbox),
            has_route=has_route,
            has_tools=sandbox.toolset is not None and sandbox.endpoint is not None,
            is_alone=not parts.siblings.possible,
            is_busy=parts.ledger.busy(sandbox.id),
            idle_since=idle_since(known, last_call, self._restored_at),
            calls_known_at=self._calls_known_at,
            report_seconds=2 * REPORT_SECONDS if parts.siblings.possible else 0.0,
            run_end=self.runs.end_of(known.run),
            run_over_at=self.runs.over_at(known.run),
            is_withdrawn=sandbox.is_withdrawn,
            ended_at=sandbox.ended_at,
            is_lost=sandbox.state.ended and sandbox.reason is EndReason.LOST,
            kept_seconds=parts.settings.ended_retention_seconds if not sandbox.is_surplus else 0.0,
        )

    async def where(self, replica: str) -> Where:
        """Return whether a replica is this one, another that lives, or dead."""
        if replica == self._parts.siblings.id:
            return Where.HERE
        return Where.ELSEWHERE if await self._parts.siblings.is_other_alive(replica) else Where.DEAD


def _end_of_buried(sandbox: Sandbox) -> Ending | None:
    """Return the end of a buried sandbox as a request, so that an instance of it that appears again ends, too."""
    if sandbox.ended_at is None or sandbox.reason is None or sandbox.cause is None:
        return None
    by, message = sandbox.record.maker, sandbox.message
    return Ending(reason=sandbox.reason, cause=sandbox.cause, at=sandbox.ended_at, by=by, message=message)


def record_of(instance: Instance) -> Record | None:
    """Return the record of an instance; None if this version cannot read it."""
    try:
        return Record.from_json(instance.record)
    except UnreadableRecord:
        return None


def runs_of(sandboxes: Iterable[Sandbox]) -> list[Run]:
    """Return the runs that sandboxes end with, each once."""
    return list({run.id: run for it in sandboxes if (run := it.record.run) is not None}.values())
