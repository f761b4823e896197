"""Call tokens: the proof that a call to a sandbox comes from its own hive.

Signed by the hive's Ed25519 key for one sandbox id. The runner holds only the public key, so that
no sandbox can call another and nothing secret is stored for one.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from pathlib import Path

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_mcp.errors import ConfigError
from ash_mcp.types import SandboxId
from ash_router.upstream.proof import SandboxKeys

__all__ = ["CallTokens", "load_hive_key", "new_hive_key", "read_hive_key"]

_MAX_CACHED = 20_000


def load_hive_key(path: Path) -> Ed25519PrivateKey:
    """Return the hive's key, made on first use in a file that only its owner can read.

    Raises:
        ConfigError: The file is not such a key, or others can read it.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return _create(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"others can read the hive's key; run: chmod 600 {path}")
    return read_hive_key(text, str(path))


def read_hive_key(pem: bytes, where: str) -> Ed25519PrivateKey:
    """Return the hive's key as it is kept.

    Raises:
        ConfigError: This is no such key.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{where} is not an Ed25519 key; move it away and start again to make a new one")
    return key


def new_hive_key() -> bytes:
    """Return a new key of a hive, as it is kept."""
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _create(path: Path) -> Ed25519PrivateKey:
    pem = new_hive_key()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    try:
        os.link(fresh, path)
    except FileExistsError:  # another hive was first
        return load_hive_key(path)
    finally:
        fresh.unlink()
    return read_hive_key(pem, str(path))


class CallTokens:
    """Mints call tokens and remembers them until half their life is over. Sandboxes' own keys stand beside them.

    Args:
        ttl_seconds: How long a token is good; five minutes bound what a stolen one is worth.
    """

    def __init__(
        self, key: Ed25519PrivateKey, *, ttl_seconds: float = 300.0, clock: Callable[[], float] = time.time
    ) -> None:
        self._key = key
        self.sandbox_keys = SandboxKeys(key)
        self._ttl = ttl_seconds
        self._clock = clock
        self._minted: dict[SandboxId, tuple[bytes, float]] = {}

    @property
    def public_key(self) -> str:
        """Base64 of the raw public key, as `SandboxSpec.public_key` wants it."""
        raw = self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return base64.b64encode(raw).decode()

    def mint(self, sandbox_id: SandboxId) -> bytes:
        """Return a token for one sandbox, good for at least half of its life."""
        now = self._clock()
        known = self._minted.get(sandbox_id)
        if known is not None and known[1] > now:
            return known[0]
        claims = {
            "iss": "ash",
            "aud": sandbox_id,
            "iat": int(now),
            "exp": int(now + self._ttl),
        }
        token = jwt.encode(claims, self._key, algorithm="EdDSA").encode()
        if len(self._minted) >= _MAX_CACHED:
            self._minted.clear()
        self._minted[sandbox_id] = (token, now + self._ttl / 2)
        return token

    def forget(self, sandbox_id: SandboxId) -> None:
        """Drop the remembered token of a sandbox that has ended."""
        self._minted.pop(sandbox_id, None)
