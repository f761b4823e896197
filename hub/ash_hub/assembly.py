"""The composition root of a hive: the only place that picks classes and ties them together. Nothing runs here."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, cast

from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings

from ash_hub.audit import Audit, AuditedAdmission
from ash_hub.auth import Auth
from ash_hub.backends.base import Backend
from ash_hub.doors import Doors
from ash_hub.legacy import SdkSessions
from ash_hub.metrics import Metrics
from ash_hub.notices import Notices
from ash_hub.pool import EmptyPool
from ash_hub.reaper import Reaper
from ash_hub.recipes import Catalog
from ash_hub.reconcile import Reconciler
from ash_hub.restoring import Restorer
from ash_hub.sandboxes import Parts, Sandboxes
from ash_hub.server import Face
from ash_hub.settings import HubSettings
from ash_hub.shelf import ToolsetShelf
from ash_hub.siblings import Alone, Replicated, Siblings
from ash_hub.splicing import splicing
from ash_hub.starting import Starter
from ash_hub.watching import InstanceWatch
from ash_hub.web import build_app
from ash_mcp.errors import AshError, SandboxNotFound, StreamBroken
from ash_mcp.types import EVERY_SCOPE, SandboxId, Scope
from ash_router.admission import ADMITTED_KEY, Admitted
from ash_router.forwarding import Forwarder
from ash_router.ledger import Ledger
from ash_router.relay import Relay
from ash_router.replicas import Replicas, new_replica_id
from ash_router.routes import Route, Routes
from ash_router.sessions import LegacySessions
from ash_router.shares import Shares
from ash_router.store.base import Store
from ash_router.tokens import CallTokens, load_hive_key
from ash_router.vouchers import VoucherAdmission, Vouchers

__all__ = ["Assembly"]


class Assembly:
    """The parts of one hive.

    Args:
        inside: Where other replicas of the hive reach this one, `host:port`.
    """

    def __init__(
        self,
        settings: HubSettings,
        catalog: Catalog,
        backend: Backend,
        store: Store,
        auth: Auth,
        inside: str | None = None,
    ) -> None:
        audit = Audit()
        self.admission = AuditedAdmission(auth.gate, audit)
        clock = backend.now
        self.ledger = Ledger(clock)
        self.routes = Routes(store, forgotten=self._forget)
        self.watch = InstanceWatch(backend)
        key = load_hive_key(settings.state_dir / "hive.key")
        tokens = CallTokens(key)
        self.replicas = Replicas(store, new_replica_id(), inside)
        siblings: Siblings = Replicated(self.replicas) if settings.redis_url is not None else Alone()
        vouchers = Vouchers(key, self.replicas.id)
        self.inside_admission = AuditedAdmission(VoucherAdmission(vouchers), audit)
        limits = settings.limits
        self.sandboxes = Sandboxes(
            Parts(
                backend=backend,
                store=store,
                routes=self.routes,
                ledger=self.ledger,
                tokens=tokens,
                catalog=catalog,
                pool=EmptyPool(),
                starter=Starter(backend, self.watch, tokens, at_once=limits.starting, waiting=limits.waiting),
                shelf=ToolsetShelf(settings.state_dir / "toolsets"),
                settings=settings,
                on_changed=self._announce,
                on_gone=self._forget,
                audit=audit,
                siblings=siblings,
            ),
            clock,
        )
        self.mirror = self.sandboxes.mirror
        self.notices = Notices(store, self._session_lives)
        self.reconciler = Reconciler(backend, self.sandboxes, self.routes, siblings)
        self._doors = Doors(self.sandboxes, backend, tokens, settings, audit, self.reconciler.catch_up, clock)
        face = Face(
            self._doors, self.sandboxes, self.notices, catalog, self.ledger, settings, self._caller, version("ash-mcp")
        )
        # admission has checked Host and Origin, more exactly than the SDK does
        unguarded = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        self.manager = StreamableHTTPSessionManager(face.server, security_settings=unguarded)
        self._sdk_sessions = SdkSessions(self.manager)
        self._legacy = LegacySessions(self._sdk_sessions.hold, replica=self.replicas.id)
        self.relay = Relay(
            routes=self.routes,
            tokens=tokens,
            ledger=self.ledger,
            sessions=self._legacy,
            explain=self._explain,
            limits=settings.relay.limits,
            forwarder=Forwarder(self.replicas, vouchers, settings.relay.limits),
            look_up=self.routes.catch_up if settings.redis_url is not None else None,
            missing=self._missing,
        )
        self.reaper = Reaper(self.sandboxes, self.reconciler, self.ledger, store, holder=siblings.id)
        store.on_flushed(Restorer(backend, self.sandboxes, store, self.routes).restore)
        self.app = build_app(
            self._legacy.middleware(Shares(splicing(self.manager.handle_request), self._session_lives)),
            Metrics(self.ledger, self.routes, self.sandboxes.registry),
            lambda: self.sandboxes.unready() or store.unready(),
            auth.routes,
            "; ".join(said for said in (auth.note, *store.warnings()) if said) or None,
        )

    async def _announce(self, owner: str, scope: Scope) -> None:
        await self.notices.announce(owner, scope)

    def _forget(self, sandbox_id: SandboxId) -> None:
        self.relay.forget(sandbox_id)

    def _session_lives(self, session_id: str) -> bool:
        return self._sdk_sessions.alive(session_id)

    def _caller(self, request: Any) -> Admitted:
        """Return who makes a request; in the handshake era it keeps the scope of its session's first one."""
        session_id = request.headers.get("mcp-session-id")
        kept = self._legacy.admitted(session_id) if session_id is not None else None
        return kept or cast("Admitted", request.scope[ADMITTED_KEY])

    async def _explain(self, route: Route) -> AshError:
        """Say why a call on a route broke off."""
        known = await self.sandboxes.explain(route)
        return known or StreamBroken(
            f"sandbox {route.session} broke off during the call; whether the call did its work is unknown"
        )

    def _missing(self, caller: Admitted, name: str) -> AshError | None:
        """Say why a direct door leads nowhere; None where the caller has no such sandbox."""
        try:
            # an id, unlike a session name, is good in every scope
            self.sandboxes.ready(caller.principal, EVERY_SCOPE if "-" in name else caller.scope, name)
        except SandboxNotFound as error:
            self._doors.refused(caller, "direct door", error)
        except AshError as error:
            return error
        return None
