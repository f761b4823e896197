"""What the backend tells, brought into the registry: deaths, and what other replicas made, changed and ended.

The backend carries each sandbox's record to every replica. Until a sandbox is ready its maker alone speaks for it;
from then on all replicas are equal, and whichever ends it writes the reason into the record first.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from ash_hub._state import Step
from ash_hub.audit import Audit
from ash_hub.backends.base import Backend, Instance, Phase
from ash_hub.closing import Closing
from ash_hub.names import hold_again
from ash_hub.registry import Registry
from ash_hub.sandbox import Sandbox
from ash_hub.shelf import ToolsetShelf
from ash_hub.siblings import Siblings
from ash_mcp.errors import ConnectFailed, LeaseHeld
from ash_mcp.types import EndReason, Scope, State
from ash_router.ledger import Ledger
from ash_router.store.base import Store

__all__ = ["Mirror", "ending_of"]

log = logging.getLogger("ash.hub")

_TOLD_SECONDS = 60.0
"""How long a death stays told, so that only one of the replicas that see it writes it down."""


class Mirror:
    """Keeps the registry like the backend.

    Args:
        bind: Opens the way to a ready sandbox.
    """

    def __init__(
        self,
        backend: Backend,
        store: Store,
        shelf: ToolsetShelf,
        ledger: Ledger,
        registry: Registry,
        closing: Closing,
        siblings: Siblings,
        audit: Audit,
        *,
        bind: Callable[[Sandbox], Awaitable[None]],
        on_changed: Callable[[str, Scope], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        self._backend = backend
        self._store = store
        self._shelf = shelf
        self._ledger = ledger
        self._registry = registry
        self._closing = closing
        self._siblings = siblings
        self._audit = audit
        self._bind = bind
        self._on_changed = on_changed
        self._clock = clock

    # -- what runs

    async def seen(self, instance: Instance) -> bool:
        """Take note of an instance that runs or starts; False if nobody can have it and it should be removed."""
        try:
            told = Sandbox.from_record(instance.id, instance.record)
        except (KeyError, TypeError, ValueError):
            return self._siblings.possible  # a newer replica may know better
        has_maker = await self._siblings.lives(told.maker)
        known = self._registry.by_id(instance.id)
        if known is None:
            return await self._enter(told, instance, has_maker=has_maker)
        if known.life.state.ended:
            return self._siblings.possible  # another may be about to remove it; a sweep looks twice
        if known.life.state is State.STARTING and known.maker != self._siblings.id:
            return await self._grown(known, told, instance, has_maker=has_maker)
        if known.life.state is State.READY:
            await self._changed(known, told, instance)
        return True

    async def _enter(self, sandbox: Sandbox, instance: Instance, *, has_maker: bool) -> bool:
        """Add a sandbox that another replica made, or take over what an earlier hive left under its old name."""
        if ending_of(instance) is not None:
            return has_maker
        if sandbox.life.state is State.STARTING:
            if has_maker:
                self._registry.add(sandbox)
            return has_maker
        if not self._complete(sandbox, instance):
            return self._siblings.possible  # one that knows its tools may serve it
        if not has_maker:
            await hold_again(self._store, sandbox)
            if (last_call := instance.record.get("last_call_at")) is not None:
                self._ledger.learn({sandbox.id: float(last_call)})
        self._registry.add(sandbox)
        if not has_maker:
            await self._bind(sandbox)
            await self._on_changed(sandbox.owner, sandbox.scope)
        return True

    async def _grown(self, known: Sandbox, told: Sandbox, instance: Instance, *, has_maker: bool) -> bool:
        """Follow a sandbox that another replica starts."""
        if told.life.state is State.STARTING:
            return has_maker
        if not self._complete(known, instance):
            return self._siblings.possible
        known.life, known.warnings, known.revision = told.life, told.warnings, told.revision
        known.settled.set()
        if not has_maker:
            await self._bind(known)
        return True

    def _complete(self, sandbox: Sandbox, instance: Instance) -> bool:
        """Add to a ready sandbox what its record only names."""
        sandbox.toolset = self._shelf.get(str(instance.record.get("toolset")))
        sandbox.endpoint, sandbox.generation = instance.endpoint, instance.generation
        if sandbox.toolset is None or sandbox.endpoint is None:
            return False
        if sandbox.life.state is State.READY:
            sandbox.settled.set()
        return True

    async def _changed(self, sandbox: Sandbox, told: Sandbox, instance: Instance) -> None:
        if told.revision < sandbox.revision:
            return
        sandbox.revision = told.revision
        sandbox.life = replace(sandbox.life, expires_at=told.life.expires_at)
        reason = ending_of(instance)
        if reason is not None:
            sandbox.step(Step.STOP, self._clock(), reason)
            await self._closing.withdraw(sandbox, tell=False)

    # -- what ended

    async def ended(self, instance: Instance) -> None:
        """Record that an instance ended: by itself, or because another replica ended it; and clean up after it."""
        sandbox = self._registry.by_id(instance.id)
        if sandbox is None or sandbox.life.state.ended or sandbox.ending_here:
            return
        reason = ending_of(instance)
        if sandbox.life.ready_at is None:
            await self._start_ended(sandbox, reason, instance.exit_message)
        elif sandbox.life.state is State.READY and reason is None:
            await self._died(sandbox, instance.exit_message or "no reason is known")
        else:
            await self._ended_elsewhere(sandbox, reason)

    async def missing(self, sandbox: Sandbox) -> None:
        """Record that the backend no longer has a sandbox."""
        if sandbox.ending_here:
            return
        if sandbox.life.state is State.STARTING:
            await self._start_ended(sandbox, None, None)
        elif sandbox.life.state is State.STOPPING:
            await self._ended_elsewhere(sandbox, None)
        elif sandbox.life.state is State.READY:
            sandbox.step(Step.FAIL, self._clock(), EndReason.LOST)
            await self._over(sandbox, EndReason.LOST, None)

    async def _start_ended(self, sandbox: Sandbox, reason: EndReason | None, why: str | None) -> None:
        if sandbox.maker == self._siblings.id:
            # the start of ours sees it too, and cleans up; why another replica wanted it is all that it cannot see
            wanted = sandbox.life.state is not State.STOPPING and reason is not None
            if wanted and sandbox.starting is not None:
                sandbox.step(Step.STOP, self._clock(), reason)
                sandbox.starting.cancel()
            return
        if reason is None:
            sandbox.step(Step.FAIL, self._clock(), EndReason.START_FAILED, why or "the replica that started it died")
        else:
            sandbox.step(Step.STOP, self._clock(), reason)
            sandbox.step(Step.END, self._clock())
        if not await self._siblings.lives(sandbox.maker):
            await self._closing.let_go(sandbox)

    async def _died(self, sandbox: Sandbox, why: str) -> None:
        sandbox.step(Step.FAIL, self._clock(), EndReason.PROCESS_DIED, why)
        log.warning("died", extra={"sandbox": sandbox.id, "session": sandbox.session, "why": why})
        await self._over(sandbox, EndReason.PROCESS_DIED, why)
        await self._backend.delete(sandbox.id, grace_seconds=0.0)

    async def _over(self, sandbox: Sandbox, reason: EndReason, why: str | None) -> None:
        """Tell of an end that nobody asked for, once however many replicas see it, and give back what it held."""
        is_first = await self._is_first(sandbox)
        if is_first:
            self._audit.ended(sandbox, reason, why)
        await self._closing.withdraw(sandbox, tell=is_first)
        await self._closing.let_go(sandbox)

    async def _is_first(self, sandbox: Sandbox) -> bool:
        if not self._siblings.possible:
            return True
        try:
            await self._store.grant(f"told:{sandbox.id}", self._siblings.id, _TOLD_SECONDS)
        except LeaseHeld:
            return False
        except ConnectFailed:
            return True  # told twice is better than not at all
        return True

    async def _ended_elsewhere(self, sandbox: Sandbox, reason: EndReason | None) -> None:
        if sandbox.life.state is not State.STOPPING:
            sandbox.step(Step.STOP, self._clock(), reason or EndReason.LOST)
            await self._closing.withdraw(sandbox, tell=False)
        await self._closing.let_go(sandbox)
        sandbox.step(Step.END, self._clock())

    async def remove(self, instance: Instance) -> None:
        """Remove an instance that nobody can take over, give back the names that it held, and keep why it ended."""
        await self._backend.delete(instance.id, grace_seconds=0.0)
        try:
            sandbox = Sandbox.from_record(instance.id, instance.record)
        except (KeyError, TypeError, ValueError):
            return
        if self._registry.by_id(sandbox.id) is None:
            self._bury(sandbox, instance)
        await self._closing.let_go(sandbox)

    def _bury(self, sandbox: Sandbox, instance: Instance) -> None:
        """Take a sandbox that ended while nobody looked into the registry, for its owner to learn why."""
        now, reason = self._clock(), ending_of(instance)
        if reason is not None:
            sandbox.step(Step.STOP, now, reason)
            sandbox.step(Step.END, now)
        elif sandbox.life.ready_at is None:
            sandbox.step(Step.FAIL, now, EndReason.START_FAILED, "the hive that started it died")
        elif instance.phase is Phase.ENDED:
            sandbox.step(Step.FAIL, now, EndReason.PROCESS_DIED, instance.exit_message)
        else:
            sandbox.step(Step.FAIL, now, EndReason.LOST, "this hive does not know its tools")
        self._registry.add(sandbox)


def ending_of(instance: Instance) -> EndReason | None:
    """Return why a replica decided to end an instance, or None where none did."""
    said = instance.record.get("ending")
    return EndReason(said) if said is not None else None
