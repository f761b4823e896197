"""Bounded buffers for the output of commands: a job's ring buffer, a spool file, and a head-and-tail excerpt."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ash_recipes.runner.processes import Stream

__all__ = ["Capture", "Chunk", "Clipped", "JobLog", "Spool", "drop_partial_character", "json_size"]

LOG_BYTES = 8 * 1024 * 1024
_CHUNK_BYTES = 65_536
LOG_CHUNKS = 16_384
"""Streams that alternate byte by byte would make far more of the log's memory chunks than bytes."""
READ_CHUNKS = 2000
SPOOL_BYTES = 64 * 1024 * 1024
"""The most that is kept of one command's whole output in a file."""
SPOOL_FILES = 20
"""How many such files are kept; the oldest goes first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    stream: Stream
    offset: int
    data: bytes


class JobLog:
    """A ring buffer of both streams of a job. Offsets count all bytes in the order in which they came."""

    def __init__(self, limit: int = LOG_BYTES) -> None:
        self._limit = limit
        self._chunks: deque[tuple[Stream, int, bytearray]] = deque()
        self.total = 0
        self.dropped = 0
        """How many bytes were overwritten: output before this offset is lost."""

    @property
    def held(self) -> int:
        return self.total - self.dropped

    def would_lose(self, offset: int, size: int) -> bool:
        """Return whether appending `size` bytes could overwrite output from `offset` on."""
        if not self._chunks:
            return False
        _, start, oldest = self._chunks[0]
        if len(self._chunks) >= LOG_CHUNKS and start + len(oldest) > offset:
            return True
        excess = self.held + size - self._limit
        return excess > 0 and self.dropped + excess + _CHUNK_BYTES > offset

    def append(self, stream: Stream, data: bytes) -> None:
        last = self._chunks[-1] if self._chunks else None
        if last is not None and last[0] == stream and len(last[2]) + len(data) <= _CHUNK_BYTES:
            last[2].extend(data)
        else:
            self._chunks.append((stream, self.total, bytearray(data)))
        self.total += len(data)
        while (self.held > self._limit and len(self._chunks) > 1) or len(self._chunks) > LOG_CHUNKS:
            self.dropped += len(self._chunks.popleft()[2])

    def read(self, offset: int, limit: int) -> tuple[list[Chunk], int]:
        """Return at most `limit` bytes from `offset` on, and the offset behind the last of them."""
        found: list[Chunk] = []
        at = min(max(offset, self.dropped), self.total)
        for stream, start, data in self._chunks:
            if limit <= 0 or len(found) >= READ_CHUNKS:
                break
            if start + len(data) <= at:
                continue
            piece = bytes(memoryview(data)[at - start : at - start + limit])
            found.append(Chunk(stream, at, piece))
            at += len(piece)
            limit -= len(piece)
        return found, at


class Spool:
    """The whole output of one command: in memory while it is small, then in a file of its own.

    Args:
        memory: How many bytes may stay in memory.
    """

    def __init__(self, directory: Path, *, memory: int, max_bytes: int = SPOOL_BYTES) -> None:
        self._directory = directory
        self._memory = memory
        self._max_bytes = max_bytes
        self._held = bytearray()
        self._file: BinaryIO | None = None
        self._written = 0
        self._failed = False
        self.path: Path | None = None

    def append(self, data: bytes) -> None:
        if self._file is None and not self._failed:
            self._held += data
            if len(self._held) > self._memory:
                self.move_to_file()
        elif self._file is not None:
            self._write(data)

    def move_to_file(self) -> Path | None:
        """Write the output to a file from now on; None when the disk would not take it."""
        if self.path is None and not self._failed:
            held, self._held = bytes(self._held), bytearray()
            try:
                self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                _make_room(self._directory)
                descriptor, name = tempfile.mkstemp(prefix="output-", suffix=".txt", dir=self._directory)
                self._file, self.path = os.fdopen(descriptor, "wb", buffering=0), Path(name)
            except OSError:
                self._failed = True
            self._write(held)
        return self.path

    def _write(self, data: bytes) -> None:
        if self._file is None or self._written >= self._max_bytes:
            return
        try:
            self._written += self._file.write(data[: self._max_bytes - self._written])
        except OSError:  # full: what stands there is no whole output, so it goes
            self.close()
            self._failed = True
            if self.path is not None:
                self.path.unlink(missing_ok=True)
            self.path = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _make_room(directory: Path) -> None:
    kept = sorted(directory.glob("output-*.txt"), key=lambda path: path.stat().st_mtime)
    for old in kept[: max(0, len(kept) - SPOOL_FILES + 1)]:
        with contextlib.suppress(OSError):
            old.unlink()


class Capture:
    """The first and the last bytes of one stream, and how many there were."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._head_limit = limit - limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0

    def append(self, data: bytes) -> None:
        self.total += len(data)
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        spare = self._limit - self._head_limit
        if len(self._tail) > 2 * spare + _CHUNK_BYTES:
            del self._tail[: len(self._tail) - spare]

    def clip(self, limit: int | None = None) -> Clipped:
        """Return what is kept, cut to `limit` bytes if that is less."""
        limit = self._limit if limit is None else min(limit, self._limit)
        if self.total <= limit:
            return Clipped(bytes(self._head + self._tail), b"", 0)
        first = limit - limit // 2
        head = bytes(self._head[:first])
        tail = bytes(self._tail[len(self._tail) - limit // 2 :]) if limit // 2 else b""
        if self.total <= self._limit:  # kept whole, cut only now: the tail may reach into the head
            whole = bytes(self._head + self._tail)
            tail = whole[len(whole) - limit // 2 :] if limit // 2 else b""
        return Clipped(head, tail, self.total - len(head) - len(tail))


@dataclass(frozen=True, slots=True)
class Clipped:
    """A stream's bytes with their middle left out."""

    head: bytes
    tail: bytes
    left_out: int

    @property
    def data(self) -> bytes:
        return self.head + self.tail

    @property
    def utf8(self) -> bool:
        """Whether it is UTF-8, but for characters that the cut itself went through."""
        head, tail = self._uncut()
        try:
            head.decode()
            tail.decode()
        except UnicodeDecodeError:
            return False
        return True

    def text(self) -> str:
        """Return it as text, with U+FFFD for what is not UTF-8 and a line where the middle was left out."""
        head, tail = (part.decode("utf-8", "replace") for part in self._uncut())
        if not self.left_out:
            return head
        return f"{head}\n[… {self.left_out} bytes left out …]\n{tail}"

    def _uncut(self) -> tuple[bytes, bytes]:
        if not self.left_out:
            return self.data, b""
        return drop_partial_character(self.head), _skip_continuation(self.tail)


def drop_partial_character(data: bytes) -> bytes:
    """Return `data` without an incomplete UTF-8 character at its end."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    pending = decoder.getstate()[0]
    return data[: len(data) - len(pending)] if pending else data


def _skip_continuation(data: bytes) -> bytes:
    skip = 0
    while skip < min(3, len(data)) and data[skip] & 0xC0 == 0x80:
        skip += 1
    return data[skip:]


def json_size(text: str) -> int:
    """Return how many bytes `text` takes on the wire, where servers escape all that is not ASCII."""
    return len(json.dumps(text))


def halves(limit: int) -> Iterator[int]:
    """Yield `limit`, then half of it, and so on down to 1 KiB."""
    while limit > 1024:
        yield limit
        limit //= 2
    yield min(limit, 1024)
