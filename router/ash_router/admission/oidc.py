"""Tokens of an OpenID provider: JWTs, checked against the provider's keys (`jwks.py`)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import jwt

from ash_mcp.types import Principal
from ash_router.admission.credential_verdict import Known, Rejected, Verdict
from ash_router.admission.jwks import ProviderKeys

__all__ = ["Oidc", "OidcRules"]

ALGORITHMS: Final = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
"""Asymmetric ones only: with an HMAC the public key would be the secret."""

_MAX_TOKEN: Final = 16 * 1024
_CLAIMS: Final = re.compile(r"\.(?=(e[wy][A-Za-z0-9_-]{14,})\.)")
"""What may be the claims of a JWT, between its two points."""
_MAX_CACHE_SECONDS: Final = 60.0
_MAX_CACHED: Final = 10_000
_LEEWAY_SECONDS: Final = 10.0
"""The accepted difference between the provider's clock and ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OidcRules:
    """The claims that a token must have."""

    issuer: str
    audience: tuple[str, ...]
    """The accepted audiences: tokens for other services of the same provider are refused."""
    required_scopes: tuple[str, ...] = ()
    subject_claim: str = "sub"
    """The claim that becomes the principal's subject; the provider must never give one value to two people."""


class Oidc:
    """A `Verifier` of the tokens of one provider. A valid token is not checked again for a minute."""

    def __init__(
        self,
        rules: OidcRules,
        keys: ProviderKeys,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = rules
        self._keys = keys
        self._clock = clock
        self._monotonic = monotonic
        self._cache: dict[bytes, tuple[Known, float]] = {}

    def takes(self, token: str) -> bool:
        return token.count(".") == 2 and len(token) <= _MAX_TOKEN

    def verify(self, token: str) -> Verdict | Awaitable[Verdict]:
        digest = hashlib.sha256(token.encode()).digest()
        cached = self._cache.get(digest)
        if cached is not None:
            if self._monotonic() < cached[1]:
                return cached[0]
            del self._cache[digest]
        return self._check(token, digest)

    def is_issued(self, text: str) -> bool:
        """Return whether a text holds a token that names this provider, good or not."""
        for found in _CLAIMS.finditer(text):
            try:
                claims: Any = json.loads(base64.urlsafe_b64decode(f"{found[1]}=="))
            except (ValueError, RecursionError):
                continue
            if isinstance(claims, dict) and cast("dict[str, Any]", claims).get("iss") == self._rules.issuer:
                return True
        return False

    async def _check(self, token: str, digest: bytes) -> Verdict:
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            return Rejected("the bearer token is not a JWT")
        if header.get("alg") not in ALGORITHMS:
            return Rejected(f"tokens signed with {str(header.get('alg'))[:20]!r} are not taken")
        kid: Any = header.get("kid")
        key = await self._keys.get(kid if isinstance(kid, str) else None)
        if key is None:
            return Rejected("the token is signed with a key that its issuer does not have")
        try:
            claims = self._decode(token, key)
        except jwt.ExpiredSignatureError:
            return Rejected("the token has expired; log in again")
        except (jwt.InvalidTokenError, jwt.PyJWTError) as exc:
            return Rejected(f"the token is not good: {exc}")
        verdict = self._judge(claims)
        if isinstance(verdict, Known):
            self._remember(digest, verdict, float(claims["exp"]))
        return verdict

    def _decode(self, token: str, key: jwt.PyJWK) -> Mapping[str, Any]:
        return jwt.decode(
            token,
            key,
            algorithms=ALGORITHMS,
            audience=self._rules.audience,
            issuer=self._rules.issuer,
            leeway=_LEEWAY_SECONDS,
            options={"require": ["exp", "iss", "aud"], "verify_signature": True},
        )

    def _judge(self, claims: Mapping[str, Any]) -> Verdict:
        subject: Any = claims.get(self._rules.subject_claim)
        if not isinstance(subject, str) or not subject:
            return Rejected(f"the token has no {self._rules.subject_claim!r} that names its bearer")
        granted = set(_granted(claims))
        missing = tuple(scope for scope in self._rules.required_scopes if scope not in granted)
        if missing:
            return Rejected(f"the token lacks the scopes {', '.join(missing)}", missing)
        return Known(Principal(f"{self._rules.issuer}#{subject}"), "oidc")

    def _remember(self, digest: bytes, known: Known, expires_at: float) -> None:
        seconds = min(_MAX_CACHE_SECONDS, expires_at - self._clock())
        if seconds <= 0:
            return
        if len(self._cache) >= _MAX_CACHED:
            self._cache.clear()
        self._cache[digest] = (known, self._monotonic() + seconds)


def _granted(claims: Mapping[str, Any]) -> Iterable[str]:
    """Return the scopes of a token, which providers write as a string or a list, under either of two names."""
    for name in ("scope", "scp"):
        value: Any = claims.get(name)
        if isinstance(value, str):
            yield from value.split()
        elif isinstance(value, list):
            yield from (str(item) for item in cast("list[Any]", value))
