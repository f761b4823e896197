"""The lifecycle's controller: a level-triggered reconciler, and the one place where sandboxes change.

Whatever happens (a spawn, a destroy, a deadline, an event of the backend, a flush of the store) only puts a sandbox's
id into a queue. A turn looks at the record and the instance, asks `decide` for the next step, does it, and looks
again. Every step may be taken twice, by any replica; replicas race only at the compare-and-set of the record, and the
loser looks again.

An end is requested (`Sandbox.requested_end`, in memory), recorded (`Record.ending`, at the backend), and then carried
out: the sandbox is withdrawn from callers, deleted, buried (kept as ended), and in the end forgotten.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

import anyio

from ash_hub.backends.base import BackendEvent, Instance, Phase
from ash_hub.lifecycle.decide import Decision, Step, View, Where, decide, idle_since
from ash_hub.lifecycle.endings import Endings, FileEndings
from ash_hub.lifecycle.keyed_queue import KeyedQueue
from ash_hub.lifecycle.parts import Parts
from ash_hub.lifecycle.record import Ending, Record, UnreadableRecord
from ash_hub.lifecycle.registry import Registry
from ash_hub.lifecycle.runs import RUN_NEWS, Runs
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.session_names import Names, hold_again
from ash_mcp.errors import AshError, Conflict, ConnectFailed, HiveFault, SandboxGone
from ash_mcp.types import Cause, EndReason, SandboxId, State
from ash_router.routes import Route
from ash_router.store.base import LOST, Run

__all__ = ["REPORT_SECONDS", "Controller"]

log = logging.getLogger("ash.hub")

CONCURRENT_STEPS: Final = 32
"""How many steps other than deletes run at once."""
CONCURRENT_DELETES: Final = 256
"""Deletes wait for the processes of sandboxes, so they are bounded by themselves and hold up no other step."""
MOST_STEPS: Final = 20
"""How many steps one turn may take; a healthy end takes four."""
STEP_SECONDS: Final = 5.0
DELETE_GRACE_SECONDS: Final = 2.0
RESYNC_SECONDS: Final = 30.0
"""How often every sandbox is looked at although nothing happened."""
REPORT_SECONDS: Final = 1.0
"""How often a replica tells the store when sandboxes were last called through it."""
CATCH_UP_SECONDS: Final = 0.5
"""How long a request waits for news of other replicas."""
CHANGE_TRIES: Final = 10
CHANGE_PAUSE_SECONDS: Final = 0.01
"""Doubled after each try. A backend may answer from a cache that has another replica's write only with its event."""
FOLLOW_AGAIN_SECONDS: Final = 1.0
MOST_ENDED: Final = 1000
"""Ended sandboxes that are remembered; of more, the first to end are forgotten."""


class Controller:
    """Reconciles all sandboxes of a hive; every replica runs one."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._backend = parts.backend
        self.registry = Registry()
        self.names = Names(parts.store, parts.backend, self.registry, parts.siblings)
        self._endings = _endings_of(parts)
        self._queue = KeyedQueue[SandboxId](self._turn)
        self._step_limiter = anyio.CapacityLimiter(CONCURRENT_STEPS)
        self._delete_limiter = anyio.CapacityLimiter(CONCURRENT_DELETES)
        self._calls_known_at = -math.inf if parts.siblings.possible else math.inf
        """When the store was last asked for the calls through other replicas; infinity where there can be none."""
        self.store_epoch = 0
        """Grows when the store has lost what it held."""
        self._restored_at = parts.clock()
        """When this replica began, or the store was last empty or away: it may lack earlier calls, so idle times count
        from here at least.
        """
        self.runs = Runs(parts.store, parts.settings.limits.runs_allowed, parts.clock, lambda: self._restored_at)
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
            Step.BURY: self._bury,
        }

    # -- the queue, and what fills it

    def add(self, sandbox_id: SandboxId) -> None:
        """Queue a sandbox for a turn."""
        self._queue.add(sandbox_id)

    async def settle(self, sandbox_ids: Iterable[SandboxId]) -> bool:
        """Queue sandboxes and wait for their turns; False if the last turn of one failed."""
        return await self._queue.settle(sandbox_ids)

    def defect_of(self, sandbox_id: SandboxId) -> HiveFault | None:
        """Return the defect of the hive in a sandbox's last turn; None if that went well, or something was away."""
        error = self._queue.failure_of(sandbox_id)
        if error is None or isinstance(error, TimeoutError):
            return None
        if isinstance(error, AshError) and not isinstance(error, HiveFault):
            return None
        return HiveFault("the hive itself failed at this sandbox; its log has the details")

    async def run(self) -> None:
        """Reconcile the sandboxes until cancelled."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._queue.run)
            group.start_soon(self._follow)
            group.start_soon(self._follow_runs)
            group.start_soon(self._repeat, RESYNC_SECONDS, self.resync)
            group.start_soon(self._repeat, REPORT_SECONDS, self.report_calls)

    async def _follow(self) -> None:
        """Follow the backend's events until the backend is left.

        An event that cannot be handled is logged; a stream of events that breaks is opened again, and all looked at.
        """
        while True:
            try:
                async for event in self._backend.watch():
                    await self._follow_event(event)
            except Exception:
                log.exception("the events of the backend broke off")
            else:
                return
            await anyio.sleep(FOLLOW_AGAIN_SECONDS)
            await self._follow_event(BackendEvent(None, lost=True))

    async def _follow_event(self, event: BackendEvent) -> None:
        try:
            await self._note_instance(event.instance)
        except AshError as error:
            log.warning("an event of the backend could not be followed: %s", error)
        except Exception:
            log.exception("an event of the backend could not be followed")

    async def _follow_runs(self) -> None:
        """Have the sandboxes of runs looked at that their owners end, through any replica."""
        async with self._parts.store.subscribe(RUN_NEWS) as news:
            async for run_id in news:
                concerned = [it for it in self.registry.living() if it.record.run is not None]
                if run_id != LOST:
                    concerned = [it for it in concerned if it.record.run is not None and it.record.run.id == run_id]
                try:
                    await self.runs.learn(_runs_of(concerned))
                except AshError as error:
                    log.warning("how runs stand is learned later: %s", error)
                for sandbox in concerned:
                    self.add(sandbox.id)

    async def _note_instance(self, instance: Instance | None) -> None:
        if instance is None:  # events were lost
            await self.resync()
            return
        self.add(instance.id)
        self._parts.watch.tell(instance)
        known = self.registry.by_id(instance.id)
        if known is not None and instance.phase is Phase.ENDED:  # perhaps the instance's last event
            known.exit = known.exit or instance.exit
            with suppress(UnreadableRecord):
                known.record = Record.from_json(instance.record)

    async def _repeat(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await anyio.sleep(seconds)
            try:
                await work()
            except AshError as error:
                log.warning("put off: %s", error)
            except Exception:
                log.exception("put off")

    async def resync(self) -> None:
        """Queue every sandbox that the backend, the registry or the routes have; free places that nobody has.

        A place is a sandbox's entry in the store's counts, of its owner's and of all sandboxes (`session_names.py`).

        Raises:
            ConnectFailed: The backend or the store does not answer.
        """
        for sandbox_id in await self._all_ids():
            self.add(sandbox_id)
        runs = _runs_of(self.registry.living())
        self.runs.forget_but(runs)
        await self.runs.learn(runs)
        if self._parts.siblings.possible:
            await self.names.free_places()
            ready = [sandbox for sandbox in self.registry.living() if sandbox.state is State.READY]
            # the seed's control plane removes hashes that it does not know
            if aliases := {sandbox.id: sandbox.alias for sandbox in ready if sandbox.alias is not None}:
                await self._parts.store.restore_aliases(aliases)

    async def start(self) -> None:
        """Take over the sandboxes that earlier hives and other replicas made, and read why earlier ones ended.

        Raises:
            ConnectFailed: The backend does not answer.
        """
        for ended in await self._endings.load(self._parts.clock()):
            self.registry.add(ended)
        await self.settle(await self._all_ids())
        if self._parts.siblings.possible:
            with suppress(ConnectFailed):  # a store that is away gives no names either
                await self._hold_lacking()

    async def _hold_lacking(self) -> None:
        """Hold what a store that was emptied a moment ago lacks: this replica is about to give names."""
        places = await self._parts.store.places()
        lacking = [it for it in self.registry.living() if it.id not in places and not _is_ending(it)]
        for sandbox in lacking:
            sandbox.held_epoch = None
        await self.settle({sandbox.id for sandbox in lacking})

    async def _all_ids(self) -> set[SandboxId]:
        shown = {sandbox.id for sandbox in self.registry.all()}
        return shown | self._parts.routes.ids() | {instance.id for instance in await self._backend.list()}

    async def catch_up(self) -> None:
        """Learn which sandboxes other replicas made and ended until now; give up after `CATCH_UP_SECONDS`."""
        if not self._parts.siblings.possible:
            return
        with anyio.move_on_after(CATCH_UP_SECONDS):
            with suppress(ConnectFailed):
                await self._parts.routes.catch_up()
            ready = {sandbox.id for sandbox in self.registry.living() if sandbox.state is State.READY}
            if differing := self._parts.routes.ids() ^ ready:
                await self.settle(differing)

    def replica_left(self, replica: str) -> None:
        """Queue the sandboxes that a dead replica was starting or ending, and those that the seed's gateway reaches.

        The gateway reaches a sandbox with an alias at the replica that bound its route, which may be the dead one.
        """
        for sandbox in self.registry.all():
            ending = sandbox.record.ending
            is_its_work = replica in (sandbox.record.maker, ending.by if ending is not None else None)
            is_at_seed_gateway = sandbox.alias is not None and sandbox.state is State.READY
            if is_at_seed_gateway:
                sandbox.held_epoch = None  # so its turn binds its route again, with this replica's address
            if is_its_work or is_at_seed_gateway:
                self.add(sandbox.id)

    async def restore(self) -> None:
        """Put names and routes back into a store that lost what it held. Several replicas may do so at once.

        Raises:
            ConnectFailed: The store or the backend is away; the store's owner tries again.
            HiveFault: A turn failed for a defect of the hive's own; it tries again all the same.
        """
        self.store_epoch += 1
        self._restored_at = self._parts.clock()
        living = self.registry.living()
        stored = {SandboxId(record["sandbox_id"]) for record in await self._parts.store.routes()}
        await self.settle(stored | {sandbox.id for sandbox in living})
        lacking = [sandbox for sandbox in living if not (self._is_held(sandbox) or _is_ending(sandbox))]
        if lacking:
            defects = [defect for sandbox in lacking if (defect := self.defect_of(sandbox.id)) is not None]
            raise defects[0] if defects else ConnectFailed("the store could not be told of all sandboxes yet")

    def _is_held(self, sandbox: Sandbox) -> bool:
        """Return whether the store was told of a sandbox's names and route since it was last empty."""
        return sandbox.held_epoch == self.store_epoch

    async def report_calls(self) -> None:
        """Tell the store when sandboxes were last called through this replica."""
        if self._parts.store.unready() is not None:
            self._restored_at = self._parts.clock()
        if calls := self._parts.ledger.take_changed_last_calls():
            await self._parts.store.touch(calls)

    async def release_keys(self) -> None:
        """Free the idempotency keys of ended sandboxes, `CONCURRENT_STEPS` at a time, when the last replica stops."""

        async def release(sandbox: Sandbox) -> None:
            async with self._step_limiter:
                await self._release_key(sandbox)

        async with anyio.create_task_group() as group:
            for sandbox in self.registry.all():
                if sandbox.state.ended:
                    group.start_soon(release, sandbox)

    # -- changes that callers and starts ask for

    async def change(self, sandbox: Sandbox, change: Callable[[Record], Record]) -> None:
        """Change the record of a sandbox that is not ending, and its network with it, as one step for all replicas.

        Args:
            change: Given the newest record; what it raises is passed on, and nothing was changed.

        Raises:
            SandboxGone: It has ended, or is about to.
            ConnectFailed: The backend is away, or others change it all the time, and nothing was changed.
        """
        for tries in range(CHANGE_TRIES):
            instance = await self._backend.get(sandbox.id)
            if instance is None or sandbox.requested_end is not None:
                break
            if (record := _record_of(instance)) is None:
                raise ConnectFailed("a newer version of this hive has changed it; ask a replica of that version")
            sandbox.record = record
            if record.ending is not None or instance.phase is Phase.ENDED:
                break
            changed = change(record)
            with suppress(Conflict):
                await self._replace(sandbox.id, instance.revision, record, changed)
                sandbox.record = changed
                self.add(sandbox.id)
                return
            await anyio.sleep(CHANGE_PAUSE_SECONDS * 2**tries)
        else:
            raise ConnectFailed("other replicas change this sandbox all the time; try again in a moment")
        self.add(sandbox.id)
        raise sandbox.gone(self._parts.clock())

    async def _replace(self, sandbox_id: SandboxId, revision: int, before: Record, after: Record) -> None:
        if after.network == before.network:
            await self._backend.annotate(sandbox_id, after.to_json(), revision=revision)
        else:
            await self._backend.set_network(sandbox_id, after.network, after.to_json(), revision=revision)

    async def end(self, sandbox: Sandbox, reason: EndReason, message: str | None = None) -> None:
        """Record at the backend that a sandbox is to end, unless that is recorded already; turns do the rest.

        Raises:
            ConnectFailed: The backend is away, and nothing was recorded.
        """
        if sandbox.state.ended:
            return
        ending = self._ending(sandbox, reason, message)
        if await self._backend.get(sandbox.id) is None:  # not made yet, or gone already
            if sandbox.start is not None:
                sandbox.requested_end = sandbox.requested_end or ending
            self.add(sandbox.id)
            return
        with suppress(SandboxGone):
            await self.change(sandbox, lambda record: replace(record, ending=ending))
            self._note_end(sandbox, ending)

    def request_end(
        self, sandbox: Sandbox, reason: EndReason, message: str | None = None, cause: Cause | None = None
    ) -> None:
        """Note in memory that a sandbox is to end; a turn records it when the backend answers. Never fails.

        Args:
            cause: None: it follows from the reason and from what the backend saw.
        """
        if sandbox.requested_end is None:
            sandbox.requested_end = self._ending(sandbox, reason, message, cause)
        self.add(sandbox.id)

    def _ending(self, sandbox: Sandbox, reason: EndReason, message: str | None, cause: Cause | None = None) -> Ending:
        now = self._parts.clock()
        cause = cause or sandbox.cause_of(reason)
        return Ending(reason=reason, cause=cause, at=now, by=self._parts.siblings.id, message=message)

    # -- a turn

    async def _turn(self, sandbox_id: SandboxId) -> float:
        """Take steps until none is left; return in how many seconds to look again."""
        for _ in range(MOST_STEPS):
            async with self._step_limiter:
                with anyio.fail_after(STEP_SECONDS):
                    view = await self._look(sandbox_id)
                    decision = decide(view, self._parts.clock())
                    if decision.step is Step.NONE:
                        return decision.at - self._parts.clock()
                    if decision.step is not Step.DELETE:
                        await self._steps[decision.step](sandbox_id, decision)
                        continue
            async with self._delete_limiter:
                with anyio.fail_after(STEP_SECONDS):
                    await self._delete(sandbox_id, decision)
        return 0.1  # another replica changes it all the time

    async def _look(self, sandbox_id: SandboxId) -> View:
        while True:
            sandbox = self.registry.by_id(sandbox_id)
            # before the backend is asked: a start that ends meanwhile has made the instance that was not there yet
            is_starting = sandbox is not None and sandbox.start is not None
            instance = await self._backend.get(sandbox_id)
            if self.registry.by_id(sandbox_id) is sandbox:
                break  # else it was entered meanwhile, and its instance may be younger than the answer
        record = _record_of(instance) if instance is not None else None
        if sandbox is None and record is not None:
            is_held = await self._where(record.maker) is Where.ELSEWHERE  # its maker has told the store of it
            held_epoch = self.store_epoch if is_held else None
            sandbox = Sandbox(id=sandbox_id, record=record, state=State.STARTING, held_epoch=held_epoch)
            self.registry.add(sandbox)
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
            maker=await self._where(known.maker),
            ender=await self._where(known.ending.by) if known.ending is not None else Where.HERE,
            is_held=self._is_held(sandbox),
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

    async def _where(self, replica: str) -> Where:
        """Return whether a replica is this one, another that lives, or dead."""
        if replica == self._parts.siblings.id:
            return Where.HERE
        return Where.ELSEWHERE if await self._parts.siblings.is_other_alive(replica) else Where.DEAD

    def _sandbox(self, sandbox_id: SandboxId) -> Sandbox:
        sandbox = self.registry.by_id(sandbox_id)
        assert sandbox is not None, "a look at it has entered it"
        return sandbox

    # -- steps

    async def _unroute(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del decision
        await self._parts.routes.unbind(sandbox_id)

    async def _forget(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del decision
        sandbox = self._sandbox(sandbox_id)
        self.registry.remove(sandbox)
        self._endings.drop(sandbox_id)
        await self._release_key(sandbox)

    async def _cancel_start(self, sandbox_id: SandboxId, decision: Decision) -> None:
        sandbox = self._sandbox(sandbox_id)
        assert decision.reason is not None
        sandbox.requested_end = sandbox.requested_end or self._ending(sandbox, decision.reason, decision.message)
        if sandbox.start is not None:
            sandbox.start.cancel()

    async def _hold(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del decision
        sandbox = self._sandbox(sandbox_id)
        epoch = self.store_epoch
        if not self._is_held(sandbox):
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
            is_ours = await self._where(sandbox.record.maker) is not Where.ELSEWHERE
            if is_ours and not sandbox.is_unannounced:
                await self._parts.on_changed(sandbox.owner, sandbox.scope)
        finally:
            sandbox.settled.set()

    async def _learn_calls(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del sandbox_id, decision
        asked_at = self._parts.clock()
        self._parts.ledger.learn_last_calls(await self._parts.store.last_calls())
        self._calls_known_at = asked_at

    async def _learn_run(self, sandbox_id: SandboxId, decision: Decision) -> None:
        del decision
        await self.runs.learn(_runs_of([self._sandbox(sandbox_id)]))

    async def _record_end(self, sandbox_id: SandboxId, decision: Decision) -> None:
        assert decision.reason is not None
        sandbox = self._sandbox(sandbox_id)
        ending = self._ending(sandbox, decision.reason, decision.message)
        with suppress(Conflict):
            ended = replace(sandbox.record, ending=ending)
            await self._backend.annotate(sandbox_id, ended.to_json(), revision=sandbox.seen_revision)
            sandbox.record = ended
            self._note_end(sandbox, ending)

    def _note_end(self, sandbox: Sandbox, ending: Ending) -> None:
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
        if was_ready and (ending is None or await self._where(ending.by) is not Where.ELSEWHERE):
            await self._parts.on_changed(sandbox.owner, sandbox.scope)
        sandbox.is_withdrawn = True

    async def _delete(self, sandbox_id: SandboxId, decision: Decision) -> None:
        sandbox = self._sandbox(sandbox_id)
        if sandbox.reason is not None:  # the instance and its record are about to go
            await self._endings.keep(sandbox, self._parts.clock())
        is_graceful = sandbox.record.ready_at is not None and decision.reason is not EndReason.PROCESS_DIED
        await self._backend.delete(sandbox_id, grace_seconds=DELETE_GRACE_SECONDS if is_graceful else 0.0)

    async def _bury(self, sandbox_id: SandboxId, decision: Decision) -> None:
        assert decision.reason is not None
        sandbox = self._sandbox(sandbox_id)
        if not sandbox.is_withdrawn:
            await self._close(sandbox, decision.reason, decision.message)
        await self._parts.store.release_session(sandbox.owner, sandbox.scope, sandbox.session, sandbox.id)
        if sandbox.record.ready_at is None or decision.reason is EndReason.START_FAILED:
            await self._release_key(sandbox)  # a spawn that failed may be tried again with its key
        self._parts.ledger.forget(sandbox.id)
        sandbox.bury(decision.reason, decision.message, self._parts.clock())
        sandbox.toolset = None  # nobody lists it any more
        self.registry.note_ended(sandbox)
        self._forget_surplus()
        await self._endings.keep(sandbox, self._parts.clock())
        ending = sandbox.record.ending
        if ending is None and sandbox.requested_end is None:  # no replica decided it, so none has audited it
            self._note_end(sandbox, self._ending(sandbox, decision.reason, decision.message))
        if ending is None or ending.by == self._parts.siblings.id:
            why = decision.reason.value + (f" ({decision.message})" if decision.message else "")
            log.info("ended", extra={"sandbox": sandbox.id, "session": sandbox.session, "why": why})

    def _forget_surplus(self) -> None:
        """Have turns forget the ended sandboxes over `MOST_ENDED`, except where an instance may still appear.

        A start that broke off may make its instance until `start_by`; it is deleted because its end is remembered.
        """
        for sandbox in self.registry.surplus(MOST_ENDED):
            may_appear = sandbox.record.ready_at is None and self._parts.clock() < sandbox.record.start_by < math.inf
            if not may_appear and not sandbox.is_surplus:
                sandbox.is_surplus = True
                self.add(sandbox.id)

    async def _release_key(self, sandbox: Sandbox) -> None:
        if sandbox.key is not None:
            await self._parts.store.release_key(sandbox.owner, sandbox.scope, sandbox.key, sandbox.id)


def _endings_of(parts: Parts) -> Endings:
    seconds = parts.settings.ended_retention_seconds
    # the store of a hive that is one process ends with it
    files = None if parts.siblings.possible else FileEndings(parts.settings.state_dir / "ended", seconds)
    return Endings(parts.store, seconds, files)


def _end_of_buried(sandbox: Sandbox) -> Ending | None:
    """Return the end of a buried sandbox as a request, so that an instance of it that appears again ends, too."""
    if sandbox.ended_at is None or sandbox.reason is None or sandbox.cause is None:
        return None
    by, message = sandbox.record.maker, sandbox.message
    return Ending(reason=sandbox.reason, cause=sandbox.cause, at=sandbox.ended_at, by=by, message=message)


def _is_ending(sandbox: Sandbox) -> bool:
    is_wanted = sandbox.requested_end is None and sandbox.record.ending is None
    return sandbox.state.ended or sandbox.state is State.STOPPING or not is_wanted


def _runs_of(sandboxes: Iterable[Sandbox]) -> list[Run]:
    return list({run.id: run for it in sandboxes if (run := it.record.run) is not None}.values())


def _record_of(instance: Instance) -> Record | None:
    try:
        return Record.from_json(instance.record)
    except UnreadableRecord:
        return None
