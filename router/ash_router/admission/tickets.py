"""Tickets: each is good for one request to one file of one sandbox, and is all that the request needs.

A ticket stands at the end of the URL that it is made for. The store has its hash, over method and path as well, so
that with another of these it is nobody's. Whoever sends it first has used it, whatever becomes of the request.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ash_mcp.types import SandboxId
from ash_router.admission.secret_tokens import new_token, token_pattern

__all__ = ["TICKETS_PER_SANDBOX", "TICKET_PREFIX", "Ticket", "TicketStore", "Tickets", "ticket_in", "without_ticket"]

TICKET_PREFIX: Final = "asht_"
TICKETS_PER_SANDBOX: Final = 256
"""That are not used yet."""

_AT_END: Final = re.compile(rb"(.*)[?&]ticket=([^&]*)", re.DOTALL)
_PATTERN: Final = token_pattern(TICKET_PREFIX)


class TicketStore(Protocol):
    """What of the store tickets need; see `ash_router.store.base.Store`."""

    async def put_ticket(
        self, sandbox_id: SandboxId, digest: str, text: str, *, ttl_seconds: float, most: int
    ) -> None: ...

    async def take_ticket(self, sandbox_id: SandboxId, digest: str, by: str) -> str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What a ticket is good for."""

    id: str
    """The public part of the token, for the audit."""
    owner: str
    """Whose sandbox it is; the request counts for them."""
    by: str = ""
    """The credential that made it, as `Known.by`; it ends with that."""
    max_bytes: int | None = None
    """How long the request's body may be; None: as long as it likes."""


def ticket_in(target: bytes) -> str | None:
    """Return the ticket that a request's target ends with; None if there is none."""
    found = _AT_END.fullmatch(target)
    return None if found is None else found[2].decode("latin-1")


def without_ticket(target: bytes) -> bytes:
    """Return a target without the ticket at its end: no sandbox sees one."""
    found = _AT_END.fullmatch(target)
    return target if found is None else found[1]


class Tickets:
    """The tickets of a hive's sandboxes."""

    def __init__(self, store: TicketStore) -> None:
        self._store = store

    async def mint(
        self,
        sandbox: SandboxId,
        owner: str,
        method: str,
        target: bytes,
        *,
        by: str,
        ttl_seconds: float,
        max_bytes: int | None,
    ) -> tuple[Ticket, str]:
        """Return a new ticket, and the target of the request that it is good for.

        Args:
            target: Path and query of that request, without the hive's URL.
            by: Which credential makes it, as `Known.by`.

        Raises:
            CapacityExceeded: The sandbox has as many as it may.
            ConnectFailed: The store is away.
        """
        ticket_id, token = new_token(TICKET_PREFIX)
        said = [owner, max_bytes, by]
        digest = _digest(token, method, target)
        await self._store.put_ticket(
            sandbox, digest, json.dumps(said), ttl_seconds=ttl_seconds, most=TICKETS_PER_SANDBOX
        )
        mark = "&" if b"?" in target else "?"
        return Ticket(
            id=ticket_id, owner=owner, by=by, max_bytes=max_bytes
        ), f"{target.decode('ascii')}{mark}ticket={token}"

    async def take(self, sandbox: SandboxId, token: str, method: str, target: bytes) -> Ticket | None:
        """Return what a ticket is good for, and use it up; None if it is not good for this request, or no more.

        Args:
            target: Of the request, without the ticket.

        Raises:
            ConnectFailed: The store is away, and nothing was used up.
        """
        match = _PATTERN.fullmatch(token)
        if match is None:
            return None
        text = await self._store.take_ticket(sandbox, _digest(token, method, target), secrets.token_hex(16))
        if text is None:
            return None
        said: Sequence[str | int | None] = json.loads(text)
        if len(said) != 3:
            return None  # of another release's replica
        owner, most, by = said
        return Ticket(id=match["id"], owner=str(owner), by=str(by), max_bytes=most if isinstance(most, int) else None)


def _digest(token: str, method: str, target: bytes) -> str:
    return hashlib.sha256(b"\n".join([token.encode("latin-1"), method.encode(), target])).hexdigest()
