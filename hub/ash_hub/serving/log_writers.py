"""Lines written by a thread of their own, so that whoever logs never waits for a disk, a terminal or a file's lock."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

__all__ = ["BackgroundHandler", "SharedFile", "write_to_stderr"]

_END_SECONDS: Final = 3.0
"""How long an end waits for what is still to be written."""
_LINES_AT_ONCE: Final = 256

Write = Callable[[Sequence[str]], None]
"""Writes lines, all or none. Raises OSError if they cannot be written."""


class BackgroundHandler(logging.Handler):
    """Formats where it is called, and writes in a thread of its own.

    What finds the queue full, or cannot be written, is counted, and the count is written as a line before the next
    ones. A process that is killed loses what is in the queue. A forked one has a queue of its own.

    Args:
        write: Called in the thread.
        most: How many lines may wait.
        missing: Returns the line that tells how many are missing.
        on_loss: Called by whoever logs or by the thread when lines begin to be missing, and not again until some are
            written.
    """

    def __init__(
        self,
        write: Write,
        *,
        most: int,
        missing: Callable[[int], str],
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._write = write
        self._most = most
        self._missing_line = missing
        self._on_loss = on_loss
        self._missing = 0
        self._losing = False
        self._start()

    def _start(self) -> None:
        # not a Queue, which waits for ever if a finalizer logs while it holds its lock
        self._queue: SimpleQueue[str | threading.Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stuck = False
        self._counting = threading.RLock()  # the handler's own is held by whoever waits in flush
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self._process != os.getpid():
            self._start()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(self._queue,), name="log", daemon=True)
            self._thread.start()
        if self._queue.qsize() < self._most:
            self._queue.put(line)
        else:
            self._lose(1)

    def flush(self) -> None:
        """Wait until what was logged is written, for three seconds at most."""
        if self._thread is None or self._process != os.getpid() or self._stuck:
            return
        written = threading.Event()
        self._queue.put(written)
        self._stuck = not written.wait(_END_SECONDS)

    def close(self) -> None:
        """Write what waits and end the thread, within three seconds."""
        self.flush()
        if self._thread is not None and self._process == os.getpid():
            self._queue.put(None)
            if not self._stuck:
                self._thread.join(_END_SECONDS)
            self._thread = None
        super().close()

    def _run(self, queue: SimpleQueue[str | threading.Event | None]) -> None:
        going_on = True
        while going_on:
            items = [queue.get(), *_waiting(queue)]
            lines = [item for item in items if isinstance(item, str)]
            if self._write_lines(lines) and self._missing and queue.empty():
                self._write_lines([])  # what was missed meanwhile
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
            going_on = None not in items

    def _write_lines(self, lines: list[str]) -> bool:
        with self._counting:
            missing, self._missing = self._missing, 0
        told = [self._missing_line(missing)] if missing else []
        try:
            if told or lines:
                self._write([*told, *lines])
        except OSError:
            self._lose(missing + len(lines))
            return False
        self._losing = False
        return True

    def _lose(self, lines: int) -> None:
        with self._counting:
            self._missing += lines
            was_losing, self._losing = self._losing, True
        if not was_losing:
            self._on_loss()


class SharedFile:
    """A file that several processes append to; a full one is followed by a new one and kept under a number.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, *, max_bytes: int, backups: int) -> None:
        self._path = path
        self._lock = path.with_name(f".__{path.stem}.lock")
        self._max_bytes = max_bytes
        self._backups = backups
        path.touch()
        self._lock.touch()

    def write(self, lines: Sequence[str]) -> None:
        """Append lines, all or none; waits while another process writes."""
        data = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
        with _opened(self._lock) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            with suppress(FileNotFoundError):
                if self._path.stat().st_size + len(data) > self._max_bytes:
                    self._rotate()
            with _opened(self._path) as file:
                before = os.fstat(file).st_size
                try:
                    _write_all(file, data)
                except OSError:
                    os.ftruncate(file, before)
                    raise

    def _rotate(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._backups + 1))]
        for newer, older in reversed([*pairwise(names)]):
            with suppress(FileNotFoundError):
                newer.replace(older)


def write_to_stderr(lines: Sequence[str]) -> None:
    """Write to the descriptor itself: a terminal that was stopped then holds no lock of `sys.stderr`."""
    _write_all(2, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))


def _waiting(queue: SimpleQueue[str | threading.Event | None]) -> Generator[str | threading.Event | None]:
    with suppress(Empty):
        for _ in range(_LINES_AT_ONCE):
            yield queue.get_nowait()


def _write_all(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


@contextmanager
def _opened(path: Path) -> Generator[int]:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield file
    finally:
        os.close(file)
