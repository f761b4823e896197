"""Keys of calls whose result is kept no longer, so that a late repeat is refused and not run again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from ash_recipes.runner.problems import Problem

__all__ = ["MAX_KEYS", "REMEMBERED_SECONDS", "SpentKeys"]

REMEMBERED_SECONDS = 3600.0
"""How long a key is known after its result was let go: far longer than any caller repeats a call."""
MAX_KEYS = 100_000
"""Over this the oldest is forgotten before its time; all of them take some 15 MB."""


class SpentKeys:
    """Remembers keys and nothing else of their calls."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[bytes, float] = {}
        """Oldest first."""

    def add(self, key: str) -> None:
        """Remember a key from now on."""
        now = self._clock()
        self._until[_digest(key)] = now + REMEMBERED_SECONDS
        while len(self._until) > MAX_KEYS or next(iter(self._until.values())) <= now:
            del self._until[next(iter(self._until))]

    def refuse(self, key: str) -> None:
        """Let a new key pass.

        Raises:
            Problem: `result_lost`: a command ran with this key, and its result is kept no longer.
        """
        if self._until.get(_digest(key), 0.0) > self._clock():
            raise Problem(
                "result_lost",
                f"a command was started with the key {key!r} before and its result is kept no longer; it was not "
                "started again. Look at what it did, or run it anew with a new key",
            )


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
