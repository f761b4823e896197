"""File operations of a sandbox, each with a typed failure. All of them block: call them in a worker thread.

They reach whatever the sandbox's own user may reach; relative paths start at the workspace. No operation waits on a
pipe or a device: only regular files are read and written.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ash_recipes.runner.problems import Problem, from_os_error

__all__ = ["Files", "Upload"]

READ_BYTES = 524_288
LIST_BYTES = 400_000
"""How much of a directory's entries one answer holds on the wire."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one sandbox.

    Args:
        workspace: Where relative paths start.
        kept: Directories that cannot be removed or moved away.
    """

    workspace: Path
    kept: tuple[Path, ...] = ()

    def resolve(self, path: str) -> Path:
        """Return `path` as an absolute one, its symbolic links untouched.

        Raises:
            Problem: `bad_request`: it is empty or holds a NUL.
        """
        if not path or "\0" in path:
            raise Problem("bad_request", "give a path that is not empty and holds no NUL character")
        try:
            os.fsencode(path)
        except UnicodeEncodeError:
            raise Problem("bad_request", "the path holds lone surrogates, which no file name can") from None
        return self.workspace / path

    def read(self, path: str, offset: int, limit: int) -> tuple[bytes, int, bool]:
        """Return at most `limit` bytes from `offset` on, the file's size, and whether they reach its end."""
        with self.open(path) as file, _translated(path):
            file.seek(offset)
            data = file.read(limit)
            size = os.fstat(file.fileno()).st_size
            # A file of /proc says it has no bytes, so only a short read tells its end.
            at_end = len(data) < limit or offset + len(data) == size
        return data, max(size, offset + len(data)) if data else size, at_end

    def open(self, path: str) -> BinaryIO:
        """Open a regular file for reading.

        Raises:
            Problem: There is none that may be read.
        """
        found = self.resolve(path)
        with _translated(path):
            return os.fdopen(_open_regular(path, found, os.O_RDONLY), "rb", buffering=0)

    def write(self, path: str, data: bytes, offset: int | None, mode: int | None) -> int:
        """Write `data` at `offset` as the file's new end and return its size; None and 0 replace what was there.

        So a repeated piece does no harm, and one that would leave a gap is refused.
        """
        found = self.resolve(path)
        with _translated(path):
            _make_parents(found)
            flags = os.O_WRONLY | (0 if offset else os.O_CREAT | os.O_TRUNC)
            with os.fdopen(_open_regular(path, found, flags), "wb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if offset and offset > size:
                    raise Problem("bad_request", f"{path} has {size} bytes; a piece at {offset} would leave a gap")
                if offset:
                    file.truncate(offset)
                    file.seek(offset)
                _write_all(file, data)
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                return os.fstat(file.fileno()).st_size

    def append(self, path: str, data: bytes) -> int:
        """Add `data` to the end of a file, made if there is none, and return its new size."""
        found = self.resolve(path)
        with _translated(path):
            _make_parents(found)
            descriptor = _open_regular(path, found, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            with os.fdopen(descriptor, "ab", buffering=0) as file:
                _write_all(file, data)
                return os.fstat(file.fileno()).st_size

    def list(self, path: str) -> dict[str, Any]:
        """Return a directory's entries by name, as many as an answer holds, and how many there are."""
        found = self.resolve(path)
        with _translated(path):
            names = sorted(os.listdir(found))
            entries: list[dict[str, Any]] = []
            room = LIST_BYTES
            for name in names:
                try:
                    entry = _entry(name, os.lstat(found / name))
                except FileNotFoundError:  # removed since
                    continue
                room -= len(json.dumps(entry)) + 2
                if room < 0:
                    break
                entries.append(entry)
        return {"entries": entries, "total": len(names), "truncated": room < 0}

    def stat(self, path: str) -> dict[str, Any]:
        found = self.resolve(path)
        with _translated(path):
            return {"path": str(found), **_entry(found.name or "/", os.lstat(found))}

    def mkdir(self, path: str, *, parents: bool) -> Path:
        found = self.resolve(path)
        with _translated(path):
            if parents:
                _make_parents(found)
            found.mkdir(exist_ok=parents)
        return found

    def move(self, source: str, destination: str) -> Path:
        """Rename; a file that stands at the destination is replaced, a directory that holds something is not."""
        start, end = self.resolve(source), self.resolve(destination)
        self._refuse_kept(source, start)
        with _translated(source):
            os.lstat(start)
        with _translated(destination):
            _make_parents(end)
            try:
                os.rename(start, end)
            except OSError as exc:
                if exc.errno != errno.EXDEV:
                    raise
                if os.path.lexists(end):
                    raise Problem(
                        "file_exists", f"{destination}: exists, on another file system; remove it first"
                    ) from exc
                shutil.move(start, end)
        return end

    def remove(self, path: str, *, recursive: bool) -> None:
        """Remove a file, a symbolic link (never what it points to) or a directory; full ones only if `recursive`."""
        found = self.resolve(path)
        self._refuse_kept(path, found)
        with _translated(path):
            if not stat.S_ISDIR(os.lstat(found).st_mode):
                found.unlink()
            elif recursive:
                shutil.rmtree(found)
            elif os.listdir(found):
                raise Problem(
                    "is_a_directory", f"{path}: is a directory with entries; pass recursive to remove them too"
                )
            else:
                found.rmdir()

    def upload(self, path: str) -> Upload:
        """Begin to replace a file by a stream of bytes."""
        return Upload(path, self.resolve(path))

    def _refuse_kept(self, path: str, found: Path) -> None:
        real = os.path.realpath(found) if not found.is_symlink() else str(found)
        for kept in (Path("/"), *self.kept):
            if Path(real) == kept or kept.is_relative_to(real):
                raise Problem(
                    "not_permitted", f"{path}: the sandbox needs this directory; remove what is in it instead"
                )


class Upload:
    """Bytes on their way into a file; it changes only when all of them have come."""

    def __init__(self, path: str, target: Path) -> None:
        self._path = path
        self._target = Path(os.path.realpath(target))
        self._bytes = 0
        with _translated(path):
            if self._target.is_dir():
                raise Problem("is_a_directory", f"{path}: is a directory")
            if self._target.exists() and not self._target.is_file():
                raise Problem("bad_request", f"{path}: is not a regular file")
            _make_parents(self._target)
            self.existed = self._target.exists()
            self._mode = stat.S_IMODE(self._target.stat().st_mode) if self.existed else 0o666 & ~_umask()
            descriptor, self._draft = tempfile.mkstemp(prefix=".ash-", dir=self._target.parent)
            self._file = os.fdopen(descriptor, "wb", buffering=0)

    def write(self, data: bytes) -> None:
        with _translated(self._path):
            _write_all(self._file, data)
        self._bytes += len(data)

    def finish(self) -> int:
        """Put the file in its place and return its size."""
        with _translated(self._path):
            os.fchmod(self._file.fileno(), self._mode)
            self._file.close()
            os.replace(self._draft, self._target)
        return self._bytes

    def abandon(self) -> None:
        """Leave no trace of it; idempotent, and nothing after `finish`."""
        self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._draft)


def _umask() -> int:
    # There is no way to read it but to set it; /proc has it without a moment's change for other threads.
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022


@contextlib.contextmanager
def _translated(path: str) -> Generator[None]:
    try:
        yield
    except OSError as exc:
        raise from_os_error(exc, path) from exc
    except ValueError as exc:
        raise Problem("bad_request", f"{path}: {exc}") from exc


def _make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as exc:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from exc


def _open_regular(path: str, found: Path, flags: int) -> int:
    # Without O_NONBLOCK the opening of a pipe would wait for its other end.
    descriptor = os.open(found, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise Problem("is_a_directory", f"{path}: is a directory")
    raise Problem("bad_request", f"{path}: is not a regular file")


def _write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _entry(name: str, found: os.stat_result) -> dict[str, Any]:
    mode = found.st_mode
    kinds = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "directory"), (stat.S_ISLNK, "symlink"))
    modified = datetime.datetime.fromtimestamp(found.st_mtime, datetime.UTC)
    return {
        # A name may hold any bytes; what is not UTF-8 shows as U+FFFD.
        "name": os.fsencode(name).decode("utf-8", "replace"),
        "type": next((word for test, word in kinds if test(mode)), "other"),
        "size": found.st_size,
        "mode": stat.S_IMODE(mode),
        "modified_at": modified.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }
