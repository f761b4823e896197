"""The gate of a hive: names, then the path, then the credential or the peer, then the scope."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import Final

from ash_mcp import errors
from ash_mcp.errors import AshError
from ash_mcp.types import DEFAULT_SCOPE
from ash_router.admission import LOCAL, NOBODY, Admitted, Head, Refusal
from ash_router.asked import Asked, read_asked
from ash_router.credentials import RESOURCE_METADATA_PATH, Credentials, challenge
from ash_router.names import NameRules
from ash_router.peers import Peers
from ash_router.verdicts import Known, Rejected, Verdict

__all__ = ["HEALTH_PATH", "METRICS_PATH", "READY_PATH", "Gate"]

HEALTH_PATH: Final = "/healthz"
READY_PATH: Final = "/readyz"
METRICS_PATH: Final = "/metrics"

_RETRY_SECONDS: Final = 10


class Gate:
    """The `Admission` of a hive.

    Args:
        credentials: What bearer tokens prove; a token that comes must be good, also where none is needed.
        local: Whether a request without a token may be the local user's: on a loopback address only.
        peers: Finds out whether a connection without a token is the local user's; None believes every one.
        open_paths: Paths that answer without a credential, beside `/healthz` and the description of the resource.
        public_url: The hive's URL for the outside, without a path, where a proxy stands before it.
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
    ) -> None:
        self._names = names
        self._credentials = credentials
        self._local = local
        self._peers = peers
        self._open = frozenset({HEALTH_PATH, *open_paths, *({READY_PATH} if local else ())})
        self._public_url = public_url.rstrip("/") if public_url is not None else None

    def base_url(self, head: Head) -> str:
        """Return the hive's URL, without a path, as the caller of an admitted request knows it."""
        return self._public_url or self._names.base_url(head)

    def admit(self, head: Head) -> Admitted | Refusal | Awaitable[Admitted | Refusal]:
        refusal = self._names.check(head)
        asked = refusal or read_asked(head)
        if isinstance(asked, Refusal):
            return asked
        if self._is_open(asked.path):
            return Admitted(NOBODY, DEFAULT_SCOPE, asked.path)
        sent = head.all(b"authorization")
        if not sent:
            return self._without_credential(head, asked)
        scheme, _, token = sent[0].partition(" ")
        if len(sent) > 1 or scheme.lower() != "bearer" or not token.strip():
            return self._unauthenticated(head, Rejected("send one Authorization header: Bearer and a token"))
        verdict = self._credentials.verify(token.strip())
        if isinstance(verdict, Known | Rejected):
            return self._decided(head, asked, verdict)
        return self._decide(head, asked, verdict)

    def _is_open(self, path: str) -> bool:
        return path in self._open or path == RESOURCE_METADATA_PATH or path.startswith(f"{RESOURCE_METADATA_PATH}/")

    async def _decide(self, head: Head, asked: Asked, verdict: Awaitable[Verdict]) -> Admitted | Refusal:
        try:
            return self._decided(head, asked, await verdict)
        except AshError as error:
            # not 401: the token may be good, and a client would throw it away
            return Refusal(error, status=503, headers=(("Retry-After", str(_RETRY_SECONDS)),))

    def _decided(self, head: Head, asked: Asked, verdict: Verdict) -> Admitted | Refusal:
        if isinstance(verdict, Rejected):
            return self._unauthenticated(head, verdict)
        if asked.path == METRICS_PATH and verdict.principal.subject != LOCAL.subject:
            # they count everybody's sandboxes
            return Refusal(
                errors.PermissionDenied(
                    "metrics are for the hive's operator: use a key of subject 'local', "
                    "or open them with ASH_HUB_AUTH__OPEN_PATHS"
                )
            )
        return asked.granted(verdict, head.client)

    def _without_credential(self, head: Head, asked: Asked) -> Admitted | Refusal:
        if not self._local:
            return self._unauthenticated(
                head,
                None,
                "this hive wants a bearer token: an API key (ash key new), or one of its login provider if it has any",
            )
        if self._peers is None or self._peers.welcome(head.connection, head.client, head.server):
            return asked.granted(Known(LOCAL, "peer" if self._peers is not None else ""), head.client)
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
