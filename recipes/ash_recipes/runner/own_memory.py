"""Keeps what the runner knows from what else runs in the sandbox: its memory, and the key in its environment."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import MutableMapping

__all__ = ["KEY_VARIABLE", "close_memory", "take_key"]

KEY_VARIABLE = "ASH_SANDBOX_KEY"
_PR_SET_DUMPABLE = 4


def close_memory() -> None:
    """Let nothing else in the sandbox read or change this process: what it starts runs as the same user."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def take_key(environ: MutableMapping[str, str]) -> str:
    """Return the sandbox's key and remove it from `environ` and from what `/proc` shows of this process."""
    key = environ.get(KEY_VARIABLE, "")
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    at = getenv(KEY_VARIABLE.encode())
    if at:
        ctypes.memset(at, 0, len(key))
    environ.pop(KEY_VARIABLE, None)
    return key
