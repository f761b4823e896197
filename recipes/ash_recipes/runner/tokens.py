"""The check of call tokens: that a request comes from this sandbox's own hive."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Self

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ash_recipes.runner.config import RunnerConfig

__all__ = ["TokenCheck"]

_LEEWAY_SECONDS = 15
"""Clocks of two machines may differ by so much."""
_MAX_REMEMBERED = 64


class TokenCheck:
    """Verifies a token once and remembers it until it expires.

    Args:
        public_key: Base64 of the 32 raw bytes; empty admits every request.

    Raises:
        ValueError: The key is not one.
    """

    def __init__(self, public_key: str, *, sandbox_id: str, clock: Callable[[], float] = time.time) -> None:
        raw = base64.b64decode(public_key, validate=True) if public_key else b""
        self._key = Ed25519PublicKey.from_public_bytes(raw) if raw else None
        self._sandbox_id = sandbox_id
        self._clock = clock
        self._good_until: dict[bytes, float] = {}

    @classmethod
    def of(cls, config: RunnerConfig) -> Self:
        return cls(config.public_key, sandbox_id=config.sandbox_id)

    def admits(self, token: bytes | None) -> bool:
        """Say whether a request with this `Ash-Token` may come in."""
        if self._key is None:
            return True
        if token is None:
            return False
        known = self._good_until.get(token)
        if known is not None and known > self._clock():
            return True
        return self._verify(token, self._key)

    def _verify(self, token: bytes, key: Ed25519PublicKey) -> bool:
        try:
            # PyJWT reads the real clock; expiry is checked below by ours.
            claims = jwt.decode(
                token,
                key,
                algorithms=["EdDSA"],
                audience=self._sandbox_id,
                issuer="ash",
                options={"require": ["exp", "aud", "iss"], "verify_exp": False, "verify_iat": False},
            )
        except jwt.InvalidTokenError:
            return False
        expires = claims.get("exp")
        if not isinstance(expires, int | float):
            return False
        until = float(expires) + _LEEWAY_SECONDS
        if until <= self._clock():
            return False
        if len(self._good_until) >= _MAX_REMEMBERED:
            self._good_until.clear()
        self._good_until[token] = until
        return True
