"""The uses of the sandbox's key: the proof that this is the sandbox, and the seal on what a claim brings.

The hive's side of both is in its router; docs/runner.md has the exact bytes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import Any, Final

from ash_recipes.runner.config import RunnerConfig
from ash_recipes.runner.problems import Problem

__all__ = ["NONCE_HEADER", "PROOF_PATH", "prove", "unseal"]

PROOF_PATH: Final = "/_ash/proof"
NONCE_HEADER: Final = b"ash-nonce"
SEAL_NONCE_BYTES: Final = 12
_NONCE: Final = re.compile(rb"[0-9a-f]{64}")


def prove(config: RunnerConfig, nonce: bytes | None) -> dict[str, Any]:
    """Return the answer to a nonce.

    Raises:
        Problem: `bad_request`: it is none, or this sandbox has no key.
    """
    if not config.key or nonce is None or _NONCE.fullmatch(nonce) is None:
        raise Problem("bad_request", "a proof needs a key here, and an Ash-Nonce of 64 hexadecimal digits")
    return {"proof": _mac(config.key, b"ash proof 1", _name(config), nonce).hex()}


def unseal(config: RunnerConfig, shape: Mapping[str, Any]) -> bytes:
    """Return what `{"sealed": …}` holds.

    Raises:
        Problem: `bad_request`: it was not sealed for this sandbox.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        sealed = base64.b64decode(shape["sealed"], validate=True)
        cipher = AESGCM(_mac(config.key, b"ash claim 1", _name(config)))
        return cipher.decrypt(sealed[:SEAL_NONCE_BYTES], sealed[SEAL_NONCE_BYTES:], _name(config))
    except (KeyError, TypeError, ValueError, InvalidTag):
        raise Problem("bad_request", "on TCP a claim is sealed with this sandbox's key") from None


def _name(config: RunnerConfig) -> bytes:
    return config.sandbox_id.encode()


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"\n".join(parts), hashlib.sha256)
