"""A router alone: more data plane for hives that share a Redis, in a process that has no hub.

It follows the hives' routes and holds nothing of its own, so any number of them may come and go. What is not a call
to a sandbox it does not serve.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import anyio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ash_hub.backends.kept_keys import awaited_hive_key
from ash_hub.chosen_backend import followed_keys, open_documents
from ash_hub.lifecycle.siblings import SEES_BACKEND
from ash_hub.serving.audit import Audit, AuditedAdmission
from ash_hub.serving.auth import Auth, open_auth, require_auth, require_tls_files
from ash_hub.serving.http_server import server_of, url_of
from ash_hub.serving.listeners import listen
from ash_hub.serving.metrics import Metrics
from ash_hub.serving.web_app import build_app
from ash_hub.settings import HubSettings
from ash_mcp.errors import AshError, ConfigError, SandboxGone, StreamBroken, ToolNotFound, Unsupported
from ash_mcp.types import Principal
from ash_mcp.wire import failure_to_json, http_status
from ash_router.admission.api_keys import KeySource
from ash_router.admission.base import ADMITTED_KEY, Admitted
from ash_router.admission.share_tokens import ShareTokens
from ash_router.admission.tickets import Tickets
from ash_router.caller.relay import Relay
from ash_router.http.heads import RequestHead
from ash_router.ledger import Ledger
from ash_router.replicas.forwarding import Forwarder
from ash_router.replicas.membership import Replicas, new_replica_id
from ash_router.replicas.vouchers import Vouchers
from ash_router.routes import Route, Routes
from ash_router.sessions.session_map import LegacySessions
from ash_router.store.base import Store
from ash_router.store.select import open_store
from ash_router.upstream.call_tokens import CallTokens, load_hive_key

__all__ = ["Router", "open_router"]

_TOUCH_SECONDS: Final = 1.0
_KEY_SECONDS: Final = 60.0
"""A router that a fresh installation starts beside its first hub waits so long for that one to make the hive's key."""


@dataclass(frozen=True, slots=True)
class Router:
    """A router that serves."""

    url: str
    settings: HubSettings


@asynccontextmanager
async def open_router(settings: HubSettings) -> AsyncGenerator[Router]:
    """Serve a router while the context is open.

    Raises:
        ConfigError: What is missing or wrong, and what to do.
    """
    if settings.redis_url is None:
        raise ConfigError("a router follows the hives of a Redis: set ASH_HUB_REDIS_URL (--redis-url)")
    async with AsyncExitStack() as stack:
        key, keys = await stack.enter_async_context(_hive_keys(settings))
        listener = stack.enter_context(listen(settings.host, settings.port))
        port = listener.getsockname()[1]
        store = await stack.enter_async_context(
            open_store(settings.redis_url.get_secret_value(), settings.redis_prefix)
        )
        parts = _Parts(settings, store, open_auth(settings, port, keys), key)
        stack.push_async_callback(parts.relay.aclose)
        await stack.enter_async_context(parts.running())
        protocol = parts.relay.protocol(parts.admission)
        server = server_of(parts.app, protocol, settings)
        await stack.enter_async_context(server.serving(listener))
        try:
            yield Router(url_of(settings, port), settings)
        finally:
            with anyio.CancelScope(shield=True):
                await server.drain(parts.relay)


@asynccontextmanager
async def _hive_keys(settings: HubSettings) -> AsyncGenerator[tuple[Ed25519PrivateKey, KeySource | None]]:
    """Give the hive's own key, and where its API keys are: files of its state directory, or its backend's documents.

    Raises:
        ConfigError: There is no key, so that no sandbox would take this router's calls.
    """
    if settings.backend["kind"] == "local":
        key_file = settings.state_dir / "hive.key"
        if not key_file.exists():
            raise ConfigError(
                f"there is no {key_file}, so no sandbox would take this router's calls: set ASH_HUB_STATE_DIR to the "
                "hive's, or copy its hive.key and keys.json there"
            )
        require_auth(settings)
        yield load_hive_key(key_file), None
        return
    require_tls_files(settings)
    async with open_documents(settings) as documents:
        key = await awaited_hive_key(documents, _KEY_SECONDS)
        async with followed_keys(documents) as keys:
            yield key, keys


class _Parts:
    """The composition root of a router."""

    def __init__(self, settings: HubSettings, store: Store, auth: Auth, key: Ed25519PrivateKey) -> None:
        self._store = store
        self.admission = AuditedAdmission(auth.gate, Audit())
        self._ledger = Ledger(store.now)
        self._routes = Routes(store, forgotten=lambda sandbox_id: self.relay.forget(sandbox_id))
        shares = ShareTokens(self._routes.shared, self._routes.learn_shares, store.now, settings.limits.guest)
        auth.gate.take_shares(shares)
        auth.gate.take_tickets(Tickets(store))
        self._replicas = Replicas(store, new_replica_id())
        self.relay = Relay(
            routes=self._routes,
            tokens=CallTokens(key),
            ledger=self._ledger,
            sessions=LegacySessions(lambda _: None),  # none is ever opened here
            explain=self._explain,
            limits=settings.relay_limits,
            forwarder=Forwarder(self._replicas, Vouchers(key, self._replicas.id), settings.relay_limits),
            look_up=self._routes.catch_up,
            stale=self._stale,
            is_good=shares.is_good,
        )
        if settings.seed_ids_are_capabilities:
            auth.gate.holder = self._routes.holder
        notes = (auth.note, *store.warnings())
        metrics = Metrics(self._ledger, self._routes)
        note = "; ".join(said for said in notes if said) or None
        self.app = build_app(_nothing_else, metrics, store.unready, lambda: None, auth.routes, note)

    def _stale(self) -> str | None:
        """Say that this router may not have heard of sandboxes that have ended, or None."""
        if self._replicas.is_cut_off:
            return "the store does not answer"
        sees = any(said.get(SEES_BACKEND) is True for said in self._replicas.others().values())
        return None if sees else "no hub hears of its sandboxes"

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(self._routes.run)
            group.start_soon(self._follow_replicas)
            group.start_soon(self._report_calls)
            yield
            group.cancel_scope.cancel()

    async def _follow_replicas(self) -> None:
        """Know where the hives are, without counting as one of them."""
        while True:
            try:
                await self._replicas.look()
            except AshError:
                pass  # what was known holds for a while
            await anyio.sleep(_TOUCH_SECONDS)

    async def _report_calls(self) -> None:
        """Tell the hives which sandboxes are called, so that they do not idle out."""
        while True:
            changed = self._ledger.take_changed_last_calls()
            if changed:
                await self._store.touch(changed)
            await anyio.sleep(_TOUCH_SECONDS)

    async def _explain(self, route: Route) -> AshError:
        try:
            await self._routes.catch_up()
        except AshError:
            pass
        if self._routes.get(route.sandbox_id) is None:
            return SandboxGone(f"sandbox {route.session} has ended; the hive's list says why", session=route.session)
        return StreamBroken(
            f"sandbox {route.session} broke off during the call; whether the call did its work is unknown"
        )


async def _nothing_else(scope: Scope, receive: Receive, send: Send) -> None:
    admitted: Admitted = scope[ADMITTED_KEY]
    error: AshError = ConfigError(
        "missing session header: this router serves sandboxes only; send X-Session-ID, or use a hive"
    )
    if admitted.principal.share is not None:
        error = _unserved_guest(admitted.principal, RequestHead("1.1", b"POST", b"/", scope["headers"]))
    await JSONResponse({"error": failure_to_json(error)}, http_status(error))(scope, receive, send)


def _unserved_guest(guest: Principal, head: RequestHead) -> AshError:
    """Return why a guest's request is none that a router can serve."""
    opened = ", ".join(sorted(guest.tools)) or "none"
    if head.fields.get(b"mcp-method") == b"tools/call" and head.tool is not None and head.tool not in guest.tools:
        return ToolNotFound(f"there is no tool {head.tool!r}; there are: {opened}", tool=head.tool)
    return Unsupported(
        "this router takes a guest's calls in the stateless era of MCP alone; lists, sessions and all else are a hub's"
    )
