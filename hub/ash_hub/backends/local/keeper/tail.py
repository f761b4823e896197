"""A bounded buffer of the last bytes of a log."""

from __future__ import annotations

__all__ = ["Tail"]


class Tail:
    """Keeps at least the last `limit` bytes of what is added, and never more than twice as many."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > 2 * self._limit:
            del self._data[: -self._limit]

    def last(self, count: int) -> bytes:
        """Return at most the last `count` bytes, of those that are kept."""
        return bytes(self._data[-min(count, self._limit) :]) if count > 0 else b""
