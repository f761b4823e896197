"""The lifecycle of sandboxes: spawn, find, extend, destroy, and what happens when one dies by itself.

It ties the backend (what exists), the store (names, keys, routes) and the ledger (calls in flight) together. Every
way out of a spawn but `ready` leaves nothing; every end is recorded with its reason for an hour.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import anyio

from ash_hub import _state
from ash_hub._state import Step
from ash_hub.asks import SpawnAsk
from ash_hub.audit import Audit
from ash_hub.backends.base import Backend
from ash_hub.closing import Closing
from ash_hub.endings import Endings
from ash_hub.mirror import Mirror
from ash_hub.names import Names
from ash_hub.pool import Blank, Pool
from ash_hub.recipes import Catalog, Recipe
from ash_hub.registry import Registry
from ash_hub.rules import Rules
from ash_hub.sandbox import Sandbox
from ash_hub.settings import HubSettings
from ash_hub.shelf import ToolsetShelf
from ash_hub.siblings import Alone, Siblings
from ash_hub.specs import spec_for
from ash_hub.starting import Progress, Starter
from ash_mcp.errors import AshError, CapacityExceeded, ConnectFailed, SandboxGone, StartFailed
from ash_mcp.types import (
    DEFAULT_SCOPE,
    EVERY_SCOPE,
    EndReason,
    Principal,
    SandboxId,
    SandboxInfo,
    Scope,
    SessionName,
    State,
    new_sandbox_id,
)
from ash_router.ledger import Ledger
from ash_router.routes import Route, Routes
from ash_router.store.base import Store
from ash_router.tokens import CallTokens

__all__ = ["Parts", "Sandboxes"]

log = logging.getLogger("ash.hub")

_CALLS_WRITTEN_SECONDS = 5.0
"""How often the last calls are written down: so much of an idle time may be lost with a killed hive."""
_END_GRACE_SECONDS = 2.0
_END_BOUND_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What the lifecycle ties together."""

    backend: Backend
    store: Store
    routes: Routes
    ledger: Ledger
    tokens: CallTokens
    catalog: Catalog
    pool: Pool
    starter: Starter
    shelf: ToolsetShelf
    settings: HubSettings
    on_changed: Callable[[str, Scope], Awaitable[None]]
    """Told whose tools changed: owner and scope."""
    on_gone: Callable[[SandboxId], None]
    """Told that a sandbox has no route any more, so that connections to it can be dropped."""
    audit: Audit = field(default_factory=Audit)
    siblings: Siblings = field(default_factory=Alone)


class Sandboxes:
    """The sandboxes of one hive."""

    def __init__(self, parts: Parts, clock: Callable[[], float] = time.time) -> None:
        self._parts = parts
        self._clock = clock
        self._stopping = False
        self._called: set[SandboxId] = set()
        """Sandboxes whose last call is not written down yet."""
        self._calls_written_at = 0.0
        self._rules = Rules(parts.settings, parts.catalog)
        self.registry = Registry()
        self._names = Names(parts.store, parts.backend, self.registry, parts.siblings)
        self._endings = Endings(parts.settings.state_dir / "ended", parts.settings.ended_retention_seconds)
        self._closing = Closing(
            parts.store,
            parts.routes,
            parts.ledger,
            parts.tokens,
            self._endings,
            parts.on_changed,
            parts.on_gone,
            clock,
        )
        self.mirror = Mirror(
            parts.backend,
            parts.store,
            parts.shelf,
            parts.ledger,
            self.registry,
            self._closing,
            parts.siblings,
            parts.audit,
            bind=self.bind,
            on_changed=parts.on_changed,
            clock=clock,
        )

    # -- asking

    def info(self, sandbox: Sandbox) -> SandboxInfo:
        """Return what its owner may see of a sandbox now."""
        return sandbox.info(self._parts.ledger.last_call(sandbox.id))

    def ready(self, principal: Principal, scope: Scope, name: str) -> Sandbox:
        """Return a sandbox that can be called.

        Raises:
            SandboxNotFound: The caller has none of that name.
            SandboxGone: It has ended; the message says why and what to do.
            CapacityExceeded: It is still starting; come back.
        """
        sandbox = self.registry.find(principal, scope, name)
        if sandbox.life.state.ended or sandbox.life.state is State.STOPPING:
            raise sandbox.gone(self._clock())
        if sandbox.life.state is not State.READY:
            raise CapacityExceeded(f"sandbox {sandbox.session} is still starting", retry_after_seconds=1.0)
        return sandbox

    async def explain(self, route: Route) -> AshError | None:
        """Say why calls on a route fail: waits up to a second for the news of its sandbox's death."""
        sandbox = self.registry.by_id(route.sandbox_id)
        if sandbox is None:
            return SandboxGone(f"sandbox {route.session} is gone. Call spawn for a new one.", session=route.session)
        with anyio.move_on_after(1.0):
            await sandbox.ended.wait()
        return sandbox.gone(self._clock()) if sandbox.life.state.ended else None

    def unready(self) -> str | None:
        """Say why no spawn can succeed now, or None."""
        return "stopping" if self._stopping else self._parts.backend.unready()

    def _require_backend(self) -> None:
        """Refuse what would have to be taken back.

        Raises:
            ConnectFailed: The backend cannot be reached; retryable.
        """
        if (why := self._parts.backend.unready()) is not None:
            raise ConnectFailed(f"this hive cannot change its sandboxes now: {why}")

    # -- spawning

    async def spawn(self, principal: Principal, scope: Scope, ask: SpawnAsk, progress: Progress) -> Sandbox:
        """Make a sandbox and return it ready, or return the one that the same idempotency key made before.

        Raises:
            RecipeNotFound, ConfigError, SessionTaken, Unsupported: Nothing was made.
            CapacityExceeded: The hive is full, or too many spawns wait.
            StartFailed: With the step and the log; nothing is left of it.
            SandboxGone: The sandbox of this idempotency key has ended.
        """
        recipe = self._rules.recipe(ask)
        scope = DEFAULT_SCOPE if scope == EVERY_SCOPE else scope
        blank = await self._parts.pool.acquire(recipe.name)
        sandbox_id = blank.instance.id if blank is not None else new_sandbox_id()
        try:
            await self._parts.siblings.begin(sandbox_id)
            return await self._spawn(principal, scope, ask, recipe, blank, sandbox_id, progress)
        finally:
            self._parts.siblings.settle(sandbox_id)

    async def _spawn(
        self,
        principal: Principal,
        scope: Scope,
        ask: SpawnAsk,
        recipe: Recipe,
        blank: Blank | None,
        sandbox_id: SandboxId,
        progress: Progress,
    ) -> Sandbox:
        if ask.idempotency_key is not None:
            holder = await self._names.claim_key(principal.subject, scope, ask.idempotency_key, sandbox_id)
            if holder != sandbox_id:
                if blank is not None:
                    await self._parts.pool.release(recipe.name, blank)
                return await self._same(holder)
        sandbox = await self._enter(principal, scope, ask, recipe, sandbox_id)
        with anyio.CancelScope() as sandbox.starting:
            return await self._make_ready(sandbox, recipe, ask, blank, progress)
        await sandbox.ended.wait()
        raise sandbox.gone(self._clock())

    async def _same(self, sandbox_id: SandboxId) -> Sandbox:
        """Return the sandbox that an idempotency key belongs to, when it is ready."""
        sandbox = self.registry.by_id(sandbox_id)
        if sandbox is None and (instance := await self._parts.backend.get(sandbox_id)) is not None:
            await self.mirror.seen(instance)
            sandbox = self.registry.by_id(sandbox_id)
        if sandbox is None:
            raise CapacityExceeded("another spawn with this idempotency key has just begun", retry_after_seconds=0.5)
        await sandbox.settled.wait()
        if sandbox.life.state is not State.READY:
            raise sandbox.gone(self._clock())
        return sandbox

    async def _enter(
        self, principal: Principal, scope: Scope, ask: SpawnAsk, recipe: Recipe, sandbox_id: SandboxId
    ) -> Sandbox:
        """Take a place, a session name and an entry in the registry for a sandbox to be."""
        store = self._parts.store
        try:
            self._refuse_when_full()
            ttl, idle = self._rules.lifetimes(ask, recipe)
            wanted = SessionName(ask.session) if ask.session is not None else None
            session = await self._names.reserve(principal.subject, scope, wanted, sandbox_id)
        except BaseException:
            if ask.idempotency_key is not None:
                with anyio.CancelScope(shield=True):
                    await store.release_key(principal.subject, scope, ask.idempotency_key, sandbox_id)
            raise
        sandbox = Sandbox(
            id=sandbox_id,
            owner=principal.subject,
            scope=scope,
            session=session,
            recipe=recipe.name,
            key=ask.idempotency_key,
            maker=self._parts.siblings.id,
            life=_state.born(self._clock(), ttl_seconds=ttl, idle_seconds=idle),
            labels=dict(ask.labels),
        )
        self.registry.add(sandbox)
        return sandbox

    async def _make_ready(
        self, sandbox: Sandbox, recipe: Recipe, ask: SpawnAsk, blank: Blank | None, progress: Progress
    ) -> Sandbox:
        try:
            sandbox.step(Step.START, self._clock())
            if blank is None:
                spec = spec_for(sandbox, recipe, ask, self._parts.tokens.public_key)
                blank = await self._parts.starter.start(recipe, spec, progress)
            sandbox.generation, sandbox.endpoint = blank.instance.generation, blank.instance.endpoint
            sandbox.toolset = self._parts.shelf.put(blank.toolset)
            sandbox.warnings = (*blank.instance.warnings, *blank.toolset.notes)
            await progress(0.9, "handing over the environment")
            await self._parts.starter.claim(blank, ask.env, ask.secrets)
            sandbox.step(Step.READY, self._clock())
            await self._write_down(sandbox)
            await self.bind(sandbox)
            if sandbox.life.state is not State.READY:  # it died while it was being bound
                await self._parts.routes.unbind(sandbox.id)
                raise sandbox.gone(self._clock())
        except BaseException as exc:
            with anyio.move_on_after(_END_BOUND_SECONDS, shield=True):
                await self._undo(sandbox, exc)
            raise
        log.info("spawned", extra={"sandbox": sandbox.id, "session": sandbox.session, "recipe": sandbox.recipe})
        await self._parts.on_changed(sandbox.owner, sandbox.scope)
        return sandbox

    async def bind(self, sandbox: Sandbox) -> None:
        """Open the way to a ready sandbox, or open it again."""
        assert sandbox.endpoint is not None and sandbox.toolset is not None, "only a ready sandbox has a route"
        listing = sandbox.toolset.listing(sandbox.session, self._parts.settings.name_limit)
        await self._parts.routes.bind(
            Route(
                sandbox_id=sandbox.id,
                generation=sandbox.generation,
                owner=sandbox.owner,
                scope=sandbox.scope,
                session=sandbox.session,
                endpoint=sandbox.endpoint,
                tool_names=listing.renamed,
            )
        )

    async def _undo(self, sandbox: Sandbox, error: BaseException) -> None:
        """Leave nothing of a spawn that failed, but the reason."""
        if sandbox.life.state is not State.STOPPING and not sandbox.life.state.ended:
            said = str(error) if isinstance(error, AshError) else "the caller left before it was ready"
            sandbox.step(Step.FAIL, self._clock(), EndReason.START_FAILED, said.partition("\n")[0])
        await self._parts.starter.discard(sandbox.id)
        await self._closing.let_go(sandbox)
        if not sandbox.life.state.ended:
            sandbox.step(Step.END, self._clock())

    # -- changing

    async def _write_down(self, sandbox: Sandbox) -> None:
        """Have the backend keep how a sandbox stands, for other replicas and the next hive."""
        sandbox.revision += 1
        # replicas have the last calls in the store, which outlives each of them; each knows but a part
        last_call = None if self._parts.siblings.possible else self._parts.ledger.last_call(sandbox.id)
        await self._parts.backend.annotate(sandbox.id, sandbox.record(last_call))

    async def report_calls(self, *, last: bool = False) -> None:
        """Write down which sandboxes were called since this was last done, so that they idle out in time.

        Args:
            last: Leave nothing for the next time.
        """
        changed = self._parts.ledger.take_changed()
        if changed:
            await self._parts.store.touch(changed)
        if self._parts.siblings.possible:
            return
        self._called |= changed.keys()
        if not last and self._clock() < self._calls_written_at + _CALLS_WRITTEN_SECONDS:
            return
        called, self._called, self._calls_written_at = self._called, set(), self._clock()
        for sandbox in self.registry.living():
            if sandbox.id in called and sandbox.life.state is State.READY:
                await self._write_down(sandbox)

    async def extend(self, principal: Principal, scope: Scope, name: str, ttl_seconds: float) -> Sandbox:
        """Give a sandbox `ttl_seconds` from now."""
        sandbox = self.ready(principal, scope, name)
        self._require_backend()
        self._rules.check_ttl(ttl_seconds)
        sandbox.life = _state.extended(sandbox.life, self._clock(), ttl_seconds)
        await self._write_down(sandbox)
        return sandbox

    async def destroy(self, targets: Iterable[Sandbox]) -> None:
        """End sandboxes for their owner; those that have ended already stay as they are.

        Raises:
            ConnectFailed: The backend cannot be reached, and none was ended.
        """
        self._require_backend()
        await self._end_all(targets, EndReason.DESTROYED)

    async def expire(self) -> None:
        """End what is over its TTL or idle time: the work of one replica."""
        now = self._clock()
        overdue: dict[EndReason, list[Sandbox]] = {}
        for sandbox in self.registry.living():
            if self._parts.ledger.busy(sandbox.id) and now < sandbox.life.expires_at:
                continue
            reason = _state.due(sandbox.life, now, self._parts.ledger.last_call(sandbox.id))
            if reason is not None:
                overdue.setdefault(reason, []).append(sandbox)
        for reason, sandboxes in overdue.items():
            await self._end_all(sandboxes, reason)

    def recall(self) -> None:
        """Learn why those ended that earlier hives had."""
        for sandbox in self._endings.load(self._clock()):
            self.registry.add(sandbox)

    async def forget(self) -> None:
        """Forget what ended long ago."""
        now = self._clock()
        for sandbox in self.registry.all():
            ended_at = sandbox.life.ended_at
            if ended_at is not None and now - ended_at >= self._parts.settings.ended_retention_seconds:
                self.registry.remove(sandbox)
                self._endings.drop(sandbox.id)
                await self._closing.release_key(sandbox)

    async def stop(self, *, keep: bool) -> None:
        """End for good: no more spawns, calls in flight fail as typed, sandboxes end unless they are kept.

        They are kept, too, while another replica goes on; spawns that have begun here end in any case.
        """
        self._stopping = True
        self._parts.ledger.abort_all(
            SandboxGone("the hive is stopping; the call was interrupted", reason=EndReason.HIVE_STOPPED.value)
        )
        if not self._parts.siblings.possible:  # with others the store has them, and it may be away
            await self.report_calls(last=True)
        others_go_on = await self._parts.siblings.leave()
        targets = self.registry.living()
        if keep or others_go_on:
            targets = [s for s in targets if s.life.ready_at is None and s.maker == self._parts.siblings.id]
        await self._end_all(targets, EndReason.HIVE_STOPPED)
        if not others_go_on:  # nobody is left to forget them in time
            for sandbox in self.registry.all():
                if sandbox.life.state.ended:
                    await self._closing.release_key(sandbox)

    # -- ending

    async def _end_all(self, targets: Iterable[Sandbox], reason: EndReason) -> None:
        async with anyio.create_task_group() as group:
            for sandbox in targets:
                group.start_soon(self._end, sandbox, reason)

    async def _end(self, sandbox: Sandbox, reason: EndReason) -> None:
        if sandbox.life.state.ended:
            return
        if sandbox.life.state is State.STOPPING:
            await self._ended(sandbox)
            return
        was_ready = sandbox.life.state is State.READY
        with anyio.CancelScope(shield=True):
            if was_ready:
                await self._end_ready(sandbox, reason)
            elif sandbox.starting is not None:
                sandbox.step(Step.STOP, self._clock(), reason)
                sandbox.starting.cancel()
                await sandbox.ended.wait()
            else:
                await self._end_start_elsewhere(sandbox, reason)
        log.info("ended", extra={"sandbox": sandbox.id, "session": sandbox.session, "why": reason.value})
        if reason is not EndReason.DESTROYED:  # that has a line with who did it
            self._parts.audit.ended(sandbox, reason)

    async def _end_ready(self, sandbox: Sandbox, reason: EndReason) -> None:
        sandbox.ending_here = True
        sandbox.step(Step.STOP, self._clock(), reason)
        await self._write_down(sandbox)  # so that it is known why, and finished by another if this process dies
        await self._closing.withdraw(sandbox)
        await self._parts.backend.delete(sandbox.id, grace_seconds=_END_GRACE_SECONDS)
        await self._closing.let_go(sandbox)
        sandbox.step(Step.END, self._clock())

    async def _end_start_elsewhere(self, sandbox: Sandbox, reason: EndReason) -> None:
        """End what another replica starts: that one cleans up, when it sees it gone."""
        record = {**sandbox.record(), "ending": reason.value}
        await self._parts.backend.annotate(sandbox.id, record)
        await self._parts.backend.delete(sandbox.id, grace_seconds=0.0)
        await self._ended(sandbox)

    async def _ended(self, sandbox: Sandbox) -> None:
        """Wait for an end that is on its way, bounded."""
        with anyio.move_on_after(_END_BOUND_SECONDS):
            await sandbox.ended.wait()

    # -- limits

    def _refuse_when_full(self) -> None:
        if self._stopping:
            raise StartFailed("the hive is stopping", step="admit")
        limit = self._parts.settings.limits.sandboxes
        if len(self.registry.living()) >= limit:
            raise CapacityExceeded(
                f"the hive holds {limit} sandboxes, its limit; destroy one, or raise ASH_HUB_LIMITS__SANDBOXES",
                retry_after_seconds=10.0,
            )
