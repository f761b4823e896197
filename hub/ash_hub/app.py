"""A hive from its settings to its end: what it opens, serves and closes. `assembly.py` ties its parts together."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import anyio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.assembly import Assembly
from ash_hub.backends.base import Backend
from ash_hub.backends.kept_keys import keep_hive_key
from ash_hub.chosen_backend import followed_keys, load_backend
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_hub.serving.auth import open_auth, require_auth, require_tls_files
from ash_hub.serving.http_server import Server, server_of, url_of
from ash_hub.serving.listeners import listen, listen_for_replicas, require_redis, seed_address
from ash_hub.settings import HubSettings
from ash_hub.spawning.recipes import Catalog
from ash_hub.system.files import replace_text
from ash_mcp.errors import ConfigError
from ash_mcp.paths import HIVE_FILE
from ash_router.ledger import Ledger
from ash_router.replicas.membership import MISSED_SECONDS, TICK_SECONDS
from ash_router.store.select import open_store
from ash_router.upstream.call_tokens import load_hive_key

__all__ = ["Hive", "open_hive"]

log = logging.getLogger("ash.hub")

_LISTENERS_SECONDS: Final = 0.3


class Hive:
    """A hive that serves. `url` is where; `stop()` ends it gracefully from any task of the same loop."""

    def __init__(
        self,
        url: str,
        settings: HubSettings,
        sandboxes: Sandboxes,
        backend: Backend,
        ledger: Ledger,
        *,
        lacks_keys: bool,
    ) -> None:
        self.url = url
        self.lacks_keys = lacks_keys
        """Whether nobody could come in when it started."""
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


@contextmanager
def _announced(run_dir: Path, url: str) -> Generator[None]:
    """Say in the run directory where this user's hive is, for the stdio bridge."""
    file = run_dir / HIVE_FILE
    try:
        replace_text(file, json.dumps({"url": url, "pid": os.getpid(), "started_at": time.time()}))
    except OSError as exc:
        raise ConfigError(
            f"{file} cannot be written: {exc.strerror}; make room there or choose another place with ASH_HUB_RUN_DIR"
        ) from exc
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            if json.loads(file.read_text(encoding="utf-8"))["pid"] == os.getpid():
                file.unlink()


@asynccontextmanager
async def open_hive(settings: HubSettings, backend: Backend | None = None) -> AsyncGenerator[Hive]:
    """Serve a hive while the context is open; leaving it ends its sandboxes, unless `settings.keeps`.

    Args:
        backend: An open one to use instead of the settings' own.

    Raises:
        ConfigError: What is missing or wrong, and what to do.
    """
    keeps_keys = settings.backend["kind"] != "local"
    if keeps_keys:
        require_tls_files(settings)  # its first API key may be made while it runs
    else:
        require_auth(settings)
    require_redis(settings)
    for directory in (settings.state_dir, settings.run_dir):
        make_private(directory)
    catalog = Catalog.load(settings.recipe_dirs)
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(listen(settings.host, settings.port))
        port = listener.getsockname()[1]
        inside = listen_for_replicas(settings.advertise) if settings.redis_url is not None else None
        ports = (port,) if inside is None else (port, stack.enter_context(inside.listener).getsockname()[1])
        backend = backend or await stack.enter_async_context(load_backend(settings, ports))
        keys = await stack.enter_async_context(followed_keys(backend.documents)) if keeps_keys else None
        auth = open_auth(settings, port, keys)
        redis_url = settings.redis_url.get_secret_value() if settings.redis_url is not None else None
        store = await stack.enter_async_context(
            open_store(redis_url, settings.redis_prefix, seed_address=seed_address(settings, listener))
        )
        key = await _hive_key(settings, backend)
        address = inside.address if inside is not None else None
        parts = Assembly(settings, catalog, backend, store, auth, key, address)
        stack.push_async_callback(parts.relay.aclose)
        url = url_of(settings, port)
        hive = Hive(url, settings, parts.sandboxes, backend, parts.ledger, lacks_keys=auth.lacks_keys)
        await stack.enter_async_context(_running(parts))
        server = _server(parts, settings)
        await stack.enter_async_context(server.serving(listener))
        if inside is not None:
            await stack.enter_async_context(_server(parts, settings, inside=True).serving(inside.listener))
            stack.callback(server.stop)  # both finish their answers at the same time
        stack.enter_context(_announced(settings.run_dir, hive.url))
        async with anyio.create_task_group() as group:
            if settings.idle_exit_seconds is not None:
                group.start_soon(_stop_when_idle, hive, server, settings.idle_exit_seconds)
            try:
                yield hive
            finally:
                with anyio.CancelScope(shield=True):
                    if settings.keeps or inside is not None:
                        await _drain(parts, server)
                    others_go_on = await parts.sandboxes.stop(keep=settings.keeps)
                    if others_go_on and parts.holds_sessions:
                        await anyio.sleep(MISSED_SECONDS + TICK_SECONDS)  # until they forward nothing to this one
                    parts.notices.close()
                group.cancel_scope.cancel()


async def _hive_key(settings: HubSettings, backend: Backend) -> Ed25519PrivateKey:
    """Return the hive's own key: a file of a host that all its replicas are on, elsewhere a document."""
    if backend.kind == "local":
        return load_hive_key(settings.state_dir / "hive.key")
    return await keep_hive_key(backend.documents)


@asynccontextmanager
async def _running(parts: Assembly) -> AsyncGenerator[None]:
    """Run what works beside the requests: the controller, the news, the SDK's sessions."""
    async with anyio.create_task_group() as group, parts.manager.run():
        await group.start(parts.replicas.run)
        await group.start(parts.rest.starts.run)
        group.start_soon(parts.controller.run)
        group.start_soon(parts.routes.run)
        group.start_soon(parts.notices.run)
        await parts.controller.start()
        group.start_soon(parts.shelf.run)
        group.start_soon(parts.sandboxes.warm)
        group.start_soon(parts.sandboxes.snapshots.run)
        yield
        group.cancel_scope.cancel()


def _server(parts: Assembly, settings: HubSettings, *, inside: bool = False) -> Server:
    admission = parts.inside_admission if inside else parts.admission
    return server_of(parts.app, parts.relay.protocol(admission, forwards=not inside), settings, inside=inside)


async def _drain(parts: Assembly, server: Server) -> None:
    """Let calls and spawns that have begun come to their end, and none begin but those that replicas forward."""

    async def end_listeners() -> None:
        while True:  # those who listen never end by themselves, and may come again on the same connection
            parts.notices.close()
            await anyio.sleep(_LISTENERS_SECONDS)

    async with anyio.create_task_group() as group:
        group.start_soon(end_listeners)
        await server.drain(parts.relay)
        group.cancel_scope.cancel()


def make_private(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
    except OSError as exc:
        raise ConfigError(
            f"{directory} cannot be used: {exc.strerror}; choose others with ASH_HUB_STATE_DIR and ASH_HUB_RUN_DIR"
        ) from exc


async def _stop_when_idle(hive: Hive, server: Server, seconds: float) -> None:
    quiet_since = time.monotonic()
    while True:
        await anyio.sleep(min(1.0, seconds / 4))
        if server.server_state.connections or hive.sandboxes.registry.living():
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= seconds:
            log.info("ending: nobody has used this hive", extra={"seconds": seconds})
            hive.stop()
            return
