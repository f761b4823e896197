"""Streams that callers hold open to their sandboxes only to listen: no calls, and no sandbox lives on for them."""

from __future__ import annotations

from typing import Protocol

from ash_mcp.errors import AshError

__all__ = ["OpenStream", "OpenStreams"]


class OpenStream(Protocol):
    def fail(self, error: AshError) -> None: ...


class OpenStreams:
    """Those of one process, counted by owner."""

    def __init__(self, max_per_owner: int) -> None:
        self._max = max_per_owner
        self._open: dict[str, set[OpenStream]] = {}

    def begin(self, owner: str, stream: OpenStream) -> bool:
        """Enter a stream, unless its owner has as many as it may."""
        streams = self._open.setdefault(owner, set())
        if len(streams) >= self._max:
            return False
        streams.add(stream)
        return True

    def end(self, owner: str, stream: OpenStream) -> None:
        """Leave; idempotent."""
        streams = self._open.get(owner, set())
        streams.discard(stream)
        if not streams:
            self._open.pop(owner, None)

    def fail_all(self, error: AshError) -> None:
        for streams in list(self._open.values()):
            for stream in list(streams):
                stream.fail(error)

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))
