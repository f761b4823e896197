"""The steps of the lifecycle, as `decide` names them. Each may be taken twice, by any replica."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

from ash_hub.lifecycle.decide import Decision, Step, Where
from ash_hub.lifecycle.endings import Endings
from ash_hub.lifecycle.observer import Observer, runs_of
from ash_hub.lifecycle.parts import Parts
from ash_hub.lifecycle.record import Ending
from ash_hub.lifecycle.registry import Registry
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.session_names import hold_again
from ash_mcp.errors import Conflict
from ash_mcp.types import Cause, EndReason, SandboxId, State
from ash_router.routes import Route

__all__ = ["Steps"]

log = logging.getLogger("ash.hub")

DELETE_GRACE_SECONDS: Final = 2.0
MOST_ENDED: Final = 1000
"""Ended sandboxes that are remembered; of more, the first to end are forgotten."""


class Steps:
    """Takes steps.

    Args:
        add: Has a sandbox looked at.
    """

    def __init__(
        self, parts: Parts, registry: Registry, endings: Endings, observer: Observer, add: Callable[[SandboxId], None]
    ) -> None:
        self._parts = parts
        self._registry = registry
        self._endings = endings
        self._observer = observer
        self._add = add
        self._steps: Mapping[Step, Callable[[SandboxId, Decision], Awaitable[None]]] = {
            Step.UNROUTE: self._unroute,
            Step.FORGET: self._forget,
            Step.CANCEL_START: self._cancel_start,
            Step.HOLD: self._hold,
            Step.MARK_READY: self._mark_ready,
            Step.LEARN_CALLS: self._learn_calls,
            Step.LEARN_RUN: self._learn_run,
            Step.END: self._record_end,
            Step.WITHDRAW: self._withdraw,
            Step.DELETE: self._delete,
            Step.BURY: self._bury,
        }

    async def take(self, sandbox_id: SandboxId, decision: Decision) -> None:
        """Take the step that was decided, after a look at the sandbox."""
        await self._steps[decision.step](sandbox_id, decision)

    def ending(self, sandbox: Sandbox, reason: EndReason, message: str | None, cause: Cause | None = None) -> Ending:
        """Return an end that this replica decides on now; without a cause it follows from the reason."""
        now = self._parts.clock()
        cause = cause or sandbox.cause_of(reason)
        return Ending(reason=reason, cause=cause, at=now, by=self._parts.siblings.id, message=message)

    def _sandbox(self, sandbox_id: SandboxId) -> Sandbox:
        sandbox = self._registry.by_id(sandbox_id)
        assert sandbox is not None, "a look at it has entered it"
        return sandbox

    async def _unroute(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del decision
        await self._parts.routes.unbind(sandbox_id)

    async def _forget(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del decision
        sandbox = self._sandbox(sandbox_id)
        self._registry.remove(sandbox)
        self._endings.drop(sandbox_id)
        await self.release_key(sandbox)

    async def _cancel_start(self, sandbox_id: SandboxId, decision: Decision) -> None:
        sandbox = self._sandbox(sandbox_id)
        assert decision.reason is not None
        sandbox.requested_end = sandbox.requested_end or self.ending(sandbox, decision.reason, decision.message)
        if sandbox.start is not None:
            sandbox.start.cancel()

    async def _hold(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del decision
        sandbox = self._sandbox(sandbox_id)
        epoch = self._observer.store_epoch
        if not self._observer.is_held(sandbox):
            await hold_again(self._parts.store, sandbox)
        sandbox.held_epoch = None  # until the store has its route: one that is bound here only must be told again
        if sandbox.record.ready_at is not None and sandbox.toolset is not None and sandbox.endpoint is not None:
            await self._bind(sandbox)
        sandbox.held_epoch = epoch

    async def _bind(self, sandbox: Sandbox) -> None:
        assert sandbox.endpoint is not None and sandbox.toolset is not None
        listing = sandbox.toolset.listing(sandbox.session, self._parts.settings.name_limit)
        await self._parts.routes.bind(
            Route(
                sandbox_id=sandbox.id,
                owner=sandbox.owner,
                scope=sandbox.scope,
                session=sandbox.session,
                endpoint=sandbox.endpoint,
                tool_names=listing.renamed,
                alias=sandbox.alias,
                shares=sandbox.record.shares,
                ports=sandbox.record.ports,
            )
        )

    async def _mark_ready(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del decision
        sandbox = self._sandbox(sandbox_id)
        sandbox.state = State.READY
        try:
            # else its maker tells all replicas, or whoever spawns it does
            is_ours = await self._observer.where(sandbox.record.maker) is not Where.ELSEWHERE
            if is_ours and not sandbox.is_unannounced:
                await self._parts.on_changed(sandbox.owner, sandbox.scope)
        finally:
            sandbox.settled.set()

    async def _learn_calls(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del sandbox_id, decision
        await self._observer.learn_calls()

    async def _learn_run(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del decision
        await self._observer.runs.learn(runs_of([self._sandbox(sandbox_id)]))

    async def _record_end(self, sandbox_id: SandboxId, decision: Decision) -> None:
        assert decision.reason is not None
        sandbox = self._sandbox(sandbox_id)
        ending = self.ending(sandbox, decision.reason, decision.message)
        with suppress(Conflict):
            ended = replace(sandbox.record, ending=ending)
            await self._parts.backend.annotate(sandbox_id, ended.to_json(), revision=sandbox.seen_revision)
            sandbox.record = ended
            self.note_end(sandbox, ending)

    def note_end(self, sandbox: Sandbox, ending: Ending) -> None:
        """Write the audit line of an end, on the replica that decided it."""
        is_own_start = ending.reason is EndReason.START_FAILED and sandbox.record.maker == self._parts.siblings.id
        if ending.reason is not EndReason.DESTROYED and not is_own_start:  # a destroy or a spawn has its caller's line
            self._parts.audit.ended(sandbox, ending.reason, ending.cause, ending.message)

    async def _withdraw(self, sandbox_id: SandboxId, decision: Decision) -> None:
        assert decision.reason is not None
        await self._close(self._sandbox(sandbox_id), decision.reason, decision.message)

    async def _close(self, sandbox: Sandbox, reason: EndReason, message: str | None) -> None:
        """Take a sandbox's tools away from callers and end the calls in flight with the reason."""
        was_ready = sandbox.settled.is_set()
        sandbox.withdraw(reason, message)
        self._parts.ledger.abort(sandbox.id, sandbox.gone(self._parts.clock()))
        await self._parts.routes.unbind(sandbox.id, sandbox.alias)
        self._parts.on_gone(sandbox.id)
        self._parts.tokens.forget(sandbox.id)
        ending = sandbox.record.ending
        if was_ready and (ending is None or await self._observer.where(ending.by) is not Where.ELSEWHERE):
            await self._parts.on_changed(sandbox.owner, sandbox.scope)
        sandbox.is_withdrawn = True

    async def _delete(self, sandbox_id: SandboxId, decision: Decision) -> None:
        sandbox = self._sandbox(sandbox_id)
        if sandbox.reason is not None:  # the instance and its record are about to go
            await self._endings.keep(sandbox, self._parts.clock())
        is_graceful = sandbox.record.ready_at is not None and decision.reason is not EndReason.PROCESS_DIED
        await self._parts.backend.delete(sandbox_id, grace_seconds=DELETE_GRACE_SECONDS if is_graceful else 0.0)

    async def _bury(self, sandbox_id: SandboxId, decision: Decision) -> None:
        assert decision.reason is not None
        sandbox = self._sandbox(sandbox_id)
        if not sandbox.is_withdrawn:
            await self._close(sandbox, decision.reason, decision.message)
        await self._parts.store.release_session(sandbox.owner, sandbox.scope, sandbox.session, sandbox.id)
        if sandbox.record.ready_at is None or decision.reason is EndReason.START_FAILED:
            await self.release_key(sandbox)  # a spawn that failed may be tried again with its key
        self._parts.ledger.forget(sandbox.id)
        sandbox.bury(decision.reason, decision.message, self._parts.clock())
        sandbox.toolset = None  # nobody lists it any more
        self._registry.note_ended(sandbox)
        self._forget_surplus()
        await self._endings.keep(sandbox, self._parts.clock())
        ending = sandbox.record.ending
        if ending is None and sandbox.requested_end is None:  # no replica decided it, so none has audited it
            self.note_end(sandbox, self.ending(sandbox, decision.reason, decision.message))
        if ending is None or ending.by == self._parts.siblings.id:
            why = decision.reason.value + (f" ({decision.message})" if decision.message else "")
            log.info("ended", extra={"sandbox": sandbox.id, "session": sandbox.session, "why": why})

    def _forget_surplus(self) -> None:
        """Have turns forget the ended sandboxes over `MOST_ENDED`, except where an instance may still appear.

        A start that broke off may make its instance until `start_by`; it is deleted because its end is remembered.
        """
        for sandbox in self._registry.surplus(MOST_ENDED):
            may_appear = sandbox.record.ready_at is None and self._parts.clock() < sandbox.record.start_by < math.inf
            if not may_appear and not sandbox.is_surplus:
                sandbox.is_surplus = True
                self._add(sandbox.id)

    async def release_key(self, sandbox: Sandbox) -> None:
        """Free the idempotency key of a sandbox, if it has one."""
        if sandbox.key is not None:
            await self._parts.store.release_key(sandbox.owner, sandbox.scope, sandbox.key, sandbox.id)
