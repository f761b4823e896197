"""The composition root of a hive: the only place that picks classes and ties them together."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, Final, cast

import anyio
import uvicorn
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import ValidationError

from ash_hub.audit import Audit, AuditedAdmission
from ash_hub.auth import open_auth, require_auth
from ash_hub.backends.base import Backend, BackendFactory, Places
from ash_hub.doors import Doors
from ash_hub.legacy import SdkSessions
from ash_hub.metrics import Metrics
from ash_hub.notices import Notices
from ash_hub.pool import EmptyPool
from ash_hub.reaper import Reaper
from ash_hub.recipes import Catalog, explain_invalid
from ash_hub.reconcile import Reconciler
from ash_hub.restoring import Restorer
from ash_hub.sandboxes import Parts, Sandboxes
from ash_hub.server import Face
from ash_hub.settings import HubSettings
from ash_hub.shelf import ToolsetShelf
from ash_hub.starting import Starter
from ash_hub.watching import InstanceWatch
from ash_hub.web import build_app
from ash_mcp.errors import AshError, ConfigError, SandboxNotFound, StreamBroken
from ash_mcp.paths import HIVE_FILE
from ash_mcp.types import EVERY_SCOPE, new_sandbox_id
from ash_mcp.wire import MCP_PATH
from ash_router.admission import ADMITTED_KEY, Admission, Admitted
from ash_router.ledger import Ledger
from ash_router.relay import Relay
from ash_router.routes import Route, Routes
from ash_router.sessions import LegacySessions
from ash_router.store.select import open_store
from ash_router.tokens import CallTokens, load_hive_key

__all__ = ["Hive", "open_hive"]

log = logging.getLogger("ash.hub")

_DRAIN_SECONDS: Final = 5.0
_KEEP_ALIVE_SECONDS: Final = 75


class Hive:
    """A hive that serves. `url` is where; `stop()` ends it gracefully from any task of the same loop."""

    def __init__(
        self, url: str, settings: HubSettings, sandboxes: Sandboxes, backend: Backend, ledger: Ledger
    ) -> None:
        self.url = url
        self.in_flight = ledger.busy
        self.settings = settings
        self.sandboxes = sandboxes
        self.backend = backend
        self._stop = anyio.Event()

    def stop(self) -> None:
        self._stop.set()

    async def stopped(self) -> None:
        """Return when somebody asked for the end."""
        await self._stop.wait()


class _Server(uvicorn.Server):
    """Says when it has started, and leaves signals to whoever runs the hive."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._up = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._up.set()

    @asynccontextmanager
    async def serving(self, listener: socket.socket) -> AsyncGenerator[None]:
        """Serve on `listener` while the context is open, then let answers that have begun finish, bounded."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._serve, [listener])
            try:
                await self._up.wait()
                yield
            finally:
                self.should_exit = True


@contextmanager
def _announced(run_dir: Path, url: str) -> Generator[None]:
    """Say in the run directory where this user's hive is, for the stdio bridge."""
    file = run_dir / HIVE_FILE
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({"url": url, "pid": os.getpid(), "started_at": time.time()}), encoding="utf-8")
    fresh.replace(file)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            if json.loads(file.read_text(encoding="utf-8"))["pid"] == os.getpid():
                file.unlink()


@asynccontextmanager
async def open_hive(settings: HubSettings) -> AsyncGenerator[Hive]:
    """Serve a hive while the context is open; leaving it ends its sandboxes, unless `settings.keep`.

    Raises:
        ConfigError: What is missing or wrong, and what to do.
    """
    require_auth(settings)
    for directory in (settings.state_dir, settings.run_dir):
        _make_private(directory)
    catalog = Catalog.load(settings.recipe_dirs)
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(_listen(settings.host, settings.port))
        port = listener.getsockname()[1]
        auth, audit = open_auth(settings, port), Audit()
        backend = await stack.enter_async_context(_load_backend(settings, port))
        redis_url = settings.redis_url.get_secret_value() if settings.redis_url is not None else None
        store = await stack.enter_async_context(open_store(redis_url, settings.redis_prefix))
        routes, ledger = Routes(store, forgotten=lambda sandbox_id: relay.forget(sandbox_id)), Ledger()
        tokens = CallTokens(load_hive_key(settings.state_dir / "hive.key"))
        watch = InstanceWatch(backend)

        async def explain(route: Route) -> AshError:
            known = await sandboxes.explain(route)
            return known or StreamBroken(
                f"sandbox {route.session} broke off during the call; whether the call did its work is unknown"
            )

        def missing(caller: Admitted, name: str) -> AshError | None:
            try:
                # an id, unlike a session name, is good in every scope
                sandboxes.ready(caller.principal, EVERY_SCOPE if "-" in name else caller.scope, name)
            except SandboxNotFound as error:
                doors.refused(caller, "direct door", error)
            except AshError as error:
                return error
            return None

        def caller(request: Any) -> Admitted:
            session_id = request.headers.get("mcp-session-id")
            kept = legacy.admitted(session_id) if session_id is not None else None
            return kept or cast("Admitted", request.scope[ADMITTED_KEY])

        sandboxes = Sandboxes(
            Parts(
                backend=backend,
                store=store,
                routes=routes,
                ledger=ledger,
                tokens=tokens,
                catalog=catalog,
                pool=EmptyPool(),
                starter=Starter(
                    backend, watch, tokens, at_once=settings.limits.starting, waiting=settings.limits.waiting
                ),
                shelf=ToolsetShelf(settings.state_dir / "toolsets"),
                settings=settings,
                on_changed=lambda owner, scope: notices.announce(owner, scope),
                on_gone=lambda sandbox_id: relay.forget(sandbox_id),
                audit=audit,
            )
        )
        notices = Notices(store, lambda session_id: sdk_sessions.alive(session_id))
        doors = Doors(sandboxes, backend, tokens, settings, audit)
        face = Face(doors, sandboxes, notices, catalog, ledger, settings, caller, version("ash-mcp"))
        manager = StreamableHTTPSessionManager(
            face.server,
            # admission has checked Host and Origin, more exactly than the SDK does
            security_settings=TransportSecuritySettings(enable_dns_rebinding_protection=False),
        )
        sdk_sessions = SdkSessions(manager)
        legacy = LegacySessions(sdk_sessions.hold)
        relay = Relay(routes=routes, tokens=tokens, ledger=ledger, sessions=legacy, explain=explain, missing=missing)
        stack.push_async_callback(relay.aclose)
        metrics = Metrics(sandboxes, ledger, routes)
        note = "; ".join(said for said in (auth.note, *store.warnings()) if said) or None
        app = build_app(
            legacy.middleware(manager.handle_request),
            metrics,
            lambda: sandboxes.unready() or store.unready(),
            auth.routes,
            note,
        )
        hive = Hive(_url(settings, port), settings, sandboxes, backend, ledger)
        reconciler = Reconciler(backend, sandboxes)
        store.on_flushed(Restorer(backend, sandboxes, store, routes).restore)

        async with anyio.create_task_group() as group, manager.run():
            group.start_soon(watch.run, sandboxes.died, reconciler.run_once)
            group.start_soon(routes.run)
            group.start_soon(notices.run)
            group.start_soon(Reaper(sandboxes, ledger, store, holder=new_sandbox_id()).run)
            await reconciler.run_once()
            server = _server(app, relay, AuditedAdmission(auth.gate, audit), settings)
            async with server.serving(listener):
                with _announced(settings.run_dir, hive.url):
                    if settings.idle_exit_seconds is not None:
                        group.start_soon(_stop_when_idle, hive, server, settings.idle_exit_seconds)
                    try:
                        yield hive
                    finally:
                        with anyio.CancelScope(shield=True):
                            await sandboxes.stop(keep=settings.keep)
                            notices.close()
            group.cancel_scope.cancel()


def _server(app: Any, relay: Relay, admission: Admission, settings: HubSettings) -> _Server:
    config = uvicorn.Config(
        app,
        http=cast("Any", relay.protocol(admission)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,  # who calls is the socket's word, not a header's
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=int(_DRAIN_SECONDS),
    )
    return _Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol named, asyncio turns Nagle off on what is accepted; else a small answer waits 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as exc:
        listener.close()
        raise ConfigError(
            f"port {port} of {host} cannot be used: {exc.strerror}. If a hive runs there already, just use it "
            "(ash list); otherwise choose another port with --port"
        ) from exc
    listener.setblocking(False)
    return listener


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
    except OSError as exc:
        raise ConfigError(
            f"{directory} cannot be used: {exc.strerror}; choose others with ASH_HUB_STATE_DIR and ASH_HUB_RUN_DIR"
        ) from exc


def _load_backend(settings: HubSettings, port: int) -> Backend:
    known = {point.name: point for point in entry_points(group="ash.backends")}
    kind = settings.backend.get("kind")
    if kind not in known:
        raise ConfigError(f"there is no backend {kind!r}; there are: {', '.join(sorted(known))}")
    factory: BackendFactory = known[kind].load()
    try:
        return factory(settings.backend, Places(settings.state_dir, settings.run_dir, settings.logs, (port,)))
    except ValidationError as exc:
        raise ConfigError(f"settings of the {kind} backend (ASH_HUB_BACKEND__…): {explain_invalid(exc)}") from exc


def _url(settings: HubSettings, port: int) -> str:
    scheme = "http" if settings.tls_cert is None else "https"
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{shown}:{port}{MCP_PATH}"


async def _stop_when_idle(hive: Hive, server: _Server, seconds: float) -> None:
    quiet_since = time.monotonic()
    while True:
        await anyio.sleep(min(1.0, seconds / 4))
        if server.server_state.connections or hive.sandboxes.registry.living():
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= seconds:
            log.info("ending: nobody has used this hive", extra={"seconds": seconds})
            hive.stop()
            return
