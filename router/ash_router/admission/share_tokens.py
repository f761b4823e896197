"""Tokens of shares: who comes with one, and at which door alone it is admitted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from ash_mcp.errors import ConnectFailed, PermissionDenied
from ash_mcp.types import DEFAULT_SCOPE, Principal, PrincipalLimits, SandboxId
from ash_mcp.wire import MCP_PATH
from ash_router.admission.base import SESSION_HEADER, Admitted, Head, Refusal
from ash_router.admission.credential_verdict import Known, Rejected, Verdict
from ash_router.admission.door_paths import DoorKind, DoorPath
from ash_router.admission.request_scope import RequestScope, address_of
from ash_router.admission.secret_tokens import is_token_of, token_pattern
from ash_router.admission.shares import SHARE_PREFIX, Share

__all__ = ["ShareTokens", "SharedSandbox", "verdict_for_share"]

LOOK_UP_SECONDS: Final = 1.0
"""How long the store is asked for a share that this process does not know."""

_PATTERN: Final = token_pattern(SHARE_PREFIX)
_REJECTED: Final = Rejected(
    "the share is unknown, revoked or expired, or its sandbox has ended; ask for a new one whoever gave it to you"
)
_ONE_DOOR: Final = (
    "a share opens one sandbox's own endpoint, /s/<sandbox>/mcp as it was given with the token, and the ports that it "
    "was made for, and nothing else here"
)


@dataclass(frozen=True, slots=True)
class SharedSandbox:
    """A share, and the sandbox that it belongs to."""

    share: Share
    sandbox_id: SandboxId
    names: frozenset[str]
    """What the sandbox may be called in a request: its id, its session, its alias."""


class ShareTokens:
    """A `Verifier` of the tokens of shares.

    Args:
        known: Finds a share by its id among those that this process knows.
        look_up: Learns of shares that other processes made, and raises `ConnectFailed` where it cannot; None where
            there are no other processes.
        limits: How much of a hive each guest may have at once.
    """

    def __init__(
        self,
        known: Callable[[str], SharedSandbox | None],
        look_up: Callable[[], Awaitable[None]] | None,
        clock: Callable[[], float],
        limits: PrincipalLimits,
    ) -> None:
        self._known = known
        self._look_up = look_up
        self._clock = clock
        self._limits = limits

    def takes(self, token: str) -> bool:
        return token.startswith(SHARE_PREFIX)

    def verify(self, token: str) -> Verdict | Awaitable[Verdict]:
        match = _PATTERN.fullmatch(token)
        if match is None:
            return _REJECTED
        found = self._known(match["id"])
        if found is None and self._look_up is not None:
            return self._verify_later(token, match["id"], self._look_up)
        return self._judge(token, found)

    def is_good(self, principal: Principal) -> bool:
        """Return whether the share of a guest who was admitted is still good; of any other principal always."""
        if principal.share is None:
            return True
        found = self._known(principal.share)
        return found is not None and not found.share.expired(self._clock())

    async def _verify_later(self, token: str, share_id: str, look_up: Callable[[], Awaitable[None]]) -> Verdict:
        try:
            async with asyncio.timeout(LOOK_UP_SECONDS):
                await look_up()
        except TimeoutError as error:
            raise ConnectFailed("the hive could not find out in time whether there is such a share") from error
        return self._judge(token, self._known(share_id))

    def _judge(self, token: str, found: SharedSandbox | None) -> Verdict:
        # an unknown share costs what a known one does
        is_its = is_token_of(token, None if found is None else found.share.sha256)
        if found is None or not is_its or found.share.expired(self._clock()):
            return _REJECTED
        subject, tools = f"share:{found.share.id}", frozenset(found.share.tools)
        principal = Principal(
            subject, limits=self._limits, sandbox=found.sandbox_id, share=found.share.id, tools=tools
        )
        return Known(principal, subject, found.names, found.share)


def verdict_for_share(asked: RequestScope, known: Known, head: Head, url: str) -> Admitted | Refusal:
    """Return the verdict on a request with a good share: admitted at its sandbox's endpoint, as `/mcp`, or a port.

    Every other request gets the same refusal, whether what it names exists or not.
    """
    named = head.all(SESSION_HEADER)
    is_door = asked.path == MCP_PATH
    if asked.door is not None:
        named.append(asked.door.name)
        is_door = asked.door.kind is DoorKind.MCP or _opens(known, asked.door)
    if not is_door or not named or known.names is None or not known.names.issuperset(named):
        return Refusal(PermissionDenied(_ONE_DOOR))
    is_port = asked.door is not None and asked.door.kind is DoorKind.PORTS
    path = asked.path if is_port else MCP_PATH
    return Admitted(known.principal, DEFAULT_SCOPE, path, None, known.by, address_of(head.client), url)


def _opens(known: Known, door: DoorPath) -> bool:
    """Return whether a door is that of a port which a share opens."""
    ports = known.share.ports if known.share is not None else ()
    return door.kind is DoorKind.PORTS and door.port in ports
