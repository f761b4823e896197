"""A lifecycle over the memory backend, whose sandboxes are a stand-in runner in this process."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as HttpRoute

from ash_hub.backends.memory import MemoryBackend
from ash_hub.face.arguments import SpawnAsk
from ash_hub.lifecycle.controller import Controller
from ash_hub.lifecycle.parts import Parts
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_hub.lifecycle.siblings import Alone, Siblings
from ash_hub.settings import HubSettings
from ash_hub.spawning.instance_watch import InstanceWatch
from ash_hub.spawning.pool import EmptyPool
from ash_hub.spawning.recipes import Catalog, Recipe
from ash_hub.spawning.starting import Starter
from ash_hub.spawning.toolset_shelf import ToolsetShelf
from ash_mcp.types import DEFAULT_SCOPE, Endpoint, Principal, SandboxId, SandboxSpec, Scope
from ash_router.ledger import Ledger
from ash_router.routes import Routes
from ash_router.store.memory import MemoryStore
from ash_router.upstream.call_tokens import CallTokens, load_hive_key

LOCAL = Principal("local")


async def no_progress(done: float, message: str) -> None:
    del done, message


@dataclass
class StandIn:
    """Serves every sandbox of a memory backend over one Unix socket, and does as it is told."""

    socket: Path
    tools: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "run", "inputSchema": {"type": "object"}}])
    specs: list[SandboxSpec] = field(default_factory=list[SandboxSpec])
    """What sandboxes were made from."""
    claims: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    health_status: int = 200
    claim_status: int = 200
    hold: anyio.Event | None = None
    """While set and not fired, health checks do not answer."""
    asked: anyio.Event = field(default_factory=anyio.Event)

    async def serve(self, spec: SandboxSpec) -> Endpoint:
        self.specs.append(spec)
        return Endpoint(unix=str(self.socket))

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                HttpRoute("/_ash/health", self._health),
                HttpRoute("/_ash/claim", self._claim, methods=["POST"]),
                HttpRoute("/mcp", self._mcp, methods=["POST"]),
            ]
        )

    async def _health(self, _: Request) -> Response:
        self.asked.set()
        if self.hold is not None:
            await self.hold.wait()
        return JSONResponse({"error": {"message": "its server has no tools"}}, self.health_status)

    async def _claim(self, request: Request) -> Response:
        self.claims.append(await request.json())
        return JSONResponse({"claimed": True}, self.claim_status)

    async def _mcp(self, request: Request) -> Response:
        message = json.loads(await request.body())
        result = {"tools": self.tools, "resultType": "complete"}
        return JSONResponse({"jsonrpc": "2.0", "id": message["id"], "result": result})


@dataclass
class World:
    """A lifecycle and everything around it."""

    sandboxes: Sandboxes
    backend: MemoryBackend
    routes: Routes
    ledger: Ledger
    runner: StandIn
    changed: list[tuple[str, Scope]]
    gone: list[str]
    clock: list[float]
    controller: Controller
    store: MemoryStore
    life: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    """Cancelled, its controller does nothing any more, as if its process were killed."""

    async def spawn(self, scope: Scope = DEFAULT_SCOPE, *, owner: Principal = LOCAL, **ask: Any) -> Sandbox:
        asked = SpawnAsk.model_validate({"recipe": "test", **ask})
        return await self.sandboxes.spawn(owner, scope, asked, no_progress)

    async def look(self, *more: SandboxId) -> None:
        """Have the controller look at everything now, and wait for it."""
        instances = {instance.id for instance in await self.backend.list()}
        known = {sandbox.id for sandbox in self.sandboxes.registry.all()}
        await self.controller.settle(instances | known | self.routes.ids() | set(more))


MakeWorld = Callable[..., Awaitable[World]]


def assemble(
    folder: Path,
    backend: MemoryBackend,
    runner: StandIn,
    given: dict[str, Any],
    *,
    store: MemoryStore | None = None,
    siblings: Siblings | None = None,
) -> World:
    more = given.pop("recipe", {})
    settings = HubSettings(state_dir=folder, run_dir=folder, **given)
    store, siblings, clock = store or MemoryStore(), siblings or Alone(), [1000.0]
    ledger = Ledger(lambda: clock[0])
    tokens = CallTokens(load_hive_key(folder / "hive.key"))
    changed: list[tuple[str, Scope]] = []
    gone: list[str] = []

    async def on_changed(owner: str, scope: Scope) -> None:
        changed.append((owner, scope))

    watch, routes = InstanceWatch(), Routes(store)
    described = {"name": "test", "description": "For tests.", "server": {"python": "a:b"}}
    parts = Parts(
        settings=settings,
        backend=backend,
        store=store,
        siblings=siblings,
        routes=routes,
        ledger=ledger,
        tokens=tokens,
        catalog=Catalog([Recipe.model_validate({**described, **more})]),
        pool=EmptyPool(),
        starter=Starter(backend, watch, tokens, at_once=2, waiting=settings.limits.waiting),
        shelf=ToolsetShelf(backend, store, lambda: clock[0]),
        watch=watch,
        on_changed=on_changed,
        on_gone=gone.append,
        clock=lambda: clock[0],
    )
    controller = Controller(parts)
    sandboxes = Sandboxes(parts, controller)
    return World(sandboxes, backend, routes, ledger, runner, changed, gone, clock, controller, store)


@asynccontextmanager
async def watched(world: World) -> AsyncGenerator[None]:
    async def live() -> None:
        with world.life:
            await world.controller.run()

    async with anyio.create_task_group() as group:
        group.start_soon(live)
        await anyio.lowlevel.checkpoint()
        yield
        group.cancel_scope.cancel()


@asynccontextmanager
async def serving(runner: StandIn) -> AsyncGenerator[None]:
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = uvicorn.Server(
        uvicorn.Config(runner.app(), uds=str(runner.socket), log_config=None, lifespan="off", ws="none")
    )
    async with anyio.create_task_group() as group:
        group.start_soon(server._serve)  # pyright: ignore[reportPrivateUsage]
        with anyio.fail_after(5):
            while not server.started:
                await anyio.sleep(0.005)
        yield
        server.should_exit = True
        server.force_exit = True
