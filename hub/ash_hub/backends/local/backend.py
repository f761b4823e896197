"""Sandboxes of this host, through the keeper."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread

from ash_hub.backends._broadcast import Broadcast
from ash_hub.backends.base import BackendEvent, Instance, Phase
from ash_hub.backends.local import host
from ash_hub.backends.local.egress.policy import Policy, PolicyError
from ash_hub.backends.local.launchers.base import Launcher
from ash_hub.backends.local.launchers.bubblewrap import BubblewrapLauncher
from ash_hub.backends.local.launchers.unsafe import UnsafeLauncher
from ash_hub.backends.local.limits import Enforcement, limits_of
from ash_hub.backends.local.link import KeeperCrowded, KeeperEnding, KeeperGone, KeeperLink, KeeperRefusal
from ash_hub.backends.local.paths import HivePaths, hive_paths
from ash_hub.backends.local.runtime import Runtime, compile_runner, find_runtime
from ash_hub.backends.local.settings import LocalSettings
from ash_hub.backends.local.starter import start_keeper
from ash_hub.clock import lead, steady
from ash_mcp.errors import CapacityExceeded, ConfigError, Conflict, StartFailed, Unsupported
from ash_mcp.types import Endpoint, SandboxId, SandboxSpec

__all__ = ["KEEPER_DIED", "LocalBackend"]

KEEPER_DIED = "the keeper died, and its sandboxes with it"
_CONNECT_SECONDS = 20.0
_RETRY_SECONDS = 0.02
_REJOIN_SECONDS = 0.5
_LONGEST_REJOIN_SECONDS = 5.0
_CLEAN_UP_SECONDS = 10.0
_LOG_LINES = 20
_log = logging.getLogger("ash.hub")
_AUDIT = logging.getLogger("ash.audit")


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
            settings: Its directories and limits.
            runtime: What sandboxes run; None is the runner that is installed beside the hub.
            hive_ports: Where the hive listens, which no network policy lets a sandbox reach.
            shared: What replicas of one hive have in common, so that they may use one keeper; None: this is alone.
            keep: Whether sandboxes that run when it is left, the last of its hive, wait for the next one without a
                time limit, and not only for the grace.
        """
        self._settings = settings
        self._hive_ports = hive_ports
        self._shared = shared
        self._keep = keep
        self._given_runtime = runtime
        self._events = Broadcast()
        self._instances: dict[SandboxId, Instance] = {}
        self._ended_early: dict[SandboxId, Instance | None] = {}
        """Sandboxes that are being created, with the news of their end if that has overtaken the answer."""
        self._link: KeeperLink | None = None
        self._linking = anyio.Lock()
        self._keeper: int | None = None
        """The process that `_instances` belong to."""
        self._waits: str | None = None
        """Why the keeper cannot be joined again although it may live; nothing is known to have ended then."""
        self._owed: set[SandboxId] = set()
        """Sandboxes to end as soon as the keeper can be joined again."""
        self._is_left = False
        self._lead = lead()
        """By how much our time is ahead of the steady clock: what the keeper says, as soon as there is one."""

    async def __aenter__(self) -> Self:
        self._paths: HivePaths = hive_paths(self._settings)
        self._runtime = self._given_runtime or find_runtime()
        await anyio.to_thread.run_sync(compile_runner, self._runtime)
        self._facts = await anyio.to_thread.run_sync(host.host_facts)
        if not self._settings.unsafe:
            await self._require_isolation()
        self._tasks = await anyio.create_task_group().__aenter__()
        try:
            await self._living_link()
        except BaseException:
            await self._end_tasks()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._is_left = True
        with anyio.move_on_after(_CLEAN_UP_SECONDS, shield=True), contextlib.suppress(KeeperGone, ConfigError):
            # A keeper that died may have left sockets and groups, which a new one clears away as it starts and ends.
            link = await self._living_link()
            if not (await link.request("leave", keep=self._keep))["stays"]:
                await link.closed.wait()
        self._events.close()
        await self._end_tasks()

    async def _end_tasks(self) -> None:
        # Without the exception that is on its way: a task group would wrap it into a group of its own.
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def _require_isolation(self) -> None:
        """Refuse to run without isolation, saying what to install."""
        checks = await anyio.to_thread.run_sync(host.probe)
        missing = [check for check in checks if check.required and not check.ok]
        if missing:
            found = "; ".join(f"{check.name}: {check.detail} - {check.fix}" for check in missing)
            raise ConfigError(f"sandboxes cannot be isolated on this host. {found}")

    async def create(self, spec: SandboxSpec) -> Instance:
        """Start a sandbox and return it once its main process runs."""
        _require_supported(spec)
        _require_network(spec, private=self._settings.private_egress)
        limits = limits_of(spec, self._settings)
        link = await self._link_or_fail()
        plan = self._launcher.plan(spec, self._runtime, limits)
        warnings = [*self._launcher.warnings, *_ignored(spec)]
        self._ended_early[spec.id] = None
        try:
            view = await link.request(
                "start",
                id=spec.id,
                generation=spec.generation,
                labels=dict(spec.labels),
                record=dict(spec.record),
                warnings=warnings,
                plan=plan.to_json(),
                limits=self._enforcement.for_keeper(limits),
                network=self._network(spec),
                timeout=self._settings.start_timeout_seconds,
            )
        except KeeperRefusal as refusal:
            raise _translated(refusal) from refusal
        except KeeperGone as gone:
            raise StartFailed(f"the sandbox could not start: {KEEPER_DIED}", step="keeper") from gone
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(_CLEAN_UP_SECONDS, shield=True), contextlib.suppress(KeeperGone):
                await link.request("stop", id=spec.id, grace_seconds=0.0)
            raise
        finally:
            end = self._ended_early.pop(spec.id)
        instance = self._noted(self._instance(view))
        if end is None and link.closed.is_set():
            await self._rejoin()
            return self._instances.get(spec.id) or _ended(instance, "deleted")
        return instance if end is None else self._noted(end)

    async def get(self, sandbox_id: SandboxId) -> Instance | None:
        if sandbox_id not in self._instances:
            await self._ask_for_all()
        return self._instances.get(sandbox_id)

    async def list(self) -> list[Instance]:
        await self._ask_for_all()
        return list(self._instances.values())

    async def _ask_for_all(self) -> None:
        """Learn what other hubs made and ended, of which the news may be on its way still."""
        if self._link is None:
            await self._rejoin()
            return
        try:
            await self._link.request("list", apply=lambda answer: self._compare(answer["sandboxes"]))
        except KeeperGone:
            await self._rejoin()

    def _compare(self, views: Sequence[Mapping[str, Any]], why: str = "deleted") -> None:
        """Make what is known be what the keeper says there is; whatever else was known has ended, and `why`."""
        instances = [self._instance(view) for view in views]
        for instance in instances:
            if instance.id not in self._ended_early:
                self._noted(instance)
        for missing in self._instances.keys() - {instance.id for instance in instances}:
            if self._instances[missing].phase is Phase.ENDED:
                continue  # with the keeper before this one
            if why == KEEPER_DIED:
                self._noted(_ended(self._instances[missing], why))
            else:
                self._removed(self._instances[missing])

    async def annotate(self, sandbox_id: SandboxId, record: Mapping[str, Any]) -> None:
        await self._reached("annotate", id=sandbox_id, record=dict(record))

    async def delete(self, sandbox_id: SandboxId, *, grace_seconds: float = 2.0) -> None:
        if not await self._reached("stop", id=sandbox_id, grace_seconds=grace_seconds):
            if self._waits is not None:
                self._owed.add(sandbox_id)
                return
            with contextlib.suppress(KeeperGone):
                await self._living_link()  # the next keeper clears away what the last one left
        if instance := self._instances.get(sandbox_id):
            self._removed(instance)

    async def logs(self, sandbox_id: SandboxId, *, tail_bytes: int = 65_536) -> bytes:
        if self._link is None:
            return b""
        try:
            answer = await self._link.request("logs", id=sandbox_id, tail_bytes=tail_bytes)
        except KeeperGone:
            return b""
        return base64.b64decode(answer["data"])

    async def _reached(self, operation: str, **fields: Any) -> bool:
        """Have the keeper do what may be done twice: again, if the connection is lost meanwhile and it lives.

        Returns:
            Whether it did; False where there is no keeper, or it cannot be joined.
        """
        while True:
            if self._link is None:
                await self._rejoin()
            link = self._link
            if link is None:
                return False
            try:
                await link.request(operation, **fields)
            except KeeperGone:
                await link.closed.wait()
            else:
                return True

    def watch(self) -> AsyncIterator[BackendEvent]:
        return self._events.watch()

    def now(self) -> float:
        return self._lead + steady()

    def unready(self) -> str | None:
        return self._waits

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": self.kind,
            "launcher": "none" if self._settings.unsafe else self._settings.launcher,
            "keeper": None if self._link is None else self._link.hello["pid"],
            "control_groups": self._enforcement.version,
            # A sandbox can read in its own mount table where on the host these lie; the last, if it may go out.
            "visible_paths": [] if self._settings.unsafe else self._visible_paths(),
            "warnings": list(self._launcher.warnings),
        }

    def _visible_paths(self) -> list[str]:
        own = [] if self._facts.veils else sorted(self._runtime.binds.values())
        return [*own, str(self._paths.directory)]

    async def _link_or_fail(self) -> KeeperLink:
        try:
            return await self._living_link()
        except KeeperGone as gone:
            raise StartFailed("the keeper cannot be reached", step="keeper") from gone
        except KeeperCrowded as crowded:
            raise CapacityExceeded(str(crowded), retry_after_seconds=_LONGEST_REJOIN_SECONDS) from crowded

    async def _living_link(self) -> KeeperLink:
        """Return the connection to the keeper, with a keeper started if there is none."""
        async with self._linking:
            if self._link is not None:
                return self._link
            deadline = anyio.current_time() + _CONNECT_SECONDS
            while True:
                with contextlib.suppress(OSError, KeeperEnding, KeeperGone):
                    return self._led(await KeeperLink.open(self._paths.control, self._hive_ports, self._shared))
                started = await anyio.to_thread.run_sync(start_keeper, self._settings, self._paths, self._lead)
                if not started and anyio.current_time() > deadline:
                    raise ConfigError(_locked_elsewhere(self._paths))
                await anyio.sleep(0 if started else _RETRY_SECONDS)

    def _led(self, link: KeeperLink) -> KeeperLink:
        groups = link.hello["cgroups"]
        self._enforcement = Enforcement(
            version=groups["version"],
            controllers=frozenset(groups["controllers"]),
            namespaced_processes=host.namespaced_processes(),
        )
        self._launcher: Launcher = (
            UnsafeLauncher(replace(self._enforcement, namespaced_processes=False), self._paths.directory)
            if self._settings.unsafe
            else BubblewrapLauncher(self._facts, self._enforcement, self._paths.directory)
        )
        is_same = self._keeper == link.hello["pid"]
        self._keeper, self._link, self._lead = link.hello["pid"], link, link.hello["lead"]
        self._compare(link.hello["sandboxes"], "deleted" if is_same else KEEPER_DIED)
        self._waits = None
        self._tasks.start_soon(self._follow, link)
        while self._owed:
            self._tasks.start_soon(self.delete, self._owed.pop())
        return link

    async def _follow(self, link: KeeperLink) -> None:
        try:
            await link.run(self._told)
        finally:
            self._link = None
            await link.aclose()
        await self._rejoin()
        pause = _REJOIN_SECONDS
        # another replica may start the next keeper, too
        while self._link is None and (self._waits is not None or self._shared is not None):
            await anyio.sleep(pause)
            pause = _REJOIN_SECONDS if self._waits is None else min(2 * pause, _LONGEST_REJOIN_SECONDS)
            await self._rejoin()

    async def _rejoin(self) -> None:
        """Join the keeper that there is, after a connection was lost; if there is none, all has ended with it."""
        async with self._linking:
            if self._link is None and not self._is_left and await self._finds_none():
                self._compare([], KEEPER_DIED)

    async def _finds_none(self) -> bool:
        """Join a keeper that lives, or say that none does: a lost connection alone does not mean that it died."""
        deadline, before = anyio.current_time() + _CONNECT_SECONDS, self._keeper
        while anyio.current_time() < deadline:
            try:
                self._led(await KeeperLink.open(self._paths.control, self._hive_ports, self._shared))
            except KeeperCrowded as crowded:
                self._wait(str(crowded))
                return False
            except (FileNotFoundError, ConnectionRefusedError, KeeperEnding, ConfigError):
                self._waits = None
                return True
            except (OSError, KeeperGone):  # this process may be out of descriptors, say
                await anyio.sleep(_RETRY_SECONDS)
            else:
                if self._keeper == before:
                    _log.warning("the connection to the keeper was lost, and is there again")
                return False
        self._wait("the keeper does not answer")  # but it may hold them still
        return False

    def _wait(self, why: str) -> None:
        if self._waits is None:
            _log.warning("the connection to the keeper was lost, and it cannot be joined again yet: %s", why)
        self._waits = why

    def _network(self, spec: SandboxSpec) -> Mapping[str, Any] | None:
        """Return what the egress proxy is to let out; without isolation there is nothing that it could hold back."""
        if spec.network == "none" or self._settings.unsafe:
            return None
        return {"policy": spec.network, "limits": asdict(self._settings.egress)}

    def _told(self, message: Mapping[str, Any]) -> None:
        if message["event"] == "egress":
            _audit(message)
            return
        instance = self._instance(message["sandbox"])
        if instance.id in self._ended_early:  # being created here, whose answer tells all but the end
            if instance.phase is Phase.ENDED:
                self._ended_early[instance.id] = instance
        elif message["event"] != "removed":
            self._noted(instance)
        elif instance.id in self._instances:
            self._removed(self._instances[instance.id])

    def _noted(self, instance: Instance) -> Instance:
        known = self._instances.get(instance.id)
        self._instances[instance.id] = instance
        if known is None or known.phase is not instance.phase or known.record != instance.record:
            self._events.publish(instance)
        return instance

    def _removed(self, instance: Instance) -> None:
        del self._instances[instance.id]
        if instance.phase is not Phase.ENDED:
            self._events.publish(_ended(instance, "deleted"))

    def _instance(self, view: Mapping[str, Any]) -> Instance:
        return Instance(
            id=SandboxId(view["id"]),
            generation=view["generation"],
            phase=Phase(view["phase"]),
            endpoint=Endpoint(unix=str(self._paths.directory / view["socket"])),
            exit_message=view["exit_message"],
            warnings=tuple(view["warnings"]),
            labels=view["labels"],
            record=view["record"],
        )


def _ended(instance: Instance, why: str) -> Instance:
    return replace(instance, phase=Phase.ENDED, exit_message=why)


def _require_supported(spec: SandboxSpec) -> None:
    if spec.image is not None:
        raise ConfigError(
            f"the local backend has no images, so it cannot start {spec.image!r}: leave `image` out and choose a "
            "recipe, or use a backend that runs containers"
        )
    if spec.runtime_class is not None:
        raise Unsupported(f"the local backend has no runtime class {spec.runtime_class!r}: leave it out")
    if spec.node_selector:
        raise Unsupported("the local backend has one node, this host: leave `node_selector` out")
    for inside, outside in spec.mounts.items():
        if not Path(inside).is_absolute() or ".." in Path(inside).parts or not os.path.exists(outside):
            raise ConfigError(f"the recipe's folder {outside} cannot be mounted at {inside}")


def _require_network(spec: SandboxSpec, *, private: bool) -> None:
    try:
        policy = Policy.parse(spec.network)
    except PolicyError as error:
        raise ConfigError(f"network: {error}") from error
    if policy.private and not private:
        raise ConfigError(f"network: this hive lets nobody name private addresses, such as {policy.private[0]}")


def _audit(decision: Mapping[str, Any]) -> None:
    """Write a decision of the egress proxy as the audit writes its lines."""
    at = datetime.datetime.fromtimestamp(decision["time"], datetime.UTC).isoformat(timespec="milliseconds")
    line = {"at": at.replace("+00:00", "Z"), "event": "egress", "outcome": decision["decision"]}
    told = {key: value for key, value in decision.items() if key not in ("time", "event", "decision")}
    _AUDIT.info(json.dumps(line | {key: value for key, value in told.items() if value is not None}))


def _ignored(spec: SandboxSpec) -> list[str]:
    return ["ports are reached inside the sandbox only: it has no network of its own"] if spec.ports else []


def _translated(refusal: KeeperRefusal) -> Exception:
    if refusal.kind == "full":
        return CapacityExceeded(f"no room for another sandbox: {refusal}", retry_after_seconds=5.0)
    if refusal.kind == "exists":
        return Conflict(str(refusal))
    log = base64.b64decode(refusal.answer.get("log", "")).decode(errors="replace").splitlines()[-_LOG_LINES:]
    step = refusal.answer.get("step", "launch")
    return StartFailed(f"the sandbox did not start: {refusal}", step=step, log="\n".join(log))


def _locked_elsewhere(paths: HivePaths) -> str:
    return (
        f"another hive holds {paths.lock_file}, with another run directory: stop it, or give this one a state "
        "directory of its own (ASH_HUB_STATE_DIR)"
    )
