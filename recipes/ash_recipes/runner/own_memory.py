"""Keeps what the runner knows from what else runs in the sandbox: its memory, and the secrets in its environment."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import MutableMapping

__all__ = ["KEY_VARIABLE", "TOKEN_VARIABLE", "close_memory", "take_secret"]

KEY_VARIABLE = "ASH_SANDBOX_KEY"
TOKEN_VARIABLE = "ASH_EGRESS_TOKEN"
_PR_SET_DUMPABLE = 4


def close_memory() -> None:
    """Let nothing else in the sandbox read or change this process: what it starts runs as the same user."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def take_secret(environ: MutableMapping[str, str], name: str) -> str:
    """Return a variable, or nothing, and remove it from `environ` and from what `/proc` shows of this process."""
    secret = environ.get(name, "")
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    at = getenv(name.encode())
    if at:
        ctypes.memset(at, 0, len(secret))
    environ.pop(name, None)
    return secret
