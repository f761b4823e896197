"""The composition root of a hive: the only place that picks classes and ties them together. Nothing runs here."""

from __future__ import annotations

from collections.abc import Awaitable
from importlib.metadata import version
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.backends.base import Backend, HostClock
from ash_hub.face.handlers import HiveOperations
from ash_hub.face.legacy_sessions import SdkSessions
from ash_hub.face.notices import Notices
from ash_hub.face.server import Face
from ash_hub.face.sharing import ShareTool
from ash_hub.face.splicing import with_spliced_tools
from ash_hub.face.steady_progress import with_comments
from ash_hub.lifecycle.controller import Controller
from ash_hub.lifecycle.parts import Parts
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_hub.lifecycle.sharing import Sharing
from ash_hub.lifecycle.siblings import Alone, Replicated, Siblings
from ash_hub.lifecycle.snapshots import SnapshotVerbs
from ash_hub.rest.seed import SeedRest
from ash_hub.serving.audit import Audit, AuditedAdmission
from ash_hub.serving.auth import Auth
from ash_hub.serving.metrics import Metrics
from ash_hub.serving.web_app import build_app
from ash_hub.settings import HubSettings
from ash_hub.spawning.instance_watch import InstanceWatch
from ash_hub.spawning.pool import EmptyPool
from ash_hub.spawning.recipes import Catalog
from ash_hub.spawning.starting import Starter
from ash_hub.spawning.toolset_shelf import ToolsetShelf
from ash_mcp.errors import AshError, SandboxNotFound, StreamBroken
from ash_mcp.types import EVERY_SCOPE, SandboxId, Scope
from ash_router.admission.base import ADMITTED_KEY, Admitted
from ash_router.admission.share_tokens import ShareTokens
from ash_router.admission.tickets import Tickets
from ash_router.caller.relay import Relay
from ash_router.ledger import Ledger
from ash_router.replicas.forwarding import Forwarder
from ash_router.replicas.membership import TTL_SECONDS, Replicas, new_replica_id
from ash_router.replicas.vouchers import VoucherAdmission, Vouchers
from ash_router.routes import Route, Routes
from ash_router.sessions.quotas import OpenRequestQuotas
from ash_router.sessions.session_gate import SessionGate
from ash_router.sessions.session_ids import SessionIds
from ash_router.sessions.session_map import LegacySessions
from ash_router.store.base import Store
from ash_router.upstream.call_tokens import CallTokens

__all__ = ["Assembly"]


class Assembly:
    """The parts of one hive.

    Args:
        key: The hive's own, by which sandboxes and other replicas know it.
        inside: Where other replicas of the hive reach this one, `host:port`.
    """

    def __init__(
        self,
        settings: HubSettings,
        catalog: Catalog,
        backend: Backend,
        store: Store,
        auth: Auth,
        key: Ed25519PrivateKey,
        inside: str | None = None,
    ) -> None:
        audit = Audit()
        self.admission = AuditedAdmission(auth.gate, audit)
        clock = backend.now if isinstance(backend, HostClock) else store.now
        self.ledger = Ledger(clock)
        self.routes = Routes(store, forgotten=self._forget)
        tokens = CallTokens(key)
        are_many = settings.redis_url is not None
        grace = TTL_SECONDS if are_many else 0.0  # nobody else has to announce itself where this is the whole hive
        self.replicas = Replicas(store, new_replica_id(), inside, grace_seconds=grace)
        replicated = Replicated(self.replicas, sees_backend=lambda: backend.unready() is None)
        siblings: Siblings = replicated if settings.redis_url is not None else Alone()
        vouchers = Vouchers(key, self.replicas.id)
        self.inside_admission = AuditedAdmission(VoucherAdmission(vouchers), audit)
        self.shelf = ToolsetShelf(backend, store, clock)
        limits = settings.limits
        watch = InstanceWatch()
        parts = Parts(
            settings=settings,
            backend=backend,
            store=store,
            siblings=siblings,
            routes=self.routes,
            ledger=self.ledger,
            tokens=tokens,
            catalog=catalog,
            pool=EmptyPool(),
            starter=Starter(backend, watch, tokens, at_once=limits.starting, waiting=limits.waiting),
            shelf=self.shelf,
            watch=watch,
            on_changed=self._announce,
            on_gone=self._forget,
            clock=clock,
            audit=audit,
        )
        self.controller = Controller(parts)
        self.replicas.on_left.append(self.controller.replica_left)
        self.sandboxes = Sandboxes(parts, self.controller)
        shares = ShareTokens(self.routes.shared, self.routes.learn_shares if are_many else None, clock, limits.guest)
        auth.gate.take_shares(shares)
        tickets = Tickets(store)
        auth.gate.take_tickets(tickets)
        self.notices = Notices(store, self._session_lives, self._session_listens)
        self._operations = HiveOperations(
            self.sandboxes,
            backend,
            tokens,
            settings,
            audit,
            ShareTool(Sharing(parts, self.controller, self.sandboxes), audit, auth.previews),
            tickets,
            SnapshotVerbs(parts, self.controller, self.sandboxes),
            self.controller.catch_up,
            clock,
        )
        face = Face(
            self._operations,
            self.sandboxes,
            self.notices,
            catalog,
            self.ledger,
            settings,
            self._caller,
            version("ash-mcp"),
        )
        self.rest = SeedRest(self.sandboxes, settings, audit, self.controller.catch_up, store, backend)
        self._sdk_sessions = SdkSessions(face.server, lambda session_id: self._legacy.remove(session_id))
        self.manager = self._sdk_sessions.manager
        session_ids = SessionIds(key, self.replicas.id)
        self._legacy = LegacySessions(self._sdk_sessions.hold, name=session_ids.write)

        def reopen(admitted: Admitted, session_id: str) -> Awaitable[bool]:
            return gate.reopen(admitted, session_id)

        self.relay = Relay(
            routes=self.routes,
            tokens=tokens,
            ledger=self.ledger,
            sessions=self._legacy,
            explain=self._explain,
            limits=settings.relay_limits,
            forwarder=Forwarder(
                self.replicas,
                vouchers,
                settings.relay_limits,
                takes_up=lambda owner, session_id: session_ids.read(session_id, owner) is not None,
            ),
            look_up=self.routes.catch_up if settings.redis_url is not None else None,
            explain_missing_route=self._explain_missing_route,
            stale=backend.unready,
            reopen=reopen,
            is_good=shares.is_good,
        )
        gate = SessionGate(
            self._legacy,
            OpenRequestQuotas(
                with_comments(with_spliced_tools(self.manager.handle_request)),
                self.relay.services.streams,
                settings.relay_limits,
                is_good=shares.is_good,
            ),
            self._sdk_sessions.end,
            ids=session_ids,
            max_sessions_per_principal=settings.limits.sessions_per_owner,
        )
        if settings.seed_ids_are_capabilities:
            auth.gate.holder = self._holder
        store.on_flushed(self.controller.restore)
        self.app = build_app(
            gate,
            Metrics(self.ledger, self.routes, self._states),
            lambda: self.sandboxes.unready() or store.unready(),
            self.sandboxes.stopping,
            [*auth.routes, *self.rest.routes()],
            "; ".join(said for said in (auth.note, *store.warnings()) if said) or None,
        )

    async def _holder(self, uuid: str) -> SandboxId | None:
        """Return the sandbox that has a uuid of the seed's REST; one that ended lately, too, as calls say why."""
        known = self.sandboxes.registry.named(uuid)
        return known.id if known is not None and known.alias == uuid else await self.routes.holder(uuid)

    def _states(self) -> list[tuple[str, str]]:
        return [(sandbox.state.value, sandbox.recipe) for sandbox in self.sandboxes.registry.all()]

    async def _announce(self, owner: str, scope: Scope) -> None:
        await self.notices.announce(owner, scope)

    def _forget(self, sandbox_id: SandboxId) -> None:
        self.relay.forget(sandbox_id)

    @property
    def holds_sessions(self) -> bool:
        """Whether a handshake-era session lives here, whose requests other replicas forward."""
        return len(self._legacy) > 0

    def _session_lives(self, session_id: str) -> bool:
        return self._sdk_sessions.alive(session_id)

    def _session_listens(self, session_id: str) -> bool:
        return self._sdk_sessions.listens(session_id)

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

    def _explain_missing_route(self, caller: Admitted, name: str) -> AshError | None:
        """Return why a direct request has no route (its sandbox has ended, say); None if there is no such sandbox."""
        try:
            # an id, unlike a session name, is good in every scope
            self.sandboxes.ready(caller.principal, EVERY_SCOPE if "-" in name else caller.scope, name)
        except SandboxNotFound as error:
            self._operations.refused(caller, "direct door", error)
        except AshError as error:
            return error
        return None
