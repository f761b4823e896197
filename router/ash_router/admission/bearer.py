"""Bearer tokens of every kind, and the challenge to a request without a good one. No I/O of its own."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final

from ash_mcp.wire import MCP_PATH
from ash_router.keys import KEY_PREFIX
from ash_router.verdicts import Rejected, Verdict, Verifier

__all__ = ["RESOURCE_METADATA_PATH", "Credentials", "challenge"]

RESOURCE_METADATA_PATH: Final = "/.well-known/oauth-protected-resource"
"""Where RFC 9728 wants the hive described as a protected resource; the path of the resource may follow."""

_MAX_TOKEN: Final = 16 * 1024


class Credentials:
    """Every kind of token that a hive takes; which kind one is shows in its form."""

    def __init__(self, *, keys: Verifier, tokens: Verifier | None = None) -> None:
        self._keys = keys
        self._tokens = tokens

    def verify(self, token: str) -> Verdict | Awaitable[Verdict]:
        """Say who the bearer of `token` is; raises as `Verifier.verify` does."""
        if token.startswith(KEY_PREFIX):
            return self._keys.verify(token)
        if self._tokens is not None and token.count(".") == 2 and len(token) <= _MAX_TOKEN:
            return self._tokens.verify(token)
        return Rejected("the bearer token is not one that this hive knows; check ASH_TOKEN, or leave it out")


def challenge(base_url: str, rejected: Rejected | None = None) -> tuple[str, str]:
    """Return the `WWW-Authenticate` header of a refusal (RFC 6750, RFC 9728).

    Args:
        base_url: The hive's own, without a path; it holds no quote.
        rejected: What was wrong with the token that came, if one came.
    """
    parts = [f'resource_metadata="{base_url}{RESOURCE_METADATA_PATH}{MCP_PATH}"']
    if rejected is not None and rejected.missing_scopes:
        parts += ['error="insufficient_scope"', f'scope="{" ".join(rejected.missing_scopes)}"']
    elif rejected is not None:
        parts.append('error="invalid_token"')
    return "WWW-Authenticate", "Bearer " + ", ".join(parts)
