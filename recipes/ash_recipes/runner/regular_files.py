"""Regular files: opened without waiting on a pipe or a device, and replaced as a whole. All of it blocks."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ash_recipes.runner.problems import Problem, from_os_error

__all__ = ["Upload", "etag_of", "make_parents", "open_regular", "translated", "umask", "write_all"]

_IN_PLACE = frozenset({errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS})
"""Why a file cannot be replaced though it may be written: it is a mount, or its directory is not ours."""


class Upload:
    """Bytes on their way into a file; it changes only when all of them have come."""

    def __init__(self, path: str, target: Path, mode: int | None = None) -> None:
        self._path = path
        self._target = Path(os.path.realpath(target))
        with translated(path):
            self._before = _stat_writable(path, self._target)
            if mode is None:
                mode = stat.S_IMODE(self._before.st_mode) if self._before is not None else 0o666 & ~umask()
            self._mode = mode
            descriptor, self._draft = self._make_draft()
            self._file = os.fdopen(descriptor, "wb", buffering=0)

    def _make_draft(self) -> tuple[int, str]:
        make_parents(self._target)
        try:
            return tempfile.mkstemp(prefix=".ash-", dir=self._target.parent)
        except OSError as exc:
            if self._before is None or exc.errno not in _IN_PLACE:
                raise
            return tempfile.mkstemp(prefix=".ash-")

    @property
    def existed(self) -> bool:
        """Whether there was a file before."""
        return self._before is not None

    @property
    def before(self) -> os.stat_result | None:
        """What was there before."""
        return self._before

    def write(self, data: bytes, offset: int | None = None) -> None:
        """Write bytes at `offset`, or after those that were written last."""
        with translated(self._path):
            if offset is not None:
                self._file.seek(offset)
            write_all(self._file, data)

    def finish(self) -> int:
        """Put the file in its place and return its size."""
        with translated(self._path):
            size = os.fstat(self._file.fileno()).st_size
            if self._before is not None:
                with contextlib.suppress(PermissionError):
                    os.fchown(self._file.fileno(), self._before.st_uid, self._before.st_gid)
            os.fchmod(self._file.fileno(), self._mode)
            self._file.close()
            try:
                os.replace(self._draft, self._target)
            except OSError as exc:
                if self._before is None or exc.errno not in _IN_PLACE:
                    raise
                self._write_in_place()
        return size

    def _write_in_place(self) -> None:
        flags = os.O_WRONLY | os.O_TRUNC
        with open(self._draft, "rb") as draft, os.fdopen(open_regular(self._path, self._target, flags), "wb") as file:
            shutil.copyfileobj(draft, file)

    def abandon(self) -> None:
        """Leave no trace of it; idempotent, and nothing after `finish`."""
        self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._draft)


def _stat_writable(path: str, target: Path) -> os.stat_result | None:
    """Return what is known of the file that is to be replaced, or None where there is none."""
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise Problem("is_a_directory", f"{path}: is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise Problem("bad_request", f"{path}: is not a regular file")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return found


def etag_of(found: os.stat_result) -> bytes:
    """Return the entity tag of a file's content; it changes with each write."""
    return b'"%x-%x-%x"' % (found.st_ino, found.st_ctime_ns, found.st_size)


def umask() -> int:
    # There is no way to read it but to set it; /proc has it without a moment's change for other threads.
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022


@contextlib.contextmanager
def translated(path: str) -> Generator[None]:
    try:
        yield
    except OSError as exc:
        raise from_os_error(exc, path) from exc
    except ValueError as exc:
        raise Problem("bad_request", f"{path}: {exc}") from exc


def make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as exc:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from exc


def open_regular(path: str, found: Path, flags: int) -> int:
    # Without O_NONBLOCK the opening of a pipe would wait for its other end.
    descriptor = os.open(found, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise Problem("is_a_directory", f"{path}: is a directory")
    raise Problem("bad_request", f"{path}: is not a regular file")


def write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
