"""The relay of a router for the seed's routes: every request goes to the server of its uuid, or is refused.

It knows no route, key or session of a hive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_mcp.errors import AshError, StreamBroken
from ash_mcp.types import DEFAULT_SCOPE, SandboxId, SessionName
from ash_mcp.wire import http_status
from ash_router.admission.base import Admitted, Refusal
from ash_router.bounds.limits import RelayLimits
from ash_router.caller.relay import Relay, RelayProtocol
from ash_router.calls.direct import DirectRequest
from ash_router.http.framing import unframed_problem
from ash_router.http.heads import RequestHead
from ash_router.ledger import Ledger
from ash_router.routes import Route, Routes
from ash_router.seed.seed_passage import SEED_DOOR, SeedPassage, forwarded_lines, rest_of, text_refusal
from ash_router.seed.uuid_admission import UuidAdmitted
from ash_router.sessions.session_map import LegacySessions
from ash_router.store.memory import MemoryStore
from ash_router.upstream.call_tokens import CallTokens

__all__ = ["SeedRelay"]


class SeedRelay(Relay):
    """The data plane of a router for the seed's routes.

    Args:
        answer_seconds: How long a server may take until its answer begins.
    """

    def __init__(self, limits: RelayLimits, answer_seconds: float) -> None:
        super().__init__(
            routes=Routes(MemoryStore()),
            tokens=CallTokens(Ed25519PrivateKey.generate()),  # of no hive: none is ever sent
            ledger=Ledger(),
            sessions=LegacySessions(lambda _: None),
            explain=_unexplained,
            limits=replace(limits, max_idle_upstreams=0),  # an address may be another server's by the next request
            problem_of=unframed_problem,
        )
        self.answer_seconds = answer_seconds

    @property
    def protocol_class(self) -> type[RelayProtocol]:
        return _SeedProtocol

    def direct_request(self, admitted: Admitted, method: str, head: RequestHead) -> DirectRequest | Refusal | None:
        if not isinstance(admitted, UuidAdmitted):
            return None
        uuid = admitted.principal.subject
        route = Route(
            sandbox_id=SandboxId(uuid),
            owner=uuid,
            scope=DEFAULT_SCOPE,
            session=SessionName(""),
            endpoint=admitted.endpoint,
        )
        return DirectRequest(admitted.principal, route, method, SEED_DOOR, rest_of(head.target))


class _SeedProtocol(RelayProtocol):
    """One connection of a caller of the seed's."""

    def _passage_to(self, direct: DirectRequest) -> SeedPassage:
        client = self.client[0] if self.client is not None else ""
        relay = cast("SeedRelay", self.relay)
        return SeedPassage(
            self,
            direct,
            self._head,
            forwarded_lines(self._head.headers, client, self.scheme or "http"),
            relay.services,
            answer_seconds=relay.answer_seconds,
            paused=self.flow.write_paused,
        )

    def _refusal(self, error: AshError, status: int | None, headers: Sequence[tuple[str, str]]) -> bytes:
        del headers
        asked: Any = self.scope or {}
        return text_refusal(self, error.message, error, status or http_status(error), asked.get("method", ""))


async def _unexplained(route: Route) -> AshError:
    del route
    return StreamBroken("the server broke off")
