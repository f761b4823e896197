"""Bearer tokens of every kind, and the challenge to a request without a good one. No I/O of its own."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable
from typing import Final

from ash_mcp.wire import MCP_PATH
from ash_router.admission.credential_verdict import Rejected, Verdict, Verifier

__all__ = ["RESOURCE_METADATA_PATH", "Credentials", "challenge", "token_in"]

RESOURCE_METADATA_PATH: Final = "/.well-known/oauth-protected-resource"
"""The path of the hive's description as a protected resource (RFC 9728); the resource's own path may follow."""

_OF_HIVE: Final = re.compile(r"(?<![A-Za-z0-9])ash[st]?_[a-z2-7]{10}_")
"""How API keys and tokens of shares and tickets begin."""
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]{20,}")
"""What in base64 is long enough to hold a token."""


class Credentials:
    """The verifiers of a hive, one for each kind of token; the form of a token selects its verifier.

    Args:
        is_issued: Whether a text holds a token of the hive's login provider.
    """

    def __init__(self, *verifiers: Verifier, is_issued: Callable[[str], bool] = lambda _: False) -> None:
        self._verifiers = list(verifiers)
        self._is_issued = is_issued

    def add(self, verifier: Verifier) -> None:
        """Take one more kind of token."""
        self._verifiers.append(verifier)

    def verify(self, token: str) -> Verdict | Awaitable[Verdict]:
        """Return the verdict on `token`, or an awaitable of it; raises as `Verifier.verify` does."""
        for verifier in self._verifiers:
            if verifier.takes(token):
                return verifier.verify(token)
        return Rejected("the bearer token is not one that this hive knows; check ASH_TOKEN, or leave it out")

    def are_in(self, authorization: str) -> bool:
        """Return whether an `Authorization` holds a token for this hive, good or not, also within `Basic`."""
        texts = [authorization, *map(_decoded, _BASE64.findall(authorization))]
        return any(_OF_HIVE.search(text) is not None or self._is_issued(text) for text in texts)


def token_in(authorization: str) -> str:
    """Return the token in the value of an `Authorization` header; empty if it has none.

    Clients that are configured by URL alone send it as the user of `http://TOKEN@host`, which becomes `Basic`.
    """
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value.strip(), validate=True).decode("ascii").partition(":")[0]
    except ValueError:
        return ""


def _decoded(word: str) -> str:
    """Return what a word is in base64, with or without its padding; empty if it is nothing."""
    try:
        return base64.b64decode(f"{word}==", b"-_").decode("latin-1")
    except binascii.Error:
        return ""


def challenge(base_url: str, rejected: Rejected | None = None) -> tuple[str, str]:
    """Return the `WWW-Authenticate` header of a refusal (RFC 6750, RFC 9728).

    Args:
        base_url: The hive's URL without a path; it contains no quote.
        rejected: The verdict on the request's token; None if it had none.
    """
    parts = [f'resource_metadata="{base_url}{RESOURCE_METADATA_PATH}{MCP_PATH}"']
    if rejected is not None and rejected.missing_scopes:
        parts += ['error="insufficient_scope"', f'scope="{" ".join(rejected.missing_scopes)}"']
    elif rejected is not None:
        parts.append('error="invalid_token"')
    return "WWW-Authenticate", "Bearer " + ", ".join(parts)
