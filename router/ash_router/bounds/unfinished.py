"""The quota of messages whose bodies are still arriving, counted by owner: each holds a connection and memory."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Unfinished"]


@dataclass(slots=True)
class _Count:
    messages: int = 0
    size: int = 0


class Unfinished:
    """Counts the unfinished messages of one process.

    Args:
        max_messages: Of one owner.
        max_bytes: Received so far of all those of one owner together.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._shares: dict[str, _Count] = {}

    def begin(self, owner: str) -> bool:
        """Count a message; False if its owner has as many as it may."""
        share = self._shares.setdefault(owner, _Count())
        if share.messages >= self._max_messages:
            return False
        share.messages += 1
        return True

    def grow(self, owner: str, size: int) -> bool:
        """Count received bytes of a message; False if its owner now has too many."""
        share = self._shares[owner]
        share.size += size
        return share.size <= self._max_bytes

    def end(self, owner: str, size: int) -> None:
        """Stop counting a message and its bytes."""
        share = self._shares[owner]
        share.messages -= 1
        share.size -= size
        if not share.messages:
            del self._shares[owner]

    def __len__(self) -> int:
        return sum(share.messages for share in self._shares.values())
