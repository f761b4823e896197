"""The hive's side of a sandbox's proof that it is itself, and of the seal on what a claim brings. No I/O.

Each sandbox has a key of its own, derived from the hive's, so that every replica knows it and nothing is stored.
`docs/runner.md` has the exact bytes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
from typing import Any, Final, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ash_mcp.types import Endpoint, SandboxId
from ash_mcp.wire import HEADER_NONCE, PROOF_PATH

__all__ = ["Challenge", "SandboxKeys", "seal"]

_SEAL_NONCE_BYTES: Final = 12


class SandboxKeys:
    """The keys of all sandboxes of a hive."""

    def __init__(self, hive_key: Ed25519PrivateKey) -> None:
        self._secret = _mac(hive_key.private_bytes_raw(), b"ash sandbox keys 1")

    def of(self, sandbox_id: SandboxId) -> bytes:
        """Return the 32 bytes that one sandbox shares with its hive."""
        return _mac(self._secret, sandbox_id.encode())


class Challenge:
    """A question that only one sandbox can answer, once."""

    def __init__(self, keys: SandboxKeys, endpoint: Endpoint) -> None:
        assert endpoint.sandbox is not None
        nonce = secrets.token_hex(32)
        lines = f"host: {endpoint.authority}\r\n{HEADER_NONCE}: {nonce}\r\n"
        self.request = f"GET {PROOF_PATH} HTTP/1.1\r\n{lines}\r\n".encode()
        key = keys.of(endpoint.sandbox)
        self._expected = _mac(key, b"ash proof 1", endpoint.sandbox.encode(), nonce.encode()).hex()

    def is_answered(self, status: int, body: bytes) -> bool:
        """Say whether this is that sandbox's answer."""
        try:
            shape: Any = json.loads(body)
        except (ValueError, RecursionError):
            return False
        proof: Any = cast("dict[str, Any]", shape).get("proof") if isinstance(shape, dict) else None
        if status != 200 or not isinstance(proof, str) or not proof.isascii():
            return False
        return hmac.compare_digest(proof, self._expected)


def seal(keys: SandboxKeys, sandbox_id: SandboxId, claim: bytes) -> bytes:
    """Return the body of a claim that nobody but the sandbox can read."""
    nonce, name = os.urandom(_SEAL_NONCE_BYTES), sandbox_id.encode()
    cipher = AESGCM(_mac(keys.of(sandbox_id), b"ash claim 1", name))
    return json.dumps({"sealed": base64.b64encode(nonce + cipher.encrypt(nonce, claim, name)).decode()}).encode()


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"\n".join(parts), hashlib.sha256)
