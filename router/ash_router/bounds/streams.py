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
        self._guests: dict[str, int] = {}
        """How many of them are those of guests of one sandbox, by `Principal.guests`."""

    def begin_guests(self, guests: str | None, most: int) -> bool:
        """Count a stream for all guests of a sandbox together; False if they have `most` already. None: no guest's."""
        if guests is None:
            return True
        if self._guests.get(guests, 0) >= most:
            return False
        self._guests[guests] = self._guests.get(guests, 0) + 1
        return True

    def end_guests(self, guests: str | None) -> None:
        """Count it no longer."""
        if guests is not None:
            self._guests[guests] -= 1
            if not self._guests[guests]:
                del self._guests[guests]

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
