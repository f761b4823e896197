"""The local backend: has the keeper process start and end sandboxes, and follows the keeper's events."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread

from ash_hub.backends._broadcast import Broadcast
from ash_hub.backends.base import BackendEvent, Exit, Instance, Phase, Snapshot, SnapshotOrder
from ash_hub.backends.local import host
from ash_hub.backends.local.document_files import FileDocuments
from ash_hub.backends.local.forks import ForkOrders, why_not_forked
from ash_hub.backends.local.image_plans import ImagePlans
from ash_hub.backends.local.keeper.launchers import Plan
from ash_hub.backends.local.keeper.used_directories import hold, remove_unused
from ash_hub.backends.local.limits import Enforcement, Limits, limits_of
from ash_hub.backends.local.link import (
    ANSWER_SECONDS,
    SILENT,
    WAITED_SECONDS,
    KeeperConnectionLost,
    KeeperCrowded,
    KeeperEnding,
    KeeperLink,
    KeeperRefusal,
    KeeperSilent,
)
from ash_hub.backends.local.local_images import LocalImages, unsupported
from ash_hub.backends.local.machine import SHOWN, Machine, MachinePlans
from ash_hub.backends.local.machine_base import base_entries, make_base
from ash_hub.backends.local.ordinary import OrdinaryMachine, OrdinaryPlans, name_of_copy
from ash_hub.backends.local.ordinary_host import find_ordinary, system_directory
from ash_hub.backends.local.own_system import SystemProblem, make_copy
from ash_hub.backends.local.paths import HivePaths, hive_paths
from ash_hub.backends.local.plans import IsolatedPlans, Plans, UnsafePlans
from ash_hub.backends.local.runtime import Runtime, compile_runner, find_runtime, without_system
from ash_hub.backends.local.settings import LocalSettings
from ash_hub.backends.local.snapshot_requests import SnapshotRequests, unknown_snapshot
from ash_hub.backends.local.starter import start_keeper
from ash_hub.backends.network import audit_decision, require_network
from ash_mcp.errors import AshError, CapacityExceeded, ConfigError, Conflict, ConnectFailed, StartFailed, Unsupported
from ash_mcp.types import Cause, Endpoint, Resources, SandboxId, SandboxSpec, SnapshotId
from ash_router.store.clock import lead, steady

__all__ = ["KEEPER_DIED", "LocalBackend"]

_AWAY = (KeeperConnectionLost, KeeperSilent)
KEEPER_DIED = Exit("the keeper died, and its sandboxes with it", Cause.HOST)
_DELETED = Exit("deleted", Cause.HIVE)
_CONNECT_SECONDS = 20.0
_RETRY_SECONDS = 0.02
_REJOIN_SECONDS = 0.5
_LONGEST_REJOIN_SECONDS = 5.0
_CLEAN_UP_SECONDS = 10.0
_ENDING_SECONDS = 10.0
"""The time, after the grace, in which the keeper removes all of a sandbox."""
_LOG_LINES = 20
_SPARE_BASES, _FRESH_SECONDS = 3, 60.0
"""Of what machines begin as: how many that nobody uses stay, and how old one is that nobody is making any more."""
_PARENT_SECONDS = 60.0
"""What a sandbox that can only be forked waits for its parent to be ready."""
_NO_WAY_OUT = (
    "this sandbox was started with network none, so it has no way out that could be opened; spawn another with the "
    "network that it needs"
)
_log = logging.getLogger("ash.hub")


class LocalBackend:
    """The local backend. Entering it adopts the sandboxes of a keeper that still runs."""

    kind = "local"

    def __init__(
        self,
        settings: LocalSettings,
        *,
        runtime: Runtime | None = None,
        hive_ports: Sequence[int] = (),
        shared: str | None = None,
        keep: bool = True,
    ) -> None:
        """Make the backend; nothing is started before it is entered.

        Args:
            settings: Directories and limits.
            runtime: The main process of sandboxes; None: the runner that is installed with the hub.
            hive_ports: Ports of the hive, which no network policy lets a sandbox reach.
            shared: A text that is the same for all replicas of one hive, which share a keeper; None: there is one.
            keep: Whether sandboxes wait for the next hive without a time limit when the last hub leaves; if not, they
                wait for `grace_seconds`.
        """
        self._settings = settings
        self._hive_ports = hive_ports
        self._shared = shared
        self._keep = keep
        self._given_runtime = runtime
        self._events = Broadcast()
        self._instances: dict[SandboxId, Instance] = {}
        self._ended_early: dict[SandboxId, Instance | None] = {}
        """Sandboxes whose `start` request is open. The value is their end, if that event came before the answer."""
        self._forked: dict[str, str | None] = {}
        """Recipes whose sandboxes are forked, or why they are not."""
        self._link: KeeperLink | None = None
        self._linking = anyio.Lock()
        self._keeper: int | None = None
        """The process id of the keeper that `_instances` belong to."""
        self._join_problem: str | None = None
        """Why the keeper cannot be joined although its process may live; its sandboxes count as running meanwhile."""
        self._unfinished_deletes: set[SandboxId] = set()
        """Sandboxes to delete as soon as the keeper can be joined again."""
        self._ordinary: OrdinaryMachine | None = None
        """What machines are made of where an ordinary user runs the hive."""
        self._copied = anyio.Event()
        self._base: int | None = None
        """A descriptor that keeps what machines begin as from being removed."""
        self._is_closing = False
        self._lead = lead()
        """Seconds that `now` is ahead of the steady clock; the keeper's own value once one is joined."""
        self.documents = FileDocuments(settings.state_dir, self.now)
        self._no_snapshots: str | None = None
        self._images = LocalImages(settings)
        restart_seconds = settings.start_timeout_seconds + _ENDING_SECONDS + ANSWER_SECONDS
        self._snapshots = SnapshotRequests(self._link_or_fail, restart_seconds)

    async def __aenter__(self) -> Self:
        self._paths: HivePaths = hive_paths(self._settings)
        self._runtime = self._given_runtime or find_runtime()
        await anyio.to_thread.run_sync(compile_runner, self._runtime)
        self._facts = await anyio.to_thread.run_sync(host.host_facts)
        if not self._settings.unsafe:
            await self._require_isolation()
        self._machine, self._no_machine = await anyio.to_thread.run_sync(self._find_machine)
        self._orders = ForkOrders(self._runtime, self._settings)
        self._tasks = await anyio.create_task_group().__aenter__()
        try:
            await self._join_or_start()
            if self._ordinary is not None and self._machine is None:
                self._tasks.start_soon(self._copy_system, self._ordinary)
            else:
                self._copied.set()
        except KeeperSilent as silent:
            await self._end_tasks()
            raise ConfigError(
                "the keeper of this state directory does not answer: it is stopped or hangs. Let it go on (kill -CONT)"
                f", or end it with its sandboxes (kill -KILL); {self._paths.lock_file} names its process"
            ) from silent
        except BaseException:
            await self._end_tasks()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._is_closing = True
        with (
            anyio.move_on_after(_CLEAN_UP_SECONDS, shield=True),
            contextlib.suppress(KeeperConnectionLost, KeeperSilent, ConfigError),
        ):
            # A dead keeper may have left sockets and control groups; a new one clears them away as it starts and ends.
            link = await self._join_or_start()
            if not (await link.request("leave", keep=self._keep))["stays"]:
                await link.closed.wait()
        self._events.close()
        await self._end_tasks()

    async def _end_tasks(self) -> None:
        # Not given the exception in flight: a task group would wrap it into an exception group.
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)
        base, self._base = self._base, None
        if base is not None:
            os.close(base)
        self._images.close()

    async def _require_isolation(self) -> None:
        """Refuse to run without isolation, saying what to install."""
        checks = await anyio.to_thread.run_sync(host.required_checks, self._facts)
        missing = [check for check in checks if not check.ok]
        if missing:
            found = "; ".join(f"{check.name}: {check.detail} - {check.fix}" for check in missing)
            raise ConfigError(f"sandboxes cannot be isolated on this host. {found}")

    def _find_machine(self) -> tuple[Machine | None, str | None]:
        """Return what machines are made of, or why sandboxes are none although the settings want them to be."""
        settings = self._settings
        if settings.unsafe or not settings.machine:
            return None, None
        if os.geteuid() != 0:
            return self._find_ordinary()
        bases = settings.state_dir / "bases"
        shown = tuple(path for path in SHOWN if os.path.isdir(path) and not os.path.islink(path))
        try:
            base = make_base(bases, self._facts.links, shown)
            self._base = hold(str(base))
            remove_unused(bases, base.name, spare=_SPARE_BASES, fresh_seconds=_FRESH_SECONDS)
        except OSError as error:
            return None, f"what machines begin as cannot be made in {bases}: {error.strerror}"
        if (why := host.machine_problem(self._facts, base, settings.first_user, shown)) is not None:
            return None, why
        if (
            problem := host.user_block_problem(settings.first_user, settings.users, settings.max_sandboxes)
        ) is not None:
            if settings.model_fields_set.isdisjoint(("first_user", "users")):
                return None, problem  # of a block that nobody chose
            raise ConfigError(problem)
        self._runtime = without_system(self._runtime)
        self._no_snapshots = host.snapshot_problem(settings.first_user)
        block, can = (settings.first_user, settings.users), self._no_snapshots is None
        return Machine(base=str(base), user_block=block, shown=shown, snapshots=can), None

    def _find_ordinary(self) -> tuple[Machine | None, str | None]:
        """Do the same for an ordinary user, whose machines begin as a copy of the system that may not be there yet."""
        if self._settings.launcher == "fork":
            return None, "the launcher is fork, and an ordinary user's machines are started by bubblewrap: choose auto"
        found = find_ordinary(self._facts, self._settings.max_sandboxes)
        if isinstance(found, str):
            return None, found
        self._ordinary = found
        name = name_of_copy(base_entries(self._facts.links), found.users, self._settings.system_without)
        copy = system_directory(self._settings) / name
        with contextlib.suppress(OSError):
            return self._begin_as(copy, found), None
        return None, f"what machines begin as, a copy of the host's system, is just being made in {copy.parent}"

    def _begin_as(self, copy: Path, ordinary: OrdinaryMachine) -> Machine:
        self._base = hold(str(copy))
        self._runtime = without_system(self._runtime)
        self._no_snapshots = "snapshots are made for hives that root runs: only root maps their files' owners"
        return Machine(base=str(copy), user_block=ordinary.block)

    async def _copy_system(self, ordinary: OrdinaryMachine) -> None:
        """Have the system copied; sandboxes that are spawned from then on are machines."""
        place, without = system_directory(self._settings), self._settings.system_without
        try:
            entries = await anyio.to_thread.run_sync(base_entries, self._facts.links)
            name = name_of_copy(entries, ordinary.users, without)
            copy = await make_copy(place, name, ordinary.users, entries, without, self._settings.system_bytes)
            self._machine, self._no_machine = self._begin_as(copy, ordinary), None
            _log.info("sandboxes are machines from here on, with a root of their own")
        except (SystemProblem, OSError) as problem:
            self._no_machine = str(problem)
            _log.warning("sandboxes have a read-only system: %s", problem)
        self._plans = self._isolated_plans()
        self._copied.set()

    async def machine_known(self) -> None:
        """Return when it is known whether sandboxes are machines: no copy of the system is being made."""
        await self._copied.wait()

    def _isolated_plans(self) -> IsolatedPlans:
        if self._machine is None:
            return IsolatedPlans(self._facts, self._enforcement, self._paths.directory, self._no_machine)
        if self._ordinary is not None:
            base = self._machine.base
            return OrdinaryPlans(self._facts, self._enforcement, self._paths.directory, base, self._ordinary)
        return MachinePlans(self._facts, self._enforcement, self._paths.directory, self._machine)

    async def create(self, spec: SandboxSpec) -> Instance:
        """Start a sandbox and return it once its main process runs."""
        _require_supported(spec)
        require_network(spec.network, private=self._settings.private_egress)
        link = await self._link_or_fail()
        limits = limits_of(spec, self._settings, machine=self._machine is not None)
        made = await self._image_plan(spec, limits) if spec.image else self._plans.plan(spec, self._runtime, limits)
        plan = replace(made, network=self._network(spec))
        warnings = list(self._plans.warnings)
        launcher, more_seconds = await self._launcher(link, spec, plan), 0.0
        if launcher.get("otherwise", launcher) is None:
            more_seconds = _PARENT_SECONDS
        self._ended_early[spec.id] = None
        try:
            view = await link.request(
                "start",
                id=spec.id,
                labels=dict(spec.labels),
                record=dict(spec.record),
                warnings=warnings,
                launcher=launcher,
                plan=plan.to_json(),
                snapshot=spec.snapshot,
                timeout=self._settings.start_timeout_seconds,
                seconds=self._settings.start_timeout_seconds + _ENDING_SECONDS + ANSWER_SECONDS + more_seconds,
            )
        except KeeperRefusal as refusal:
            raise _translated(refusal, spec) from refusal
        except KeeperConnectionLost as gone:
            raise StartFailed(f"the sandbox could not start: {KEEPER_DIED.message}", step="keeper") from gone
        except KeeperSilent as silent:
            self._unfinished_deletes.add(spec.id)  # the keeper may still start it when it goes on
            raise StartFailed(f"the sandbox could not start: {silent}", step="keeper") from silent
        except anyio.get_cancelled_exc_class():
            self._unfinished_deletes.add(spec.id)
            with anyio.move_on_after(_CLEAN_UP_SECONDS, shield=True), contextlib.suppress(*_AWAY, KeeperRefusal):
                await link.request("stop", id=spec.id, grace_seconds=0.0)
                self._unfinished_deletes.discard(spec.id)
            raise
        finally:
            end = self._ended_early.pop(spec.id)
        instance = self._record(self._instance(view))
        if end is None and link.closed.is_set():
            await self._rejoin()
            return self._instances.get(spec.id) or _ended(instance, _DELETED)
        return instance if end is None else self._record(end)

    async def _image_plan(self, spec: SandboxSpec, limits: Limits) -> Plan:
        """Return the plan of a sandbox from an image.

        Raises:
            Unsupported: There can be none on this host.
            ConfigError, StartFailed: The image is not here; the bundle cannot be built.
        """
        assert spec.image is not None
        if (why := self.no_images()) is not None or self._machine is None:
            raise unsupported(spec.image, why or "it has no machines")
        root, runtime = await self._images.find(spec.image), await self._images.runtime()
        plans = ImagePlans(self._facts, self._enforcement, self._paths.directory, self._machine, root)
        return plans.plan(spec, runtime, limits)

    def no_images(self) -> str | None:
        """Return why no sandbox can be started from an image; None if they can."""
        if self._settings.unsafe:
            return "it runs without isolation (--unsafe)"
        if os.geteuid() != 0:
            return "an ordinary user runs it, who cannot show an image's owners as a sandbox's own; run it as root"
        if self._machine is None:
            return self._no_machine or "its settings want none (ASH_HUB_BACKEND__MACHINE)"
        return None

    async def warm(self, spec: SandboxSpec) -> None:
        with contextlib.suppress(AshError, *_AWAY, KeeperRefusal):
            limits = limits_of(spec, self._settings, machine=self._machine is not None)
            plan = self._plans.plan(spec, self._runtime, limits)
            await self._launcher(await self._link_or_fail(), spec, plan)

    async def _launcher(self, link: KeeperLink, spec: SandboxSpec, plan: Plan) -> Mapping[str, Any]:
        """Return the launcher for a sandbox, and have the keeper keep its parent ready if it is to be forked."""
        other = self._plans.launcher
        if self._settings.unsafe or self._settings.launcher == "bubblewrap" or why_not_forked(spec, self._runtime):
            return other
        if self._ordinary is not None and self._machine is not None:
            return other  # what is forked by an ordinary user has its one user
        usual = limits_of(replace(spec, resources=Resources()), self._settings)  # whatever this one asks for
        order = await self._orders.of(spec, plan, usual, self._enforcement)
        if self._orders.is_due(order, link.hello["pid"]):
            try:
                await link.request("prepare", order=order)
            except _AWAY:
                return other  # the start itself will tell
        otherwise = other if self._settings.launcher == "auto" else None
        return {"kind": "fork", "key": order["key"], "is_loaded": True, "otherwise": otherwise}

    async def get(self, sandbox_id: SandboxId) -> Instance | None:
        if sandbox_id not in self._instances:
            # of one alone: a hive asks so for each that starts, and a list of all others each time is quadratic
            await self._ask_for(self._enter, ids=[sandbox_id])
        return self._instances.get(sandbox_id)

    async def list(self) -> list[Instance]:
        await self._ask_for(self._reconcile)
        return list(self._instances.values())

    async def _ask_for(self, apply: Callable[[Sequence[Mapping[str, Any]]], None], **which: Any) -> None:
        """Ask the keeper for sandboxes: events about those of other hubs may still be on their way."""
        if self._link is None:
            await self._rejoin()
            return
        try:
            await self._link.request("list", apply=lambda answer: apply(answer["sandboxes"]), **which)
        except KeeperConnectionLost:
            await self._rejoin()
        except (KeeperSilent, KeeperRefusal) as error:
            raise ConnectFailed(f"the sandboxes of this host cannot be listed now: {error}") from error

    def _enter(self, views: Sequence[Mapping[str, Any]]) -> None:
        for view in views:
            if view["id"] not in self._ended_early:
                self._record(self._instance(view))

    def _reconcile(self, views: Sequence[Mapping[str, Any]], how: Exit = _DELETED) -> None:
        """Make `_instances` equal to the keeper's list; whatever it lacks has ended, as `how` says."""
        self._enter(views)
        for missing in self._instances.keys() - {view["id"] for view in views}:
            if self._instances[missing].phase is Phase.ENDED:
                continue  # it ended with an earlier keeper
            if how == KEEPER_DIED:
                self._record(_ended(self._instances[missing], how))
            else:
                self._record_removal(self._instances[missing])

    async def annotate(self, sandbox_id: SandboxId, record: Mapping[str, Any], *, revision: int) -> None:
        known = self._instances.get(sandbox_id)
        if known is not None and known.exit == KEEPER_DIED and known.revision == revision:
            # the record that others share has ended with the keeper; what this hub knows is all that there is
            self._record(replace(known, record=dict(record), revision=revision + 1))
            return
        await self._change("annotate", sandbox_id, record, revision)

    async def set_network(
        self, sandbox_id: SandboxId, network: str | tuple[str, ...], record: Mapping[str, Any], *, revision: int
    ) -> None:
        if self._settings.unsafe:
            raise Unsupported("this hive runs without isolation (--unsafe), where no network policy holds")
        require_network(network, private=self._settings.private_egress)
        await self._change("set_network", sandbox_id, record, revision, policy=network)

    async def _change(
        self, operation: str, sandbox_id: SandboxId, record: Mapping[str, Any], revision: int, **fields: Any
    ) -> None:
        """Have the keeper replace a record, and do what goes with it."""
        until = steady() + WAITED_SECONDS
        try:
            reached = await self._request_repeatable(
                operation, id=sandbox_id, record=dict(record), revision=revision, until=until, **fields
            )
        except KeeperRefusal as refusal:
            if refusal.kind == "no_way_out":
                raise Unsupported(_NO_WAY_OUT) from refusal
            if refusal.kind == "changed":
                await self.list()  # the revision known here was outdated
                raise Conflict(str(refusal)) from refusal
            raise ConnectFailed(f"sandbox {sandbox_id} cannot be changed now: {refusal}") from refusal
        except KeeperSilent as silent:
            raise ConnectFailed(f"sandbox {sandbox_id} cannot be changed now: {silent}") from silent
        if not reached:
            raise ConnectFailed(f"sandbox {sandbox_id} cannot be changed now: the keeper cannot be reached")
        if (known := self._instances.get(sandbox_id)) is not None and known.revision <= revision:
            self._record(replace(known, record=dict(record), revision=revision + 1))

    async def delete(self, sandbox_id: SandboxId, *, grace_seconds: float = 2.0) -> None:
        bound = grace_seconds + _ENDING_SECONDS + ANSWER_SECONDS
        try:
            reached = await self._request_repeatable("stop", id=sandbox_id, grace_seconds=grace_seconds, seconds=bound)
        except KeeperSilent:
            self._unfinished_deletes.add(sandbox_id)
            return
        except KeeperRefusal as refusal:
            raise ConnectFailed(f"sandbox {sandbox_id} cannot be ended now: {refusal}") from refusal
        if not reached:
            if self._join_problem is not None:
                self._unfinished_deletes.add(sandbox_id)
                return
            with contextlib.suppress(KeeperConnectionLost):
                await self._join_or_start()  # a new keeper clears away what the dead one left
        if instance := self._instances.get(sandbox_id):
            self._record_removal(instance)

    def no_snapshots(self) -> str | None:
        if self._machine is None:
            why = self._no_machine or "the settings make no sandbox a machine (ASH_HUB_BACKEND__MACHINE)"
            return f"only ordinary machines have snapshots (docs/machine.md): {why}"
        return self._no_snapshots

    async def freeze(self, sandbox_id: SandboxId, order: SnapshotOrder) -> Snapshot:
        return await self._snapshots.freeze(sandbox_id, order)

    async def reset(self, sandbox_id: SandboxId, snapshot_id: SnapshotId) -> None:
        await self._snapshots.reset(sandbox_id, snapshot_id)

    async def snapshots(self) -> Sequence[Snapshot]:
        return await self._snapshots.list()

    async def drop_snapshot(self, snapshot_id: SnapshotId) -> None:
        await self._snapshots.drop(snapshot_id)

    async def logs(self, sandbox_id: SandboxId, *, tail_bytes: int = 65_536) -> bytes:
        if self._link is None:
            return b""
        try:
            answer = await self._link.request("logs", id=sandbox_id, tail_bytes=tail_bytes)
        except KeeperConnectionLost:
            return b""
        except (KeeperSilent, KeeperRefusal) as error:
            raise ConnectFailed(f"the log of sandbox {sandbox_id} cannot be read now: {error}") from error
        return base64.b64decode(answer["data"])

    async def _request_repeatable(self, operation: str, **fields: Any) -> bool:
        """Send a request that is safe to do twice; repeat it if the connection breaks but the keeper lives.

        Returns:
            Whether it was done; False if there is no keeper, or it cannot be joined.

        Raises:
            KeeperSilent: The keeper does not answer; it may still carry the request out.
            KeeperRefusal: The keeper could not carry it out.
        """
        while True:
            if self._link is None:
                await self._rejoin()
            link = self._link
            if link is None:
                return False
            try:
                await link.request(operation, **fields)
            except KeeperConnectionLost:
                await link.closed.wait()
            else:
                return True

    def watch(self) -> AsyncIterator[BackendEvent]:
        return self._events.watch()

    def now(self) -> float:
        return self._lead + steady()

    def unready(self) -> str | None:
        return SILENT if self._link is not None and self._link.is_silent else self._join_problem

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": self.kind,
            "launcher": "none" if self._settings.unsafe else self._settings.launcher,
            "forked": dict(self._forked),
            "keeper": None if self._link is None else self._link.hello["pid"],
            "control_groups": self._enforcement.version,
            "machine": self._machine is not None,
            "snapshots": self.no_snapshots() is None,
            "images": self.no_images() is None,
            # A sandbox can read in its own mount table where on the host these lie; the last, if it may go out.
            "visible_paths": [] if self._settings.unsafe else self._visible_paths(),
            "warnings": list(self._plans.warnings),
        }

    def _visible_paths(self) -> list[str]:
        own = [] if self._facts.overlays else sorted(self._runtime.binds.values())
        return [*own, str(self._paths.directory)]

    async def _link_or_fail(self) -> KeeperLink:
        if self.unready() == SILENT:
            raise StartFailed(f"the sandbox could not start: {SILENT}", step="keeper")
        try:
            return await self._join_or_start()
        except KeeperSilent as silent:
            raise StartFailed(f"the sandbox could not start: {silent}", step="keeper") from silent
        except KeeperConnectionLost as gone:
            raise StartFailed("the keeper cannot be reached", step="keeper") from gone
        except KeeperCrowded as crowded:
            raise CapacityExceeded(str(crowded), retry_after_seconds=_LONGEST_REJOIN_SECONDS) from crowded

    async def _join_or_start(self) -> KeeperLink:
        """Return the connection to the keeper; start a keeper if none runs."""
        async with self._linking:
            if self._link is not None:
                return self._link
            deadline = anyio.current_time() + _CONNECT_SECONDS
            while True:
                silent: KeeperSilent | None = None
                try:
                    return self._adopt_keeper(
                        await KeeperLink.open(self._paths.control, self._hive_ports, self._shared)
                    )
                except KeeperSilent as error:
                    silent = error
                except (OSError, KeeperEnding, KeeperConnectionLost):
                    pass
                started = await anyio.to_thread.run_sync(start_keeper, self._settings, self._paths, self._lead)
                if not started and anyio.current_time() > deadline:
                    if silent is not None:
                        raise silent
                    raise ConfigError(_locked_elsewhere(self._paths))
                await anyio.sleep(0 if started else _RETRY_SECONDS)

    def _adopt_keeper(self, link: KeeperLink) -> KeeperLink:
        """Take over the sandboxes, limits and clock of the keeper that was just joined, and follow its events."""
        groups = link.hello["cgroups"]
        self._enforcement = Enforcement(
            version=groups["version"],
            controllers=frozenset(groups["controllers"]),
            namespaced_processes=host.namespaced_processes(),
        )
        self._plans: Plans = (
            UnsafePlans(replace(self._enforcement, namespaced_processes=False), self._paths.directory)
            if self._settings.unsafe
            else self._isolated_plans()
        )
        is_same = self._keeper == link.hello["pid"]
        self._keeper, self._link, self._lead = link.hello["pid"], link, link.hello["lead"]
        self._reconcile(link.hello["sandboxes"], _DELETED if is_same else KEEPER_DIED)
        self._join_problem = None
        self._tasks.start_soon(self._follow, link)
        link.on_answering = self._on_keeper_answering
        self._retry_deletes()
        return link

    def _on_keeper_answering(self) -> None:
        _log.warning("the keeper answers again")
        self._retry_deletes()

    def _retry_deletes(self) -> None:
        """Delete what could not be deleted while the keeper was away."""
        while self._unfinished_deletes:
            self._tasks.start_soon(self._retry_delete, self._unfinished_deletes.pop())

    async def _retry_delete(self, sandbox_id: SandboxId) -> None:
        try:
            await self.delete(sandbox_id)
        except AshError as error:
            self._unfinished_deletes.add(sandbox_id)
            _log.warning("%s; it is tried again when the keeper is joined again", error)

    async def _follow(self, link: KeeperLink) -> None:
        try:
            await link.run(self._on_keeper_event)
        finally:
            self._link = None
            await link.aclose()
        await self._rejoin()
        pause = _REJOIN_SECONDS
        # another replica of the hive may start the next keeper
        while self._link is None and (self._join_problem is not None or self._shared is not None):
            await anyio.sleep(pause)
            pause = _REJOIN_SECONDS if self._join_problem is None else min(2 * pause, _LONGEST_REJOIN_SECONDS)
            await self._rejoin()

    async def _rejoin(self) -> None:
        """Join the keeper again after a lost connection; if it is dead, all its sandboxes have ended with it."""
        async with self._linking:
            if self._link is None and not self._is_closing and await self._join_or_find_dead():
                self._reconcile([], KEEPER_DIED)

    async def _join_or_find_dead(self) -> bool:
        """Join the keeper, or return True if it is surely dead. A lost connection alone does not prove that."""
        deadline, before = anyio.current_time() + _CONNECT_SECONDS, self._keeper
        while anyio.current_time() < deadline:
            try:
                self._adopt_keeper(await KeeperLink.open(self._paths.control, self._hive_ports, self._shared))
            except KeeperCrowded as crowded:
                self._report_join_problem(str(crowded))
                return False
            except (FileNotFoundError, ConnectionRefusedError, KeeperEnding, ConfigError):
                self._join_problem = None
                return True
            except KeeperSilent as silent:
                self._report_join_problem(str(silent))
            except (OSError, KeeperConnectionLost):  # this process may be out of file descriptors, for example
                await anyio.sleep(_RETRY_SECONDS)
            else:
                if self._keeper == before:
                    _log.warning("the connection to the keeper was lost, and is there again")
                return False
        self._report_join_problem("the keeper does not answer")  # but it may still run its sandboxes
        return False

    def _report_join_problem(self, why: str) -> None:
        if self._join_problem is None:
            _log.warning("the connection to the keeper was lost, and it cannot be joined again yet: %s", why)
        self._join_problem = why

    def _network(self, spec: SandboxSpec) -> Mapping[str, Any] | None:
        """Return what the egress proxy allows; None without a network, or without isolation to enforce a policy."""
        if spec.network == "none" or self._settings.unsafe:
            return None
        return {"policy": spec.network, "limits": asdict(self._settings.egress)}

    def _on_keeper_event(self, message: Mapping[str, Any]) -> None:
        if message["event"] == "egress":
            audit_decision(message)
            return
        if message["event"] == "fork_parent":
            self._on_parent(message)
            return
        instance = self._instance(message["sandbox"])
        if instance.id in self._ended_early:  # the answer to its `start` says the rest, but not that it has ended
            if instance.phase is Phase.ENDED:
                self._ended_early[instance.id] = instance
        elif message["event"] != "removed":
            self._record(instance)
        elif instance.id in self._instances:
            self._record_removal(self._instances[instance.id])

    def _on_parent(self, message: Mapping[str, Any]) -> None:
        name, why = message["name"], message["why"]
        if message["state"] == "refused":
            _log.warning("a sandbox of recipe %s was started by bubblewrap, and not forked: %s", name, why)
            return
        if why is None:
            _log.info("sandboxes of recipe %s are forked from here on", name)
        elif self._settings.launcher == "auto":
            _log.warning("sandboxes of recipe %s are started by bubblewrap, and not forked: %s", name, why)
        else:
            _log.warning("sandboxes of recipe %s cannot be forked: %s", name, why)
        self._forked[name] = why

    def _record(self, instance: Instance) -> Instance:
        known = self._instances.get(instance.id)
        self._instances[instance.id] = instance
        if known is None or known.phase is not instance.phase or known.record != instance.record:
            self._events.publish(instance)
        return instance

    def _record_removal(self, instance: Instance) -> None:
        del self._instances[instance.id]
        if instance.phase is not Phase.ENDED:
            self._events.publish(_ended(instance, _DELETED))

    def _instance(self, view: Mapping[str, Any]) -> Instance:
        return Instance(
            id=SandboxId(view["id"]),
            phase=Phase(view["phase"]),
            endpoint=Endpoint(unix=f"{self._paths.directory}/{view['socket']}"),
            exit=_exit(view),
            warnings=tuple(view["warnings"]),
            labels=view["labels"],
            record=view["record"],
            revision=view["revision"],
            copy_of=view["copy_of"],
        )


def _exit(view: Mapping[str, Any]) -> Exit | None:
    message = view["exit_message"]
    if message is None:
        return None
    if view["failed_again"]:
        return Exit(message, Cause.HIVE)
    return Exit(message, Cause.LIMIT if view["was_out_of_memory"] else Cause.AGENT)


def _ended(instance: Instance, how: Exit) -> Instance:
    return replace(instance, phase=Phase.ENDED, exit=how)


def _require_supported(spec: SandboxSpec) -> None:
    if "image" in spec.server:
        raise Unsupported(
            f"recipe {spec.recipe} is an image that serves MCP by itself, which the local backend does not start: "
            "choose a recipe of another kind, or use a backend that runs containers (docs/kubernetes.md)"
        )
    if spec.runtime_class is not None:
        raise Unsupported(f"the local backend has no runtime class {spec.runtime_class!r}: leave it out")
    if spec.node_selector:
        raise Unsupported("the local backend has one node, this host: leave `node_selector` out")
    for inside, outside in spec.mounts.items():
        if not Path(inside).is_absolute() or ".." in Path(inside).parts or not os.path.exists(outside):
            raise ConfigError(f"the recipe's folder {outside} cannot be mounted at {inside}")


def _translated(refusal: KeeperRefusal, spec: SandboxSpec) -> Exception:
    if refusal.kind == "no_snapshot":
        return unknown_snapshot(spec.snapshot or "")
    if refusal.kind == "full":
        return CapacityExceeded(f"no room for another sandbox: {refusal}", retry_after_seconds=5.0)
    if refusal.kind in ("exists", "other_image"):
        return Conflict(str(refusal))
    log = base64.b64decode(refusal.answer.get("log", "")).decode(errors="replace").splitlines()[-_LOG_LINES:]
    step = refusal.answer.get("step", "launch")
    return StartFailed(f"the sandbox did not start: {refusal}", step=step, log="\n".join(log))


def _locked_elsewhere(paths: HivePaths) -> str:
    return (
        f"another hive holds {paths.lock_file}, with another run directory: stop it, or give this one a state "
        "directory of its own (ASH_HUB_STATE_DIR)"
    )
