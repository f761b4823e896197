"""Local folders as tar archives, both ways. All of it blocks: call it in a worker thread.

What comes from a sandbox is not trusted: no name or link in it leads out of the folder, and no link that stands here
is followed.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol

from ash_mcp.errors import ConfigError, SandboxRefused

__all__ = ["Packing", "Source", "Unpacked", "unpack"]

PIECE_BYTES: Final = 512 * 1024
MOST_MEMBERS: Final = 1_000_000
_PERMISSIONS: Final = 0o777


class Source(Protocol):
    def read(self, size: int, /) -> bytes:
        """Return some bytes, none only at the end."""
        ...


@dataclass(frozen=True, slots=True)
class _Member:
    path: Path
    info: tarfile.TarInfo


class Packing:
    """A local folder, which `pieces` packs. Files, folders and symbolic links that stay inside are packed.

    Args:
        skip: Whether what else is in it is left out; it is in `skipped` then.

    Raises:
        ConfigError: A link leads out of it, or something in it is neither of these.
        OSError: It cannot be read.
    """

    def __init__(self, root: Path, *, skip: bool = False) -> None:
        self.skipped: list[Path] = []
        self._members = list(_members(root, PurePosixPath(), self.skipped if skip else None))
        self.files = sum(not member.info.isdir() for member in self._members)
        """Also links."""
        self.total = sum(member.info.size for member in self._members)
        """Bytes of all files together."""
        self.done = 0
        """Those that `pieces` has given."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the archive in pieces.

        Raises:
            OSError: A file cannot be read, or has become shorter.
        """
        waiting = bytearray()
        for member in self._members:
            waiting += member.info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
            if member.info.isreg():
                for piece in _content(member):
                    waiting += piece
                    self.done += len(piece)
                    if len(waiting) >= PIECE_BYTES:
                        yield bytes(waiting)
                        waiting.clear()
                waiting += bytes(-member.info.size % tarfile.BLOCKSIZE)
            if len(waiting) >= PIECE_BYTES:
                yield bytes(waiting)
                waiting.clear()
        yield bytes(waiting + bytes(2 * tarfile.BLOCKSIZE))


def _members(folder: Path, inside: PurePosixPath, skipped: list[Path] | None) -> Iterator[_Member]:
    for path in sorted(folder.iterdir()):
        shown, found = inside / path.name, path.lstat()
        info = tarfile.TarInfo(str(shown))
        info.mode, info.mtime = stat.S_IMODE(found.st_mode), int(found.st_mtime)
        if stat.S_ISREG(found.st_mode):
            info.size = found.st_size
            yield _Member(path, info)
        elif stat.S_ISDIR(found.st_mode):
            info.type = tarfile.DIRTYPE
            yield _Member(path, info)
            yield from _members(path, shown, skipped)
        elif stat.S_ISLNK(found.st_mode) and _stays_inside(os.readlink(path), len(shown.parts) - 1):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
            yield _Member(path, info)
        elif skipped is not None:
            skipped.append(path)
        elif stat.S_ISLNK(found.st_mode):
            raise ConfigError(f"{path} is a link that leads out of the folder, to {os.readlink(path)!r}; take it out")
        else:
            raise ConfigError(f"{path} is a device, a pipe or a socket, which cannot be copied; take it out")


def _content(member: _Member) -> Iterator[bytes]:
    left = member.info.size
    with member.path.open("rb") as file:
        while left > 0:
            piece = file.read(min(PIECE_BYTES, left))
            if not piece:
                raise OSError(None, "became shorter while it was read", str(member.path))
            left -= len(piece)
            yield piece


def _stays_inside(link: str, depth: int) -> bool:
    """Return whether a link's target is inside. `..` may only stand first, since a name may be a link itself."""
    parts = link.split("/")
    ups = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
    return bool(link) and not link.startswith("/") and ups <= depth and ".." not in parts[ups:]


@dataclass(slots=True)
class Unpacked:
    files: int = 0
    """Also links."""
    bytes: int = 0
    skipped: list[str] = field(default_factory=list[str])
    """Links that lead out of the folder, where they are left out."""


def unpack(source: Source, target: Path, report: Callable[[int], None], *, skip: bool = False) -> Unpacked:
    """Unpack an archive of a sandbox into a folder, made where there is none.

    Each file is whole or not there; of an archive that breaks off some are there and some not.

    Args:
        report: Called with the bytes that are done.
        skip: Whether links that lead out of the folder are left out, and not refused.

    Raises:
        SandboxRefused: It is no archive, or one with what must not be unpacked here.
        OSError: Something cannot be written.
    """
    target.mkdir(exist_ok=True)
    reader: Any = source
    unpacking = _Unpacking(target, report, skip=skip)
    try:
        with tarfile.open(fileobj=reader, mode="r|", bufsize=PIECE_BYTES, encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"] = []  # it would keep them all
                unpacking.take(archive, member)
    except tarfile.TarError as exc:
        raise SandboxRefused(f"the sandbox sent no whole archive: {exc}") from exc
    while source.read(PIECE_BYTES):
        pass
    unpacking.set_modes()
    return unpacking.tally


class _Unpacking:
    def __init__(self, target: Path, report: Callable[[int], None], *, skip: bool) -> None:
        self.tally = Unpacked()
        self._skip = skip
        self._target = target
        self._report = report
        self._known = {target}
        """Folders that are none of somebody else's links."""
        self._modes: list[tuple[Path, int]] = []
        self._count = 0

    def take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self._count += 1
        parts = tuple(part for part in member.name.split("/") if part not in ("", "."))
        if (
            member.name.startswith("/")
            or ".." in parts
            or "\0" in member.name
            or "\\" in member.name * (os.sep == "\\")
        ):
            raise SandboxRefused(f"the sandbox named a file {member.name[:80]!r}, which leads out of the folder")
        if self._count > MOST_MEMBERS:
            raise SandboxRefused(f"the sandbox's folder holds more than {MOST_MEMBERS} entries")
        if member.isdir():
            folder = self._folder(parts)
            if parts:
                self._modes.append((folder, member.mode & _PERMISSIONS | stat.S_IRWXU))
            return
        if not parts or not (member.isreg() or member.issym()):
            raise SandboxRefused(f"the sandbox sent {member.name[:80]!r}, which is no file, folder or symbolic link")
        path = self._folder(parts[:-1]) / parts[-1]
        if member.issym() and not _stays_inside(member.linkname, len(parts) - 1):
            if not self._skip:
                raise SandboxRefused(f"the sandbox sent a link out of the folder, {member.name[:80]!r}")
            self.tally.skipped.append(member.name)
            return
        self.tally.files += 1
        if member.isreg():
            self._file(archive, member, path)
        else:
            path.unlink(missing_ok=True)
            path.symlink_to(member.linkname)

    def _file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        content = archive.extractfile(member)
        assert content is not None, "a regular member has content"
        part = path.with_name(f".{os.urandom(8).hex()}.part")
        try:
            with part.open("xb") as file:
                while piece := content.read(PIECE_BYTES):
                    file.write(piece)
                    self.tally.bytes += len(piece)
                    self._report(self.tally.bytes)
            part.chmod(member.mode & _PERMISSIONS)
            os.utime(part, (member.mtime, member.mtime))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _folder(self, parts: tuple[str, ...]) -> Path:
        folder = self._target
        for part in parts:
            folder /= part
            if folder not in self._known:
                if folder.is_symlink():
                    raise FileExistsError(None, "a symbolic link stands where a folder would be written", str(folder))
                folder.mkdir(exist_ok=True)
                self._known.add(folder)
        return folder

    def set_modes(self) -> None:
        for folder, mode in reversed(self._modes):
            folder.chmod(mode)
