"""Folders through the hive's door to files: one archive each way, whatever number of files."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Final

import anyio
import anyio.from_thread
import anyio.to_thread

from ash_mcp._archives import Packing, Unpacked, unpack
from ash_mcp._file_door import FileDoor, OnBytes

__all__ = ["receive_folder", "send_folder"]

_REPORT_SECONDS: Final = 0.1


async def send_folder(door: FileDoor, packing: Packing, path: str, on_bytes: OnBytes | None) -> int:
    """Send a local folder, and return the bytes of its files. Nothing is changed there before all of it has come.

    Raises:
        OSError: A file here cannot be read.
        AshError: It was refused, or broke off.
    """

    async def pieces() -> AsyncGenerator[bytes, None]:
        packed = packing.pieces()
        while piece := await anyio.to_thread.run_sync(next, packed, b""):
            yield piece
            if on_bytes is not None:
                on_bytes(packing.done, packing.total)

    return (await door.put(f"{path.rstrip('/')}/", pieces)).integer("bytes")


async def receive_folder(
    door: FileDoor, path: str, target: Path, on_bytes: OnBytes | None, *, skip: bool = False
) -> Unpacked:
    """Receive a folder of a sandbox into a local one, which is made where there is none.

    Raises:
        OSError: Something here cannot be written.
        AshError: As `unpack` does, or it was refused, or broke off.
    """

    told_at = 0.0

    def report(done: int) -> None:  # in a worker thread, after each piece of each file
        nonlocal told_at
        if on_bytes is not None and time.monotonic() >= told_at + _REPORT_SECONDS:
            anyio.from_thread.run_sync(on_bytes, done, None)
            told_at = time.monotonic()

    async with door.get(f"{path.rstrip('/')}/") as (pieces, _):
        source = _BodyReader(pieces)
        unpacked = await anyio.to_thread.run_sync(lambda: unpack(source, target, report, skip=skip))
    if on_bytes is not None:
        on_bytes(unpacked.bytes, unpacked.bytes)
    return unpacked


class _BodyReader:
    """A response's body as a file that blocks, for a worker thread that anyio has started."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def read(self, size: int, /) -> bytes:
        if not self._left:
            self._left = anyio.from_thread.run(self._next)
        read, self._left = self._left[:size], self._left[size:]
        return read

    async def _next(self) -> bytes:
        async for piece in self._pieces:
            if piece:
                return piece
        return b""
