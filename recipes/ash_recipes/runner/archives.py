"""Folders as tar archives, both ways, in pieces. All of it blocks.

What is unpacked is first written beside its place and moved there when all of it has come: an archive that breaks off
or is refused changes nothing. No name or link in it leads out of the folder, and no link in the folder is followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

from ash_recipes.runner.problems import Problem
from ash_recipes.runner.regular_files import make_parents, translated, umask, write_all

__all__ = ["Source", "Unpacked", "pack", "unpack"]

PIECE_BYTES: Final = 524_288
_BLOCK: Final = tarfile.BLOCKSIZE
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PERMISSIONS: Final = 0o777


class Source(Protocol):
    def read(self, size: int, /) -> bytes:
        """Return some bytes, none only at the end; raise `EOFError` where it breaks off."""
        ...


@dataclass(slots=True)
class Unpacked:
    files: int = 0
    """Also links."""
    bytes: int = 0


# Packing.


def pack(root: Path) -> Iterator[bytes]:
    """Yield the archive of a folder's content: files, folders and symbolic links, as GNU tar has them, in pieces.

    Sockets, pipes and devices are left out, and what is removed meanwhile. A file whose length changes has the length
    that it had.

    Raises:
        OSError: Something cannot be read. The archive breaks off, and so is not taken for a whole one.
    """
    waiting = bytearray()
    for part in _members(os.fsencode(root), b""):
        waiting += part
        if len(waiting) >= PIECE_BYTES:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting + bytes(2 * _BLOCK))


def _members(folder: bytes, prefix: bytes) -> Iterator[bytes]:
    for name in sorted(os.listdir(folder)):
        path, shown = os.path.join(folder, name), prefix + name
        try:
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode):
                yield from _file(path, shown)
            elif stat.S_ISLNK(found.st_mode):
                yield _head(shown, found, tarfile.SYMTYPE, os.fsdecode(os.readlink(path)))
            elif stat.S_ISDIR(found.st_mode):
                yield _head(shown + b"/", found, tarfile.DIRTYPE)
                yield from _members(path, shown + b"/")
        except FileNotFoundError:
            continue


def _file(path: bytes, shown: bytes) -> Iterator[bytes]:
    with os.fdopen(
        os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0
    ) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            return
        yield _head(shown, found, tarfile.REGTYPE)
        left = found.st_size
        while left > 0:
            piece = file.read(min(PIECE_BYTES, left)) or bytes(min(PIECE_BYTES, left))
            left -= len(piece)
            yield piece
        yield bytes(-found.st_size % _BLOCK)


def _head(shown: bytes, found: os.stat_result, kind: bytes, link: str = "") -> bytes:
    member = tarfile.TarInfo(os.fsdecode(shown))
    member.type, member.linkname = kind, link
    member.mode, member.mtime = stat.S_IMODE(found.st_mode), int(found.st_mtime)
    member.size = found.st_size if kind == tarfile.REGTYPE else 0
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


# Unpacking.


def unpack(source: Source, path: str, target: Path) -> Unpacked | None:
    """Unpack an archive into a folder, which is made where there is none; what it has of the same name is replaced.

    Returns:
        None where the source broke off; nothing has changed then.

    Raises:
        Problem: The source is no tar archive, or holds what must not be unpacked; nothing has changed then. Or a file
            stands where the archive has a folder, or a folder where it has a file.
    """
    target = Path(os.path.realpath(target))
    with translated(path):
        existed = target.is_dir()
        if not existed:
            make_parents(target)
            if target.exists():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        stage = tempfile.mkdtemp(prefix=".ash-", dir=target if existed else target.parent)
        try:
            done = _Unpacking(stage, path)
            try:
                done.take(source)
                if existed:
                    done.merge_into(target)
                else:
                    os.chmod(stage, _PERMISSIONS & ~umask())
                    os.rename(stage, target)
                done.set_modes(target)
            finally:
                done.close()
        except EOFError:
            return None
        except tarfile.TarError as exc:
            raise Problem("bad_request", f"the body is no tar archive, or not a whole one: {exc}") from exc
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return done.tally


class _Unpacking:
    """An archive on its way into a folder of its own, which is reached by descriptors alone."""

    def __init__(self, stage: str, path: str) -> None:
        self.tally = Unpacked()
        self._path = path
        self._root = os.open(stage, _FOLDER)
        self._way: list[tuple[str, int]] = []
        """The folders down to the one that was written to last, and their descriptors."""
        self._modes: dict[tuple[str, ...], int] = {}

    def close(self) -> None:
        self._cut_way(0)
        os.close(self._root)

    def take(self, source: Source) -> None:
        """Unpack all that the source has."""
        reader: Any = source
        with tarfile.open(
            fileobj=reader, mode="r|", bufsize=PIECE_BYTES, encoding="utf-8", errors="surrogateescape"
        ) as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"] = []  # it would keep them all
                self._member(archive, member)
        while source.read(PIECE_BYTES):  # what pads it
            pass

    def _member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = self._parts(member.name)
        if member.isdir():
            self._folder(parts)
            if parts:
                self._modes[parts] = member.mode & _PERMISSIONS
            return
        if not parts:
            raise self._refused(member.name, "names the folder itself")
        if not (member.isreg() or member.issym() or member.islnk()):
            raise self._refused(member.name, "is a device, a pipe or something else that is no file")
        parent, name = self._folder(parts[:-1]), parts[-1]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)  # of two members of one name the later one counts
        self.tally.files += 1
        if member.issym():
            os.symlink(self._link_target(member, len(parts) - 1), name, dir_fd=parent)
        elif member.islnk():
            self._hard_link(member, parent, name)
        else:
            self._file(archive, member, parent, name)

    def _file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, parent: int, name: str) -> None:
        content: IO[bytes] | None = archive.extractfile(member)
        assert content is not None, "a regular member has content"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, 0o600, dir_fd=parent), "wb", buffering=0) as file:
            while piece := content.read(PIECE_BYTES):
                write_all(file, piece)
                self.tally.bytes += len(piece)
            os.fchmod(file.fileno(), member.mode & _PERMISSIONS)
            with contextlib.suppress(OverflowError):
                os.utime(file.fileno(), (member.mtime, member.mtime))

    def _hard_link(self, member: tarfile.TarInfo, parent: int, name: str) -> None:
        parts = self._parts(member.linkname)
        if not parts:
            raise self._refused(member.name, "is a link to the folder itself")
        here = os.dup(parent)
        try:
            there = self._folder(parts[:-1])
            if not stat.S_ISREG(os.stat(parts[-1], dir_fd=there, follow_symlinks=False).st_mode):
                raise self._refused(member.name, "is a link to no file of the archive")
            os.link(parts[-1], name, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False)
        finally:
            os.close(here)

    def _link_target(self, member: tarfile.TarInfo, depth: int) -> str:
        """Return where a symbolic link leads: inside the folder.

        `..` may only stand first: behind a name it is taken from wherever that leads, which may be another link.
        """
        parts = member.linkname.split("/")
        ups = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
        if not member.linkname or member.linkname.startswith("/") or ups > depth or ".." in parts[ups:]:
            raise self._refused(member.name, f"is a link that leads out of the folder, to {member.linkname!r}")
        return member.linkname

    def _parts(self, name: str) -> tuple[str, ...]:
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise self._refused(name, "is a name that leads out of the folder")
        return parts

    def _refused(self, name: str, words: str) -> Problem:
        return Problem("bad_request", f"{self._path}: {name!r} in the archive {words}; nothing was unpacked")

    def _folder(self, parts: tuple[str, ...]) -> int:
        """Return the descriptor of a folder, made where there is none; good until the next call."""
        shared = 0
        while shared < min(len(parts), len(self._way)) and self._way[shared][0] == parts[shared]:
            shared += 1
        self._cut_way(shared)
        for part in parts[shared:]:
            above = self._way[-1][1] if self._way else self._root
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=above)
            self._way.append((part, os.open(part, _FOLDER, dir_fd=above)))
        return self._way[-1][1] if self._way else self._root

    def _cut_way(self, length: int) -> None:
        while len(self._way) > length:
            os.close(self._way.pop()[1])

    def merge_into(self, target: Path) -> None:
        """Move what was unpacked into a folder that exists."""
        descriptor = os.open(target, _FOLDER)
        try:
            self._cut_way(0)
            _merge(self._root, descriptor)
        finally:
            os.close(descriptor)

    def set_modes(self, target: Path) -> None:
        """Give the folders their permissions; while files came into them they had to be writable."""
        self._cut_way(0)
        os.close(self._root)
        self._root = os.open(target, _FOLDER)
        for parts, mode in sorted(self._modes.items(), reverse=True):  # those inside come before those around them
            os.fchmod(self._folder(parts), mode)


def _merge(source: int, target: int) -> None:
    for name in os.listdir(source):
        try:
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            inner = os.open(name, _FOLDER, dir_fd=source)
            try:
                into = os.open(name, _FOLDER, dir_fd=target)
                try:
                    _merge(inner, into)
                finally:
                    os.close(into)
            finally:
                os.close(inner)
