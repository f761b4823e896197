"""Lines between proxies and their hive, signed by a key that both hold, and what proves a sandbox to a proxy. No I/O.

    a proxy asks     MAC {"nonce", "sandboxes": [id, …]}
    its hive answers MAC {"nonce", "sandboxes": {id: {"policy", "limits", "addresses"} or null, …}}
    a sandbox's connection begins with
                     ASH-EGRESS 1 ID TOKEN

A MAC is HMAC-SHA256 in hexadecimal over what kind of line it is and the line's JSON, so that a question never passes
for an answer. Nothing in these lines is secret but the token, and that is good from one address only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from typing import Any, cast

__all__ = [
    "ANSWER",
    "LONGEST_LINE",
    "MOST_ASKED",
    "QUESTION",
    "greeting",
    "read_greeting",
    "read_key",
    "read_line",
    "token",
    "write_line",
]

QUESTION = b"ash egress question 1"
ANSWER = b"ash egress answer 1"
MOST_ASKED = 32
"""Sandboxes in one question."""
LONGEST_LINE = 4 * 1024 * 1024
"""An answer about as many has room in it, however long their lists are."""
_TOKEN = b"ash egress sandbox 1"
_GREETING = re.compile(rb"ASH-EGRESS 1 ([a-z0-9-]{1,63}) ([0-9a-f]{64})\r\n")
_KEY = re.compile(rb"[0-9a-f]{64}\s*")


def read_key(data: bytes) -> bytes:
    """Return the key that a hive made for its proxies.

    Raises:
        ValueError: It is not 64 hexadecimal digits.
    """
    if not _KEY.fullmatch(data):
        raise ValueError("the key of the egress proxies is not 64 hexadecimal digits")
    return bytes.fromhex(data.decode("ascii").strip())


def write_line(key: bytes, kind: bytes, message: Mapping[str, Any]) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return _mac(key, kind, body) + b" " + body + b"\n"


def read_line(key: bytes, kind: bytes, line: bytes) -> Mapping[str, Any]:
    """Return what a line says.

    Raises:
        ValueError: It is of another kind, not whole, or not signed by this key.
    """
    mac, _, body = line.rstrip(b"\n").partition(b" ")
    if not hmac.compare_digest(mac, _mac(key, kind, body)):
        raise ValueError("a line is not signed by the key of this hive's egress proxies")
    message: Any = json.loads(body)
    if not isinstance(message, dict):
        raise ValueError("a line is no JSON object")
    return cast("dict[str, Any]", message)


def token(key: bytes, sandbox: str) -> str:
    """Return what proves a sandbox to a proxy."""
    return _mac(key, _TOKEN, sandbox.encode()).decode("ascii")


def greeting(sandbox: str, its_token: str) -> bytes:
    """Return what a connection begins with, before its first request."""
    return f"ASH-EGRESS 1 {sandbox} {its_token}\r\n".encode("ascii")


def read_greeting(key: bytes, line: bytes) -> str | None:
    """Return which sandbox a connection is of; None where it proves nothing."""
    match = _GREETING.fullmatch(line)
    if match is None:
        return None
    sandbox = match[1].decode("ascii")
    return sandbox if hmac.compare_digest(match[2], token(key, sandbox).encode("ascii")) else None


def _mac(key: bytes, kind: bytes, body: bytes) -> bytes:
    return hmac.digest(key, kind + b"\n" + body, hashlib.sha256).hex().encode("ascii")
