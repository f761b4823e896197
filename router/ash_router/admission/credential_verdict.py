"""The outcome of checking a credential. Pure."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from ash_mcp.types import Principal

__all__ = ["Known", "Rejected", "Verdict", "Verifier"]


@dataclass(frozen=True, slots=True)
class Known:
    """A credential that is good."""

    principal: Principal
    by: str
    """Which credential it was, for the audit: `key:<id>` or `oidc`. Never a secret."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A credential that is not."""

    why: str
    """For the caller; says nothing that would help to guess."""
    missing_scopes: tuple[str, ...] = ()
    """What a token would need that is good but not enough."""


Verdict = Known | Rejected


class Verifier(Protocol):
    """Knows tokens of one kind. Answers at once where it can, and awaitably where it must ask somebody."""

    def takes(self, token: str) -> bool:
        """Say whether `token` has the form of this kind, good or not; no two kinds share a form."""
        ...

    def verify(self, token: str) -> Verdict | Awaitable[Verdict]:
        """Say who the bearer of `token` is.

        Raises:
            ConnectFailed: Nobody can say now. Comes from the awaitable only.
        """
        ...
