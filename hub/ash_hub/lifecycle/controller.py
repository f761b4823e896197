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
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Final

import anyio

from ash_hub.backends.base import BackendEvent, Instance, Phase
from ash_hub.lifecycle.decide import Step, decide
from ash_hub.lifecycle.endings import Endings, FileEndings
from ash_hub.lifecycle.keyed_queue import KeyedQueue
from ash_hub.lifecycle.observer import REPORT_SECONDS, Observer, record_of, runs_of
from ash_hub.lifecycle.parts import Parts
from ash_hub.lifecycle.record import Record, UnreadableRecord
from ash_hub.lifecycle.registry import Registry
from ash_hub.lifecycle.runs import RUN_NEWS
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.session_names import Names
from ash_hub.lifecycle.steps import Steps
from ash_mcp.errors import AshError, Conflict, ConnectFailed, HiveFault, SandboxGone
from ash_mcp.types import Cause, EndReason, SandboxId, State
from ash_router.store.base import LOST

__all__ = ["REPORT_SECONDS", "Controller"]

log = logging.getLogger("ash.hub")

CONCURRENT_STEPS: Final = 32
"""How many steps other than deletes run at once."""
CONCURRENT_DELETES: Final = 256
"""Deletes wait for the processes of sandboxes, so they are bounded by themselves and hold up no other step."""
MOST_STEPS: Final = 20
"""How many steps one turn may take; a healthy end takes four."""
STEP_SECONDS: Final = 5.0
RESYNC_SECONDS: Final = 30.0
"""How often every sandbox is looked at although nothing happened."""
CATCH_UP_SECONDS: Final = 0.5
"""How long a request waits for news of other replicas."""
CHANGE_TRIES: Final = 10
CHANGE_PAUSE_SECONDS: Final = 0.01
"""Doubled after each try. A backend may answer from a cache that has another replica's write only with its event."""
FOLLOW_AGAIN_SECONDS: Final = 1.0


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
        self._observer = Observer(parts, self.registry, self._endings)
        self._steps = Steps(parts, self.registry, self._endings, self._observer, self.add)
        self.runs = self._observer.runs

    @property
    def store_epoch(self) -> int:
        """Grows when the store has lost what it held."""
        return self._observer.store_epoch

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
                    await self.runs.learn(runs_of(concerned))
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
        runs = runs_of(self.registry.living())
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
        self._observer.note_loss()
        living = self.registry.living()
        stored = {SandboxId(record["sandbox_id"]) for record in await self._parts.store.routes()}
        await self.settle(stored | {sandbox.id for sandbox in living})
        lacking = [sandbox for sandbox in living if not (self._observer.is_held(sandbox) or _is_ending(sandbox))]
        if lacking:
            defects = [defect for sandbox in lacking if (defect := self.defect_of(sandbox.id)) is not None]
            raise defects[0] if defects else ConnectFailed("the store could not be told of all sandboxes yet")

    async def report_calls(self) -> None:
        """Tell the store when sandboxes were last called through this replica."""
        if self._parts.store.unready() is not None:
            self._observer.note_outage()
        if calls := self._parts.ledger.take_changed_last_calls():
            await self._parts.store.touch(calls)

    async def release_keys(self) -> None:
        """Free the idempotency keys of ended sandboxes, `CONCURRENT_STEPS` at a time, when the last replica stops."""

        async def release(sandbox: Sandbox) -> None:
            async with self._step_limiter:
                await self._steps.release_key(sandbox)

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
            if (record := record_of(instance)) is None:
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
        ending = self._steps.ending(sandbox, reason, message)
        if await self._backend.get(sandbox.id) is None:  # not made yet, or gone already
            if sandbox.start is not None:
                sandbox.requested_end = sandbox.requested_end or ending
            self.add(sandbox.id)
            return
        with suppress(SandboxGone):
            await self.change(sandbox, lambda record: replace(record, ending=ending))
            self._steps.note_end(sandbox, ending)

    def request_end(
        self, sandbox: Sandbox, reason: EndReason, message: str | None = None, cause: Cause | None = None
    ) -> None:
        """Note in memory that a sandbox is to end; a turn records it when the backend answers. Never fails.

        Args:
            cause: None: it follows from the reason and from what the backend saw.
        """
        if sandbox.requested_end is None:
            sandbox.requested_end = self._steps.ending(sandbox, reason, message, cause)
        self.add(sandbox.id)

    # -- a turn

    async def _turn(self, sandbox_id: SandboxId) -> float:
        """Take steps until none is left; return in how many seconds to look again."""
        for _ in range(MOST_STEPS):
            async with self._step_limiter:
                with anyio.fail_after(STEP_SECONDS):
                    decision = decide(await self._observer.look(sandbox_id), self._parts.clock())
                    if decision.step is Step.NONE:
                        return decision.at - self._parts.clock()
                    if decision.step is not Step.DELETE:
                        await self._steps.take(sandbox_id, decision)
                        continue
            async with self._delete_limiter:
                with anyio.fail_after(STEP_SECONDS):
                    await self._steps.take(sandbox_id, decision)
        return 0.1  # another replica changes it all the time


def _endings_of(parts: Parts) -> Endings:
    seconds = parts.settings.ended_retention_seconds
    # the store of a hive that is one process ends with it
    files = None if parts.siblings.possible else FileEndings(parts.settings.state_dir / "ended", seconds)
    return Endings(parts.store, seconds, files)


def _is_ending(sandbox: Sandbox) -> bool:
    is_wanted = sandbox.requested_end is None and sandbox.record.ending is None
    return sandbox.state.ended or sandbox.state is State.STOPPING or not is_wanted
