"""File operations of a sandbox, each with a typed failure. All of them block: call them in a worker thread.

They reach whatever the sandbox's own user may reach; relative paths start at the workspace. No operation waits on a
pipe or a device: only regular files are read and written.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import contextlib
import datetime
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ash_recipes.runner.problems import Problem
from ash_recipes.runner.regular_files import Upload, make_parents, open_regular, translated, write_all

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
        with self.open(path) as file, translated(path):
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
        with translated(path):
            return os.fdopen(open_regular(path, found, os.O_RDONLY), "rb", buffering=0)

    def write(self, path: str, data: bytes, offset: int | None, mode: int | None) -> int:
        """Write `data` at `offset` as the file's new end and return its size; None and 0 replace it as a whole.

        So a repeated piece does no harm, and one that would leave a gap is refused.
        """
        if not offset:
            return self._replace(path, data, mode)
        found = self.resolve(path)
        with translated(path), os.fdopen(open_regular(path, found, os.O_WRONLY), "wb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if offset > size:
                raise Problem("bad_request", f"{path} has {size} bytes; a piece at {offset} would leave a gap")
            file.truncate(offset)
            file.seek(offset)
            write_all(file, data)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            return os.fstat(file.fileno()).st_size

    def _replace(self, path: str, data: bytes, mode: int | None) -> int:
        upload = self.upload(path, mode)
        try:
            upload.write(data)
            return upload.finish()
        finally:
            upload.abandon()

    def append(self, path: str, data: bytes) -> int:
        """Add `data` to the end of a file, made if there is none, and return its new size."""
        found = self.resolve(path)
        with translated(path):
            make_parents(found)
            descriptor = open_regular(path, found, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            with os.fdopen(descriptor, "ab", buffering=0) as file:
                write_all(file, data)
                return os.fstat(file.fileno()).st_size

    def list(self, path: str, cursor: str | None = None) -> dict[str, Any]:
        """Return a directory's entries by name, as many as an answer holds, and how many there are.

        The cursor is the name of the last entry before, so that whatever is made or removed between two pages, an
        entry that stays is listed once.
        """
        found, after = self.resolve(path), _read_cursor(cursor)
        entries: list[dict[str, Any]] = []
        room, last = LIST_BYTES, after
        with translated(path):
            names = sorted(os.listdir(os.fsencode(found)))
            for name in names[bisect.bisect_right(names, after) :]:
                try:
                    entry = _entry(os.fsdecode(name), os.lstat(os.path.join(os.fsencode(found), name)))
                except FileNotFoundError:  # removed since
                    continue
                room -= len(json.dumps(entry)) + 2
                if room < 0:
                    break
                entries.append(entry)
                last = name
        more = {"next_cursor": base64.urlsafe_b64encode(last).decode()} if room < 0 else {}
        return {"entries": entries, "total": len(names), "truncated": room < 0, **more}

    def list_lines(self, path: str) -> Iterator[bytes]:
        """Return all entries of a directory by name, each as a line of JSON, in pieces."""
        found = self.folder(path)
        with translated(path):
            names = sorted(os.listdir(os.fsencode(found)))
        return _lines(os.fsencode(found), names)

    def folder(self, path: str) -> Path:
        """Return the absolute path of a directory that may be listed.

        Raises:
            Problem: It is none, or may not.
        """
        found = self.resolve(path)
        with translated(path):
            os.close(os.open(found, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        return found

    def stat(self, path: str) -> dict[str, Any]:
        found = self.resolve(path)
        with translated(path):
            return {"path": str(found), **_entry(found.name or "/", os.lstat(found))}

    def mkdir(self, path: str, *, parents: bool) -> Path:
        found = self.resolve(path)
        with translated(path):
            if parents:
                make_parents(found)
            found.mkdir(exist_ok=parents)
        return found

    def move(self, source: str, destination: str) -> Path:
        """Rename; a file that stands at the destination is replaced, a directory that holds something is not."""
        start, end = self.resolve(source), self.resolve(destination)
        self._require_removable(source, start)
        with translated(source):
            os.lstat(start)
        with translated(destination):
            make_parents(end)
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
        self._require_removable(path, found)
        with translated(path):
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

    def upload(self, path: str, mode: int | None = None) -> Upload:
        """Begin to replace a file by bytes that come in pieces; without a mode it keeps the one that it has."""
        return Upload(path, self.resolve(path), mode)

    def _require_removable(self, path: str, found: Path) -> None:
        real = os.path.realpath(found) if not found.is_symlink() else str(found)
        for kept in (Path("/"), *self.kept):
            if Path(real) == kept or kept.is_relative_to(real):
                raise Problem(
                    "not_permitted", f"{path}: the sandbox needs this directory; remove what is in it instead"
                )


def _lines(folder: bytes, names: Iterable[bytes]) -> Iterator[bytes]:
    waiting = bytearray()
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # removed since
            entry = _entry(os.fsdecode(name), os.lstat(os.path.join(folder, name)))
            waiting += json.dumps(entry).encode() + b"\n"
        if len(waiting) >= LIST_BYTES:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)


def _read_cursor(cursor: str | None) -> bytes:
    try:
        return base64.urlsafe_b64decode(cursor or "")
    except (ValueError, binascii.Error):
        raise Problem("bad_request", "the cursor is none that a list has given") from None


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
