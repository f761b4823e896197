"""The outcome of checking a credential. Pure."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from ash_mcp.types import Principal
from ash_router.admission.shares import Share

__all__ = ["Known", "Rejected", "Verdict", "Verifier"]


@dataclass(frozen=True, slots=True)
class Known:
    """The verdict on a valid credential."""

    principal: Principal
    by: str
    """Which credential it was, for the audit: `key:<id>`, `oidc` or `share:<id>`. Never a secret."""
    names: frozenset[str] | None = None
    """With a share, the names of the one sandbox whose endpoint it opens; None for every other credential."""
    share: Share | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """The verdict on an invalid credential."""

    why: str
    """The reason, for the caller; it does not help to guess a credential."""
    missing_scopes: tuple[str, ...] = ()
    """OAuth scopes that a valid token lacks."""


Verdict = Known | Rejected


class Verifier(Protocol):
    """Verifies tokens of one kind."""

    def takes(self, token: str) -> bool:
        """Return whether `token` has the form of this kind, valid or not; no two kinds share a form."""
        ...

    def verify(self, token: str) -> Verdict | Awaitable[Verdict]:
        """Return the verdict on `token`, or an awaitable of it where that takes I/O.

        Raises:
            ConnectFailed: The issuer cannot be reached. Raised by the awaitable only.
        """
        ...
