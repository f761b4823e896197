"""The admission of a hive. Checks, in this order: `Host` and `Origin`, path, credential or peer, scope.

A request to a preview's host is decided on by `preview_hosts.py` alone: nothing below applies to it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from ash_mcp import errors
from ash_mcp.errors import AshError
from ash_mcp.types import DEFAULT_SCOPE, Principal, SandboxId
from ash_mcp.wire import HEADER_SEED_ROUTER, MCP_PATH
from ash_router.admission.base import LOCAL, NOBODY, SESSION_HEADER, Admitted, Head, Refusal
from ash_router.admission.bearer import RESOURCE_METADATA_PATH, Credentials, challenge, token_in
from ash_router.admission.credential_verdict import Known, Rejected, Verdict
from ash_router.admission.door_paths import DoorKind
from ash_router.admission.host_names import NameRules
from ash_router.admission.peers import Peers
from ash_router.admission.preview_hosts import PreviewGate, PreviewNames
from ash_router.admission.request_scope import RequestScope, address_of, read_request_scope
from ash_router.admission.share_tokens import ShareTokens, verdict_for_share
from ash_router.admission.tickets import Tickets, ticket_in, without_ticket

__all__ = ["HEALTH_PATH", "METRICS_PATH", "READY_CALLS_PATH", "READY_PATH", "Gate"]

HEALTH_PATH: Final = "/healthz"
READY_PATH: Final = "/readyz"
READY_CALLS_PATH: Final = "/readyz/calls"
"""Open wherever `READY_PATH` is."""
METRICS_PATH: Final = "/metrics"

_SEED_UUID: Final = re.compile(r"[a-z0-9-]{1,63}-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SEED_ROUTER: Final = HEADER_SEED_ROUTER.encode()
_RETRY_SECONDS: Final = 10


class Gate:
    """The `Admission` of a hive.

    Args:
        credentials: Verifies bearer tokens. A token that is sent must be valid, even where none is needed.
        local: Whether a request without a token may be admitted as `LOCAL`; only on a loopback address.
        peers: Checks the user of a connection without a token; None accepts every user.
        open_paths: Paths that need no credential, besides `/healthz` and the description of the resource.
        public_url: The hive's URL as clients outside know it, without a path, if a proxy stands before it.
        previews: The names of its previews' hosts; None: it has none.
        has_ended: Whether a credential that was good once, as `Known.by`, is so no more; tickets end with it.
    """

    def __init__(
        self,
        names: NameRules,
        credentials: Credentials,
        *,
        local: bool,
        peers: Peers | None = None,
        open_paths: Iterable[str] = (),
        public_url: str | None = None,
        previews: PreviewNames | None = None,
        has_ended: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._names = names
        self._credentials = credentials
        self._local = local
        self._peers = peers
        opened = {HEALTH_PATH, *open_paths, *({READY_PATH} if local else ())}
        self._open = frozenset(opened | ({READY_CALLS_PATH} if READY_PATH in opened else set()))
        self._public_url = public_url.rstrip("/") if public_url is not None else None
        self._has_ended = has_ended
        self._tickets: Tickets | None = None
        self._preview_names = previews
        self._previews: PreviewGate | None = None
        self.holder: Callable[[str], Awaitable[SandboxId | None]] | None = None
        """Returns the sandbox that a uuid of the seed's REST gives access to; None: no uuid gives any."""

    def take_shares(self, tokens: ShareTokens) -> None:
        """Admit also who comes with the token of a share."""
        self._credentials.add(tokens)
        if self._preview_names is not None:
            self._previews = PreviewGate(self._preview_names, tokens.verify, self._credentials.are_in)

    def take_tickets(self, tickets: Tickets) -> None:
        """Admit also a request to a file that ends with a good ticket; it needs no other credential."""
        self._tickets = tickets

    def base_url(self, head: Head) -> str:
        """Return the hive's URL, without a path, as the caller of an admitted request knows it."""
        return self._public_url or self._names.base_url(head)

    def admit(self, head: Head) -> Admitted | Refusal | Awaitable[Admitted | Refusal]:
        if head.all(_SEED_ROUTER):
            return Refusal(errors.SandboxNotFound("route not found"))  # it would lend its own right to come in
        verdict = self._previews.admit(head) if self._previews is not None else None
        if verdict is not None:
            return verdict
        refusal = self._names.check(head)
        asked = refusal or read_request_scope(head)
        if isinstance(asked, Refusal):
            return asked
        if self._is_open(asked.path):
            return Admitted(NOBODY, DEFAULT_SCOPE, asked.path)
        sent = head.all(b"authorization")
        if not sent:
            ticket = ticket_in(head.target) if asked.door is not None and asked.door.kind is DoorKind.FILES else None
            if ticket is not None and self._tickets is not None:
                return self._by_ticket(head, asked, ticket, self._tickets)
            refusal = self._without_credential(head, asked)
            named = head.all(SESSION_HEADER) if isinstance(refusal, Refusal) and asked.path == MCP_PATH else []
            if self.holder is None or len(named) != 1 or _SEED_UUID.fullmatch(named[0]) is None:
                return refusal
            return self._by_uuid(head, asked, refusal, self.holder(named[0]))
        token = token_in(sent[0])
        if len(sent) > 1 or not token:
            return self._unauthenticated(head, Rejected("send one Authorization header: Bearer and a token"))
        verdict = self._credentials.verify(token)
        if isinstance(verdict, Known | Rejected):
            return self._decided(head, asked, verdict)
        return self._decide(head, asked, verdict)

    def _is_open(self, path: str) -> bool:
        return path in self._open or path == RESOURCE_METADATA_PATH or path.startswith(f"{RESOURCE_METADATA_PATH}/")

    async def _by_ticket(self, head: Head, asked: RequestScope, token: str, tickets: Tickets) -> Admitted | Refusal:
        assert asked.door is not None
        sandbox = SandboxId(asked.door.name)
        try:
            ticket = await tickets.take(sandbox, token, head.method, without_ticket(head.target))
        except AshError as error:
            return Refusal(error, status=503, headers=(("Retry-After", str(_RETRY_SECONDS)),))
        if ticket is None or self._has_ended(ticket.by):
            words = (
                "the ticket was used, has expired, is for another request, or its sandbox or the key that made it has "
                "ended; ask for a new one"
            )
            return self._unauthenticated(head, None, words)
        # no other sandbox of its owner: the name is an id, and the door has been chosen
        principal = Principal(ticket.owner, sandbox=sandbox)
        return Admitted(
            principal,
            DEFAULT_SCOPE,
            asked.path,
            by=f"ticket:{ticket.id}",
            client=address_of(head.client),
            url=self.base_url(head),
            max_bytes=ticket.max_bytes,
        )

    async def _by_uuid(
        self, head: Head, asked: RequestScope, refusal: Admitted | Refusal, sought: Awaitable[SandboxId | None]
    ) -> Admitted | Refusal:
        sandbox = await sought
        if sandbox is None:
            return refusal
        return asked.verdict_for(Known(Principal(f"holder of {sandbox}", sandbox=sandbox), "uuid"), head.client)

    async def _decide(self, head: Head, asked: RequestScope, verdict: Awaitable[Verdict]) -> Admitted | Refusal:
        try:
            return self._decided(head, asked, await verdict)
        except AshError as error:
            # not 401: the token may be good, and a client would throw it away
            return Refusal(error, status=503, headers=(("Retry-After", str(_RETRY_SECONDS)),))

    def _decided(self, head: Head, asked: RequestScope, verdict: Verdict) -> Admitted | Refusal:
        if isinstance(verdict, Rejected):
            return self._unauthenticated(head, verdict)
        if verdict.names is not None:
            return verdict_for_share(asked, verdict, head, self.base_url(head))
        if asked.path == METRICS_PATH and verdict.principal.subject != LOCAL.subject:
            # they count everybody's sandboxes
            return Refusal(
                errors.PermissionDenied(
                    "metrics are for the hive's operator: use a key of subject 'local', "
                    "or open them with ASH_HUB_AUTH__OPEN_PATHS"
                )
            )
        return asked.verdict_for(verdict, head.client, self.base_url(head))

    def _without_credential(self, head: Head, asked: RequestScope) -> Admitted | Refusal:
        if not self._local:
            return self._unauthenticated(
                head,
                None,
                "this hive wants a bearer token: an API key (ash key new), or one of its login provider if it has any",
            )
        if self._peers is None or self._peers.welcome(head.connection, head.client, head.server):
            known = Known(LOCAL, "peer" if self._peers is not None else "")
            return asked.verdict_for(known, head.client, self.base_url(head))
        return self._unauthenticated(
            head,
            None,
            "this hive serves the user who runs it, and you are another: ask for an API key (ash key new); "
            "its operator can let every local user in with ASH_HUB_AUTH__PEER_CHECK=false",
        )

    def _unauthenticated(self, head: Head, rejected: Rejected | None, words: str = "") -> Refusal:
        challenged = challenge(self.base_url(head), rejected)
        if rejected is not None and rejected.missing_scopes:
            return Refusal(errors.PermissionDenied(rejected.why), headers=(challenged,))
        return Refusal(errors.Unauthenticated(rejected.why if rejected is not None else words), headers=(challenged,))
