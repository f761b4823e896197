"""Replicas of one hive in one process, over twins that yield at every await and fail when they are told to.

Everything of the lifecycle is real; what is not: the runner (a start is a create), and the wire.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.abc
import anyio.lowlevel

from ash_hub.backends.base import BackendEvent
from ash_hub.backends.memory import MemoryBackend
from ash_hub.lifecycle.controller import Controller
from ash_hub.lifecycle.parts import Parts
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_hub.settings import HubSettings
from ash_hub.spawning.instance_watch import InstanceWatch
from ash_hub.spawning.pool import EmptyPool, Started
from ash_hub.spawning.recipes import Catalog, Recipe
from ash_hub.spawning.spawn_request import SpawnAsk
from ash_hub.spawning.starting import Starter
from ash_hub.spawning.toolset_shelf import ToolsetShelf
from ash_hub.spawning.toolsets import pin
from ash_mcp.errors import AshError, ConnectFailed
from ash_mcp.types import DEFAULT_SCOPE, Principal, SandboxId, SandboxSpec, Scope
from ash_router.ledger import Ledger
from ash_router.routes import Routes
from ash_router.store.memory import MemoryStore
from ash_router.upstream.call_tokens import CallTokens, load_hive_key

__all__ = ["Cluster", "Replica"]

REFILL_SECONDS = 5.0
"""How long after a flush names are held back for those who were answered before it."""

TOLD_SECONDS = 1.5
"""For how long the others take a replica to make what it makes no more."""

LOCAL = Principal("local")
_TOOLS = pin([{"name": "run", "inputSchema": {"type": "object"}}], {})


IsAway = Callable[[str, Mapping[str, Any]], bool]


class Yielding:
    """Passes every call on, but lets others run before and after it, and raises while it is away."""

    def __init__(self, of: Any, chance: random.Random, is_away: IsAway = lambda name, options: False) -> None:
        self._of = of
        self._chance = chance
        self._is_away = is_away

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._of, name)
        if not inspect.iscoroutinefunction(found):
            return found

        async def passed(*args: Any, **options: Any) -> Any:
            await self._pause()
            if self._is_away(name, options):
                await self._away(name, options)
            try:
                return await found(*args, **options)
            finally:
                await self._pause()
                if name == "reserve_session" and self._is_away(name, options):
                    await self._away(name, options)  # it was done, and the answer is lost

        return passed

    async def _pause(self) -> None:
        for _ in range(self._chance.randrange(4)):
            await anyio.lowlevel.checkpoint()
        if self._chance.random() < 0.3:
            await anyio.sleep(self._chance.random())

    async def _away(self, name: str, options: Mapping[str, Any]) -> None:
        if name in ("drop_route", "release_session", "release_key", "touch", "publish"):
            while self._is_away(name, options):  # it is done when the store is back
                await anyio.sleep(0.5)
        else:
            await anyio.sleep(0.2)
            raise ConnectFailed("the store is away")


class AbsentStore(Yielding):
    """As a replica has its store: it says when it is away."""

    def unready(self) -> str | None:
        return "the store is away, or lacks names" if self._is_away("open_run", {}) else None


class LossyBackend(Yielding):
    """As a replica has its backend: news come late, and some are lost and told to be."""

    def watch(self) -> AsyncIterator[BackendEvent]:
        return self._late(self._of.watch())

    async def _late(self, events: AsyncIterator[BackendEvent]) -> AsyncIterator[BackendEvent]:
        async for event in events:
            await self._pause()
            if self._chance.random() < 0.1:
                event = BackendEvent(None, lost=True)
            yield event


@dataclass
class Member:
    """What one replica knows of the others: who was killed is noticed by all at once."""

    cluster: Cluster
    id: str
    possible: bool = True

    async def is_other_alive(self, replica: str) -> bool:
        await anyio.lowlevel.checkpoint()
        return replica != self.id and replica in self.cluster.living

    async def begin(self, sandbox_id: SandboxId) -> None:
        if self.cluster.is_away:
            raise ConnectFailed("the store is away")
        self.cluster.making[sandbox_id] = self.id

    def settle(self, sandbox_id: SandboxId) -> None:
        if self.cluster.making.pop(sandbox_id, None) is not None:
            self.cluster.settled_at[sandbox_id] = self.cluster.clock()

    async def is_being_made(self, sandbox_id: SandboxId) -> bool:
        told_late = self.cluster.clock() < self.cluster.settled_at.get(sandbox_id, -math.inf) + TOLD_SECONDS
        return told_late or self.cluster.making.get(sandbox_id) in self.cluster.living

    async def leave(self) -> bool:
        self.cluster.living.pop(self.id, None)
        return bool(self.cluster.living)


class CreatingStarter:
    """A start that is nothing but a create, and that yields as often as a real one."""

    def __init__(self, backend: Any, pause: Callable[[], Awaitable[None]]) -> None:
        self._backend = backend
        self._pause = pause

    async def start(
        self,
        owner: str,
        recipe: Recipe,
        spec: Callable[[], SandboxSpec],
        progress: Any,
        waiting: Any,
        handover: Any,
        toolset: Any,
    ) -> Started:
        del owner, recipe, progress, waiting, handover, toolset
        await self._pause()
        instance = await self._backend.create(spec())
        await self._pause()
        return Started(instance, _TOOLS)

    async def claim(self, started: Started, env: Mapping[str, str], secrets: Mapping[str, str]) -> None:
        del started, env, secrets
        await self._pause()


@dataclass
class Replica:
    """One replica."""

    id: str
    sandboxes: Sandboxes
    controller: Controller
    routes: Routes
    ledger: Ledger
    life: list[anyio.CancelScope] = field(default_factory=list[anyio.CancelScope])
    started: anyio.Event = field(default_factory=anyio.Event)
    is_dead: bool = False
    """Cancelled, nothing of this replica goes on."""

    @contextmanager
    def alive(self) -> Generator[None]:
        """Run the body as long as the replica lives."""
        with anyio.CancelScope() as scope:
            self.life.append(scope)
            if self.is_dead:
                scope.cancel()
            yield

    async def spawn(self, **ask: Any) -> Sandbox:
        await self.started.wait()  # nobody reaches a replica before
        asked = SpawnAsk.model_validate({"recipe": "test", **ask})
        return await self.sandboxes.spawn(LOCAL, DEFAULT_SCOPE, asked, _no_progress)

    def find(self, sandbox_id: SandboxId) -> Sandbox | None:
        return self.sandboxes.registry.by_id(sandbox_id)


async def _no_progress(done: float, message: str) -> None:
    del done, message


def _forget(sandbox_id: SandboxId) -> None:
    del sandbox_id


async def _nothing(owner: str, scope: Scope) -> None:
    del owner, scope


@dataclass
class Cluster:
    """Replicas, and what they share."""

    folder: Path
    tasks: anyio.abc.TaskGroup
    seed: int
    is_away: bool = False
    """Whether the store is."""
    living: dict[str, Replica] = field(default_factory=dict[str, Replica])
    making: dict[SandboxId, str] = field(default_factory=dict[SandboxId, str])
    settled_at: dict[SandboxId, float] = field(default_factory=dict[SandboxId, float])
    refilling: set[str] = field(default_factory=set[str])
    """Replicas that have not filled the emptied store again yet."""

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.backend = MemoryBackend()
        self.clock = anyio.current_time
        self.store = MemoryStore(self.clock)
        self._made = 0

    def add(self) -> Replica:
        """Start another replica."""
        self._made += 1
        replica = self._assemble(f"replica{self._made}")
        self.living[replica.id] = replica
        self.tasks.start_soon(self._live, replica)
        return replica

    async def _live(self, replica: Replica) -> None:
        async with anyio.create_task_group() as group:
            with replica.alive():
                group.start_soon(replica.routes.run)
                group.start_soon(replica.controller.run)
                while not replica.started.is_set():
                    try:
                        await replica.controller.start()
                        replica.started.set()
                    except AshError:
                        await anyio.sleep(0.5)
                await anyio.sleep_forever()
            group.cancel_scope.cancel()

    def kill(self, replica: Replica) -> None:
        """End a replica as `kill -9` does: none of its steps is taken any more."""
        self.living.pop(replica.id, None)
        replica.is_dead = True
        for scope in replica.life:
            scope.cancel()
        for other in self.living.values():
            other.controller.replica_left(replica.id)

    def flush(self) -> None:
        """Empty the store. Every replica is told to fill it again; until all have, it gives no new names."""
        emptied, kept = vars(MemoryStore()), ("_readers", "_clock", "_version")
        for name in emptied.keys() - set(kept):
            setattr(self.store, name, emptied[name])
        for replica in list(self.living.values()):
            self.refilling.add(replica.id)
            self.tasks.start_soon(self._refill, replica)

    async def _refill(self, replica: Replica) -> None:
        with replica.alive():  # one that is killed meanwhile fills nothing
            while replica.id in self.living:
                try:
                    await replica.controller.restore()
                    await anyio.sleep(REFILL_SECONDS)
                    break
                except ConnectFailed:
                    await anyio.sleep(0.5)
        self.refilling.discard(replica.id)

    def _store_is_away(self, name: str, options: Mapping[str, Any]) -> bool:
        gives = name in ("reserve_session", "claim_key", "open_run") and not options.get("restoring")
        return self.is_away or (gives and bool(self.refilling & self.living.keys()))

    async def settle(self) -> None:
        """Let everything that is going on come to its end."""
        await anyio.sleep(120.0)

    def _assemble(self, name: str) -> Replica:
        store: Any = AbsentStore(self.store, self.chance, self._store_is_away)
        backend: Any = LossyBackend(self.backend.another(), self.chance)
        settings = HubSettings(state_dir=self.folder, run_dir=self.folder, ttl_seconds=3600.0)
        recipe = Recipe.model_validate({"name": "test", "description": "For tests.", "server": {"python": "a:b"}})
        ledger, routes = Ledger(self.clock), Routes(store, clock=self.clock)
        parts = Parts(
            settings=settings,
            backend=backend,
            store=store,
            siblings=Member(self, name),
            routes=routes,
            ledger=ledger,
            tokens=CallTokens(load_hive_key(self.folder / "hive.key")),
            catalog=Catalog([recipe]),
            pool=EmptyPool(),
            starter=cast("Starter", CreatingStarter(backend, store._pause)),
            shelf=ToolsetShelf(backend, store, self.clock),
            watch=InstanceWatch(),
            on_changed=_nothing,
            on_gone=_forget,
            clock=self.clock,
        )
        controller = Controller(parts)
        sandboxes = Sandboxes(parts, controller)
        return Replica(name, sandboxes, controller, routes, ledger)
