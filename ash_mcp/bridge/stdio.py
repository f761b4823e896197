"""MCP over a process's own stdin and stdout: one JSON message a line, and nothing else ever on stdout."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

import anyio

__all__ = ["LineReader", "LineWriter", "StdinTooLong", "StdioLines", "stdio_lines"]

MAX_LINE_BYTES: Final = 64 * 1024 * 1024
_READ_BYTES: Final = 65536
_ABOVE_STANDARD: Final = 3


class StdinTooLong(Exception):
    """A line is longer than the bound; what follows it cannot be told apart."""


class LineReader:
    """Reads lines from a descriptor without a thread, so that a blocked read never holds up the end."""

    def __init__(self, descriptor: int, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._descriptor = descriptor
        self._max = max_line_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield each line that is not blank, without its end; the last one may lack a line break.

        Raises:
            StdinTooLong: A line is longer than the bound.
        """
        buffer = bytearray()
        scanned = 0
        while piece := await self._read():
            buffer += piece
            while (end := buffer.find(b"\n", scanned)) >= 0:
                line = bytes(buffer[:end])
                del buffer[: end + 1]
                scanned = 0
                if line.strip():
                    yield line
            scanned = len(buffer)
            if scanned > self._max:
                raise StdinTooLong(f"a line on stdin is longer than {self._max} bytes")
        if buffer.strip():
            yield bytes(buffer)

    async def _read(self) -> bytes:
        # a file or /dev/null cannot be waited for, and need not be
        with contextlib.suppress(PermissionError):
            await anyio.wait_readable(self._descriptor)
        try:
            return os.read(self._descriptor, _READ_BYTES)
        except ConnectionError:
            return b""


class LineWriter:
    """Writes whole lines to a descriptor in a task of its own, so that a cancelled sender never leaves half a line."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._inlet, self._outlet = anyio.create_memory_object_stream[bytes](0)

    async def send(self, line: bytes) -> None:
        """Queue one line; waits while the other end does not read, and drops the line once that is closed."""
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await self._inlet.send(line)

    def close(self) -> None:
        """Take no more lines; `run` returns when those it has are written."""
        self._inlet.close()

    async def run(self) -> None:
        """Write until `close`, or until nobody reads."""
        with contextlib.suppress(ConnectionError):
            async with self._outlet:
                async for line in self._outlet:
                    await self._write(line)

    async def _write(self, line: bytes) -> None:
        left = memoryview(line + b"\n")
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                await anyio.wait_writable(self._descriptor)


@dataclass(frozen=True, slots=True)
class StdioLines:
    """The two directions of stdio."""

    reader: LineReader
    writer: LineWriter


@asynccontextmanager
async def stdio_lines() -> AsyncGenerator[StdioLines]:
    """Take stdin and stdout for MCP while the context is open.

    Meanwhile the process's own descriptor 0 is empty and 1 is stderr, so that neither a stray `print` nor a child
    can reach the host.
    """
    with _taken(0, os.O_RDONLY) as stdin, _taken(1, None) as stdout, _unblocked(stdout):
        try:
            yield StdioLines(LineReader(stdin), LineWriter(stdout))
        finally:
            sys.stdout.flush()  # to stderr, as long as that is where it goes


@contextmanager
def _taken(descriptor: int, null_flags: int | None) -> Generator[int]:
    """Give a private duplicate of a standard descriptor, with /dev/null or stderr in its place."""
    private = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _ABOVE_STANDARD)
    try:
        if null_flags is None:
            os.dup2(2, descriptor)
        else:
            null = os.open(os.devnull, null_flags)
            os.dup2(null, descriptor)
            os.close(null)
        yield private
    finally:
        os.dup2(private, descriptor)
        os.close(private)


@contextmanager
def _unblocked(descriptor: int) -> Generator[None]:
    """Make a pipe non-blocking, so that a host that does not read blocks no other task; terminals and files stay."""
    shared = os.isatty(descriptor) or stat.S_ISREG(os.fstat(descriptor).st_mode)
    if shared or not os.get_blocking(descriptor):
        yield
        return
    os.set_blocking(descriptor, False)
    try:
        yield
    finally:
        os.set_blocking(descriptor, True)
