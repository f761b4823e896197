"""Folders through the hive's door to files: one archive each way, whatever number of files."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Final

import anyio
import anyio.from_thread
import anyio.to_thread

from ash_mcp._archives import Packing, Unpacked, unpack
from ash_mcp._file_door import BodyReader, FileDoor

__all__ = ["OnBytes", "receive_folder", "send_folder"]

_REPORT_SECONDS: Final = 0.1

OnBytes = Callable[[int, int | None], object]
"""Called after each piece with the bytes done and the total; None where that is not known."""


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
        source = BodyReader(pieces)
        unpacked = await anyio.to_thread.run_sync(lambda: unpack(source, target, report, skip=skip))
    if on_bytes is not None:
        on_bytes(unpacked.bytes, unpacked.bytes)
    return unpacked
