"""Streams that only listen: to sandboxes' own endpoints (GET), or to the hive for its list changes.

They are no calls, and keep no sandbox from idling out.
"""

from __future__ import annotations

from typing import Protocol

from ash_mcp.errors import AshError

__all__ = ["OpenStream", "OpenStreams"]


class OpenStream(Protocol):
    def fail(self, error: AshError) -> None: ...


class OpenStreams:
    """The open streams of one process, counted by owner."""

    def __init__(self) -> None:
        self._open: dict[str, set[OpenStream]] = {}

    def begin(self, owner: str, stream: OpenStream, most: int) -> bool:
        """Add a stream; False if its owner has `most` already."""
        streams = self._open.get(owner, set())
        if len(streams) >= most:
            return False
        streams.add(stream)
        self._open[owner] = streams
        return True

    def end(self, owner: str, stream: OpenStream) -> None:
        """Remove a stream; idempotent."""
        streams = self._open.get(owner, set())
        streams.discard(stream)
        if not streams:
            self._open.pop(owner, None)

    def fail_of(self, owner: str, error: AshError) -> None:
        """End all streams of one owner."""
        for stream in list(self._open.get(owner, ())):
            stream.fail(error)

    def fail_all(self, error: AshError) -> None:
        for streams in list(self._open.values()):
            for stream in list(streams):
                stream.fail(error)

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))
