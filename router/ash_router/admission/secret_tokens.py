"""Random tokens of the form `<prefix><id>_<secret>`: made, shown once, and known again by their hash. Pure."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Final

__all__ = ["LABEL", "digest_of", "is_token_of", "new_label", "new_token", "token_pattern"]

_BASE32: Final = "abcdefghijklmnopqrstuvwxyz234567"
_NOBODY: Final = "0" * 64

LABEL: Final = r"(?P<id>[a-z2-7]{10})[a-z2-7]{10}"
"""The pattern of labels: too long for a session's name. A label begins with the id of its token."""


def token_pattern(prefix: str) -> re.Pattern[str]:
    """Return the pattern of whole tokens with this prefix: a distinct form, so that scanners find leaked ones."""
    return re.compile(re.escape(prefix) + r"(?P<id>[a-z2-7]{10})_(?P<secret>[a-z2-7]{52})")


def new_token(prefix: str) -> tuple[str, str]:
    """Return the id of a new token, which is no secret, and its full text with 256 random bits."""
    token_id = _random(10)
    number = secrets.randbits(256)
    secret = "".join(_BASE32[(number >> shift) & 31] for shift in range(0, 260, 5))
    return token_id, f"{prefix}{token_id}_{secret}"


def new_label(token_id: str) -> str:
    """Return a new label for host names: 100 random bits, the id's among them, so that nobody guesses one."""
    return token_id + _random(10)


def digest_of(token: str) -> str:
    """Return the SHA-256 of a token, in hexadecimal.

    A fast hash is enough: nobody can guess a secret of 256 random bits, and each request is checked against it.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def is_token_of(token: str, digest: str | None) -> bool:
    """Return whether `token` has this digest; one of nobody (None) costs what one of somebody does."""
    return hmac.compare_digest(digest_of(token), _NOBODY if digest is None else digest) and digest is not None


def _random(characters: int) -> str:
    return "".join(secrets.choice(_BASE32) for _ in range(characters))
