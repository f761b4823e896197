"""Ids of handshake-era sessions as callers know them: `<replica>.<id of the SDK>.<params>.<signature>`.

Any replica sees from one whose session it is; and, when that replica is gone, what it takes to take the session up:
the client's `initialize` params in short, signed for its owner. Only who has the owner's credential can use an id.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import Any, Final, cast

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["MAX_ID_CHARS", "SessionIds"]

MAX_ID_CHARS: Final = 1024
MAX_PARAMS_BYTES: Final = 384
"""Of the params that an id carries. Of longer ones it carries the version and which capabilities there are."""
MAX_NAME_CHARS: Final = 64
_CAPABILITIES: Final = ("elicitation", "roots", "sampling")
_SIGNATURE_BYTES: Final = 18
_FORM: Final = re.compile(r"([a-z0-9]{8}\.[\x21-\x2d\x2f-\x7e]{1,128}\.([A-Za-z0-9_-]{1,600}))\.([A-Za-z0-9_-]{24})")


class SessionIds:
    """Writes the ids of one replica's sessions, and reads those of every replica of the hive."""

    def __init__(self, hive_key: Ed25519PrivateKey, replica: str) -> None:
        self._secret = hmac.digest(hive_key.private_bytes_raw(), b"ash session ids 1", hashlib.sha256)
        self._replica = replica

    def write(self, sdk_id: str, owner: str, params: Mapping[str, Any]) -> str:
        """Return the id of a session that `initialize` with `params` opened."""
        signed = f"{self._replica}.{sdk_id}.{_encoded(orjson.dumps(_short(params)))}"
        return f"{signed}.{self._signature(signed, owner)}"

    def read(self, session_id: str, owner: str) -> dict[str, Any] | None:
        """Return the params that an id carries; None if no replica of this hive wrote it for `owner`."""
        found = _FORM.fullmatch(session_id)
        if found is None or not hmac.compare_digest(found[3], self._signature(found[1], owner)):
            return None
        try:
            params: Any = orjson.loads(base64.urlsafe_b64decode(found[2] + "=" * (-len(found[2]) % 4)))
        except (ValueError, binascii.Error):
            return None
        return cast("dict[str, Any]", params) if isinstance(params, dict) else None

    def _signature(self, signed: str, owner: str) -> str:
        mac = hmac.digest(self._secret, signed.encode() + b"\n" + owner.encode(), hashlib.sha256)
        return _encoded(mac[:_SIGNATURE_BYTES])


def _short(params: Mapping[str, Any]) -> dict[str, Any]:
    given: Any = params.get("capabilities")
    capabilities = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    kept = {name: capabilities[name] for name in _CAPABILITIES if isinstance(capabilities.get(name), dict)}
    info: Any = params.get("clientInfo")
    named = cast("dict[str, Any]", info) if isinstance(info, dict) else {}
    short = {
        "protocolVersion": str(params.get("protocolVersion"))[:16],
        "capabilities": kept,
        "clientInfo": {key: str(named.get(key, ""))[:MAX_NAME_CHARS] for key in ("name", "version")},
    }
    if len(orjson.dumps(short)) <= MAX_PARAMS_BYTES:
        return short
    bare: dict[str, Any] = {name: {} for name in kept}
    return {**short, "capabilities": bare, "clientInfo": {"name": "unknown", "version": ""}}


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
