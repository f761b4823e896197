"""The verbs of callers: spawn, find, change and destroy sandboxes. The controller does the rest."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import anyio

from ash_hub.backends.base import Warming
from ash_hub.lifecycle.controller import Controller
from ash_hub.lifecycle.kept_snapshots import KeptSnapshot, KeptSnapshots
from ash_hub.lifecycle.parts import Parts
from ash_hub.lifecycle.record import Record
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.settings import Limits
from ash_hub.spawning.pool import Started
from ash_hub.spawning.recipes import Network, Recipe
from ash_hub.spawning.refusal_pace import RefusalPace
from ash_hub.spawning.spawn_policy import Allowed, SpawnPolicy
from ash_hub.spawning.spawn_request import SpawnAsk
from ash_hub.spawning.specs import fingerprint, network_of, ports_of, recipe_digest, spec_for
from ash_hub.spawning.starting import CLAIM_SECONDS, Handover, Progress
from ash_hub.spawning.toolsets import Toolset
from ash_mcp.errors import AshError, CapacityExceeded, Conflict, ConnectFailed, SandboxGone, StartFailed
from ash_mcp.types import (
    DEFAULT_SCOPE,
    EVERY_SCOPE,
    Cause,
    EndReason,
    Principal,
    SandboxId,
    SandboxInfo,
    SandboxSpec,
    Scope,
    SessionName,
    State,
    new_sandbox_id,
)
from ash_router.routes import Route
from ash_router.store.base import Run

__all__ = ["Sandboxes"]

WARM_AFTER_SECONDS: Final = 3.0
log = logging.getLogger("ash.hub")

END_SECONDS: Final = 30.0
"""How long a caller waits for an end; it goes on without the caller."""
LOOK_SECONDS: Final = 0.5
"""How often whoever waits for an end looks whether the backend is still there."""
SHOWN_SECONDS: Final = 30.0
"""How long a start that is through waits for a store that is away."""


class Sandboxes:
    """The sandboxes of one hive, as its callers use them."""

    def __init__(self, parts: Parts, controller: Controller) -> None:
        self._parts = parts
        self._controller = controller
        self._clock = parts.clock
        self._is_stopping = False
        self._policy = SpawnPolicy(parts.settings, parts.catalog)
        self._refusals = RefusalPace()
        self.registry = controller.registry
        self._names = controller.names
        self.runs = controller.runs
        self.snapshots = KeptSnapshots(parts.backend, controller.runs)

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
        if sandbox.state.ended or sandbox.state is State.STOPPING:
            raise sandbox.gone(self._clock())
        if sandbox.state is not State.READY:
            raise CapacityExceeded(f"sandbox {sandbox.session} is still starting", retry_after_seconds=1.0)
        return sandbox

    async def explain(self, route: Route) -> AshError | None:
        """Say why calls on a route fail: waits up to a second for the news of its sandbox's death."""
        sandbox = self.registry.by_id(route.sandbox_id)
        if sandbox is None:
            return SandboxGone(f"sandbox {route.session} is gone. Call spawn for a new one.", session=route.session)
        with anyio.move_on_after(1.0):
            await sandbox.ended.wait()
        return sandbox.gone(self._clock()) if sandbox.state.ended else None

    def stopping(self) -> str | None:
        """Say that this hive is stopping, or None."""
        return "stopping" if self._is_stopping else None

    def unready(self) -> str | None:
        """Say why no spawn can succeed now, or None."""
        return self.stopping() or self._parts.backend.unready()

    def _require_backend(self) -> None:
        """Refuse what would have to be taken back.

        Raises:
            ConnectFailed: The backend cannot be reached; retryable.
        """
        if (why := self._parts.backend.unready()) is not None:
            raise ConnectFailed(f"this hive cannot change its sandboxes now: {why}")

    # -- spawning

    async def warm(self) -> None:
        """Have the backend prepare for the spawns that name no recipe, once whoever started the hive was answered."""
        backend, ask = self._parts.backend, SpawnAsk()
        if not isinstance(backend, Warming) or not isinstance(ask.recipe, str):
            return
        await anyio.sleep(WARM_AFTER_SECONDS)
        with suppress(AshError):
            recipe = self._parts.catalog.get(ask.recipe)
            await backend.warm(self._spec(new_sandbox_id(), {}, recipe, ask))

    async def spawn(
        self,
        principal: Principal,
        scope: Scope,
        ask: SpawnAsk,
        progress: Progress,
        *,
        alias: str | None = None,
        announce: bool = True,
    ) -> Sandbox:
        """Make a sandbox and return it ready, or return the one that the same idempotency key made before.

        Args:
            alias: One more name of it, good in every scope; never a caller's own choice, as it must be unguessable.
            announce: Whether callers are told that their tools changed; else that is left to whoever spawns.

        Raises:
            RecipeNotFound, ConfigError, PermissionDenied, SessionTaken, Unsupported: Nothing was made.
            SnapshotNotFound, Conflict: There is no such snapshot, or it is of another recipe, and nothing was made.
            RunNotFound, RunEnded: The run that it is for is not open, and nothing was made.
            CapacityExceeded: The owner, or the hive, has as many sandboxes as it may, or too many spawns wait. Who
                asks again and again hears it later (`RefusalPace`).
            StartFailed: With the step and the log; nothing is left of it.
            ConnectFailed: The backend, or the store, cannot be reached; retryable.
            SandboxGone: The sandbox of this idempotency key has ended.
        """
        kept = None
        if ask.snapshot is not None:
            kept = await self.snapshots.find(principal, scope, ask.snapshot, now=self._clock())
            if "recipe" not in ask.model_fields_set:
                ask = ask.model_copy(update={"recipe": kept.record.recipe})
        allowed = self._policy.judge(ask, principal)
        if kept is not None:
            _require_same_recipe(kept, allowed.recipe)
        self._require_backend()
        scope = DEFAULT_SCOPE if scope == EVERY_SCOPE else scope
        run = await self.runs.find(principal, scope, ask.run) if ask.run is not None else None
        sandbox_id = new_sandbox_id()
        try:
            await self._parts.siblings.begin(sandbox_id)
            if ask.idempotency_key is not None:
                holder = await self._names.claim_key(principal.subject, scope, ask.idempotency_key, sandbox_id)
                if holder != sandbox_id:
                    return await self._same(holder)
            sandbox = await self._enter(principal, scope, ask, allowed.recipe, sandbox_id, alias, run)
            sandbox.is_unannounced = not announce
            return await self._make_ready(sandbox, allowed, ask, progress, kept)
        except CapacityExceeded:
            self._parts.siblings.settle(sandbox_id)  # only the answer waits
            await anyio.sleep(self._refusals.delay(principal.subject))
            raise
        finally:
            self._parts.siblings.settle(sandbox_id)

    async def _same(self, sandbox_id: SandboxId) -> Sandbox:
        """Return the sandbox that an idempotency key belongs to, when it is ready."""
        if self.registry.by_id(sandbox_id) is None:
            await self._controller.settle([sandbox_id])
        sandbox = self.registry.by_id(sandbox_id)
        if sandbox is None:
            raise CapacityExceeded("another spawn with this idempotency key has just begun", retry_after_seconds=0.5)
        await sandbox.settled.wait()
        if sandbox.state is not State.READY:
            raise sandbox.gone(self._clock())
        return sandbox

    async def _enter(
        self,
        principal: Principal,
        scope: Scope,
        ask: SpawnAsk,
        recipe: Recipe,
        sandbox_id: SandboxId,
        alias: str | None,
        run: Run | None,
    ) -> Sandbox:
        """Take a place, a session name and an entry in the registry for a sandbox to be."""
        session: SessionName | None = None
        try:
            self._require_running()
            ttl, idle = self._policy.lifetimes(ask, recipe)
            wanted = SessionName(ask.session) if ask.session is not None else None
            places, epoch = self._parts.settings.limits.places(principal), self._controller.store_epoch
            run_id = run.id if run is not None else None
            session = await self._names.reserve(principal.subject, scope, wanted, sandbox_id, places, run_id)
            self._require_running()  # nobody would end what begins after the stop
        except BaseException:
            with anyio.CancelScope(shield=True):
                if session is not None:
                    await self._parts.store.release_session(principal.subject, scope, session, sandbox_id)
                if ask.idempotency_key is not None:
                    await self._parts.store.release_key(principal.subject, scope, ask.idempotency_key, sandbox_id)
            raise
        now = self._clock()
        record = Record(
            owner=principal.subject,
            scope=scope,
            session=session,
            recipe=recipe.name,
            recipe_digest=recipe_digest(recipe),
            key=ask.idempotency_key,
            maker=self._parts.siblings.id,
            created_at=now,
            start_by=math.inf,  # counts from its turn
            expires_at=now + ttl,
            idle_seconds=idle,
            labels=dict(ask.labels),
            alias=alias,
            network=network_of(recipe, ask),
            run=run,
            ports=ports_of(recipe, ask),
        )
        sandbox = Sandbox(id=sandbox_id, record=record, held_epoch=epoch)
        self.registry.add(sandbox)
        return sandbox

    def _require_running(self) -> None:
        if self._is_stopping:
            raise StartFailed("the hive is stopping", step="admit")

    async def _make_ready(
        self, sandbox: Sandbox, allowed: Allowed, ask: SpawnAsk, progress: Progress, kept: KeptSnapshot | None
    ) -> Sandbox:
        """Start a sandbox. On failure nothing of it is left but the reason, and the caller has waited for that."""
        with anyio.CancelScope() as sandbox.start:
            if sandbox.record.run is not None:
                self._controller.add(sandbox.id)  # so that it ends with its run from now on
            try:
                await self._start(sandbox, allowed, ask, progress, kept)
                return sandbox
            except BaseException as error:
                await self._give_up(sandbox, error)
                decided = sandbox.record.ending or sandbox.requested_end
                if isinstance(error, AshError) and decided and decided.reason is not EndReason.START_FAILED:
                    raise self._unmade(sandbox) from error  # its end was wanted; the start saw no more than that
                raise
        await self._wait_ended(sandbox)  # its end was wanted while it started
        raise self._unmade(sandbox)

    def _unmade(self, sandbox: Sandbox) -> AshError:
        """Return what a spawn fails with whose sandbox was ended while it started."""
        decided = sandbox.record.ending or sandbox.requested_end
        if decided is not None and decided.reason is EndReason.HIVE_STOPPED:
            return StartFailed("the hive stopped while it started", step="start", cause=decided.cause.value)
        return sandbox.gone(self._clock())

    def _spec(
        self, sandbox_id: SandboxId, record: Mapping[str, Any], recipe: Recipe, ask: SpawnAsk, network_note: str = ""
    ) -> SandboxSpec:
        return spec_for(
            sandbox_id,
            record,
            recipe,
            ask,
            self._parts.tokens,
            network_note=network_note,
            result_bytes=self._parts.settings.result_bytes,
        )

    async def _start(
        self, sandbox: Sandbox, allowed: Allowed, ask: SpawnAsk, progress: Progress, kept: KeptSnapshot | None
    ) -> None:
        recipe = allowed.recipe
        toolset = await self._toolset_of(kept) if kept is not None else None

        def spec() -> SandboxSpec:
            sandbox.state = State.STARTING
            start_by = self._clock() + 2 * recipe.start_timeout_seconds + CLAIM_SECONDS
            sandbox.record = replace(sandbox.record, start_by=start_by)
            return made(sandbox.record.to_json())

        def made(record: Mapping[str, Any]) -> SandboxSpec:
            return self._spec(sandbox.id, record, recipe, ask, allowed.network_note)

        wanted = fingerprint(made({}))
        handover = Handover(ask.env, ask.secrets)
        started = await self._parts.pool.acquire(wanted)
        if started is None:
            waiting = allowed.waiting
            started = await self._parts.starter.start(
                sandbox.owner, recipe, spec, progress, waiting, handover, toolset
            )
        else:
            await progress(0.9, "handing over the environment")
            await self._parts.starter.claim(started, handover)
        sandbox.toolset = await self._parts.shelf.put(started.toolset)
        await self._record_ready(sandbox, started, allowed)
        log.info("spawned", extra={"sandbox": sandbox.id, "session": sandbox.session, "recipe": sandbox.recipe})

    async def _toolset_of(self, kept: KeptSnapshot) -> Toolset:
        """Return the tools of a snapshot: what runs over an agent's files is not asked for any."""
        toolset = await self._parts.shelf.get(kept.record.toolset)
        if toolset is None:
            raise StartFailed(f"the tools of snapshot {kept.id} are not kept any more; take another", step="tools")
        return toolset

    async def _record_ready(self, sandbox: Sandbox, started: Started, allowed: Allowed) -> None:
        """Record that a start is through, and wait until the sandbox is shown."""
        notes = (f"it started with {allowed.network_note}",) if allowed.network_note else ()
        warnings = (*started.instance.warnings, *started.toolset.notes, *notes)

        def ready(record: Record) -> Record:
            return replace(record, ready_at=self._clock(), toolset=started.toolset.digest, warnings=warnings)

        await self._controller.change(sandbox, ready)
        sandbox.start = None  # from here on it ends like any other
        with anyio.move_on_after(SHOWN_SECONDS) as bound:
            await sandbox.settled.wait()
        if bound.cancelled_caught:
            away = ConnectFailed("the sandbox is ready, but the store is away and nobody could find it")
            raise self._controller.defect_of(sandbox.id) or away
        if sandbox.state is not State.READY:  # it ended meanwhile
            raise sandbox.gone(self._clock())

    async def _give_up(self, sandbox: Sandbox, error: BaseException) -> None:
        """Leave nothing of a spawn that failed, but the reason."""
        said = str(error) if isinstance(error, AshError) else "the caller left before it was ready"
        sandbox.start = None
        named = error.data.get("cause") if isinstance(error, StartFailed) else None
        cause = Cause(named) if named is not None else None
        self._controller.request_end(sandbox, EndReason.START_FAILED, said.partition("\n")[0], cause)
        await self._wait_ended(sandbox)

    async def _wait_ended(self, sandbox: Sandbox) -> None:
        """Wait for an end that is on its way, also for a caller that leaves; not for a backend that is away."""
        with anyio.move_on_after(END_SECONDS, shield=True):
            while not sandbox.ended.is_set() and self._parts.backend.unready() is None:
                with anyio.move_on_after(LOOK_SECONDS):
                    await sandbox.ended.wait()

    # -- changing

    async def extend(self, principal: Principal, scope: Scope, name: str, ttl_seconds: float) -> Sandbox:
        """Give a sandbox `ttl_seconds` from now."""
        sandbox = self.ready(principal, scope, name)
        self._require_backend()
        self._policy.check_ttl(ttl_seconds)
        expires_at = self._clock() + ttl_seconds
        await self._controller.change(sandbox, lambda record: replace(record, expires_at=expires_at))
        return sandbox

    def check_ttl(self, ttl_seconds: float) -> None:
        """Refuse a life that is longer than this hive allows.

        Raises:
            ConfigError: It is.
        """
        self._policy.check_ttl(ttl_seconds)

    async def set_network(self, principal: Principal, scope: Scope, name: str, network: Network) -> Sandbox:
        """Change what a sandbox may reach; connections that it may have no more are closed.

        Raises:
            PermissionDenied: It would reach more than it does, and not every bound of its caller allows that.
            ConfigError: The policy cannot be read or carried out.
            Unsupported: The backend cannot change the network of this sandbox.
        """
        sandbox = self.ready(principal, scope, name)
        self._require_backend()

        def changed(record: Record) -> Record:
            self._policy.check_network_change(record.network, network, record.recipe, principal)
            return replace(record, network=network)

        await self._controller.change(sandbox, changed)
        return sandbox

    async def destroy(self, targets: Iterable[Sandbox]) -> None:
        """End sandboxes for their owner; those that have ended already stay as they are.

        Raises:
            ConnectFailed: The backend cannot be reached; what it had not recorded by then was not ended.
        """
        self._require_backend()
        await self._end_all(targets, EndReason.DESTROYED)

    async def destroy_run(self, principal: Principal, scope: Scope, name: str) -> list[Sandbox]:
        """End a run and what was spawned in it, and return its sandboxes that lived.

        Raises:
            RunEnded, RunNotFound: The caller has no such open run.
            ConnectFailed: The store or the backend is away; what had not begun to end goes on.
        """
        self._require_backend()
        run = await self.runs.find(principal, scope, name)
        await self.runs.end(run)
        living = self.registry.living()
        targets = [it for it in living if it.record.run is not None and it.record.run.id == run.id]
        await self._end_all(targets, EndReason.DESTROYED)
        return targets

    async def abandon(self, targets: Iterable[Sandbox]) -> None:
        """End sandboxes whose spawn nobody was told of, as spawns that failed."""
        targets = list(targets)
        for sandbox in targets:
            message = "its caller left before it was told of it"
            self._controller.request_end(sandbox, EndReason.START_FAILED, message, Cause.AGENT)
        for sandbox in targets:
            await self._wait_ended(sandbox)

    async def announce(self, principal: Principal, scope: Scope) -> None:
        """Tell a principal's callers that their tools changed."""
        await self._parts.on_changed(principal.subject, DEFAULT_SCOPE if scope == EVERY_SCOPE else scope)

    @property
    def limits(self) -> Limits:
        """What this hive holds at most."""
        return self._parts.settings.limits

    async def stop(self, *, keep: bool) -> bool:
        """End for good: no more spawns, sandboxes end with the calls in flight, unless they are kept.

        They are kept, too, while another replica goes on; spawns that have begun here end in any case.

        Returns:
            Whether another replica goes on.
        """
        self._is_stopping = True
        await self._controller.report_calls()
        # before this replica leaves: others would take its starts for those of a dead one
        await self._end_at_stop([sandbox for sandbox in self.registry.living() if sandbox.start is not None])
        others_go_on = await self._parts.siblings.leave()
        if not keep and not others_go_on:
            self._parts.ledger.abort_all(
                SandboxGone("the hive is stopping; the call was interrupted", reason=EndReason.HIVE_STOPPED.value)
            )
            await self._end_at_stop(self.registry.living())
        if not others_go_on:  # nobody is left to forget them in time
            await self._controller.release_keys()
        return others_go_on

    async def _end_at_stop(self, targets: Iterable[Sandbox]) -> None:
        with suppress(ConnectFailed):  # then the backend ends or keeps them, as it does when a hive is killed
            await self._end_all(targets, EndReason.HIVE_STOPPED)

    async def _end_all(self, targets: Iterable[Sandbox], reason: EndReason) -> None:
        refused: list[ConnectFailed] = []

        async def end(sandbox: Sandbox) -> None:
            try:
                await self._controller.end(sandbox, reason)
                await self._wait_ended(sandbox)
            except ConnectFailed as error:
                refused.append(error)

        async with anyio.create_task_group() as group:
            for sandbox in targets:
                group.start_soon(end, sandbox)
        if refused:
            raise refused[0]


def _require_same_recipe(kept: KeptSnapshot, recipe: Recipe) -> None:
    """Refuse a recipe whose tools may be others than those that a snapshot keeps."""
    known = kept.record.recipe_digest
    if kept.record.recipe == recipe.name and known in (None, recipe_digest(recipe)):
        return
    raise Conflict(
        f"snapshot {kept.id} is of recipe {kept.record.recipe}, and what this spawn names is another, or has changed "
        "since: leave recipe out, give the inline recipe that its sandbox was spawned with, or take a new snapshot"
    )
