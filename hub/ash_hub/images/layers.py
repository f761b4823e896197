"""A layer's archive, unpacked into a directory of its own that an overlay can show over the layers below.

Archives come from strangers. Each name is walked component by component from the directory: nothing is written
outside, whatever links the archive has. Parents are looked up in all layers together, as whoever made the layer saw
them. What a file system of a sandbox cannot have anyway is left out and counted: device nodes, set-user-id bits,
extended attributes. Deleted names become the overlay's own marks, so root alone can unpack.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from ash_hub.images.manifests import refused
from ash_mcp.errors import CapacityExceeded

__all__ = ["Bounds", "unpack"]

_CHUNK = 1024 * 1024
_BLOCK = 4096
_WHITEOUT, _OPAQUE, _OTHERS = ".wh.", ".wh..wh..opq", ".wh..wh."
_OPAQUE_MARK = "trusted.overlay.opaque"
_LONGEST_PATH, _LONGEST_NAME, _DEEPEST = 4095, 255, 128
_MOST_LINKS = 40
_MOST_HEADERS = 64 * _CHUNK
"""How much longer than its files a layer's archive may be."""
_LAST_USER, _NOBODY = 65_535, 65_534
_LATEST = 1 << 33
"""Of a file's time, in seconds."""


@dataclass(slots=True)
class Bounds:
    """What of one layer may be written."""

    bytes_left: int
    entries_left: int
    check: Callable[[int], None] = lambda taken: None
    """Called now and then with the bytes that were written since; raises where the disk has no room."""
    _since: int = 0

    def take_entry(self) -> None:
        self.entries_left -= 1
        if self.entries_left < 0:
            raise refused("it has too many files")
        self.take_bytes(_BLOCK)

    def take_bytes(self, count: int) -> None:
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise CapacityExceeded("the image is larger than there is room for; `ash image remove` makes some")
        self._since += count
        if self._since > 64 * _CHUNK:
            self.check(self._since)
            self._since = 0


@dataclass(slots=True)
class Unpacked:
    """What became of a layer."""

    bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter[str])


def unpack(stream: BinaryIO, root: Path, below: Sequence[Path], bounds: Bounds) -> Unpacked:
    """Unpack an archive into the empty directory `root`.

    Args:
        below: The layers that it stands on, unpacked before, the highest first.

    Raises:
        ConfigError: The archive does what none should.
        CapacityExceeded: It is larger than `bounds`.
    """
    layer = _Layer(root, below, bounds)
    before = bounds.bytes_left
    reader = _Forward(stream, before + _MOST_HEADERS)
    try:
        archive = tarfile.TarFile(fileobj=cast("BinaryIO", reader), errorlevel=2)
        while (member := archive.next()) is not None:
            layer.add(member, reader)
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
            archive.pax_headers = {}  # else global ones add up in memory; no tool for images heeds them
    except (tarfile.TarError, ValueError, RecursionError, OverflowError) as error:
        if not (isinstance(error, tarfile.ReadError) and str(error) == "empty file"):
            raise refused(f"a layer is no archive that can be read: {error}") from error
    layer.result.bytes = before - bounds.bytes_left
    return layer.result


class _Forward:
    """A stream as `tarfile` wants it: it goes forward only, gives no large piece at once, and has a bound.

    The bound is for what is read and not written, as the content of an entry that is passed over.
    """

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self._stream = stream
        self._most = most
        self._at = 0

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _CHUNK:
            raise refused("a header of a layer's archive is too long")
        found = bytearray()
        while len(found) < size and (data := self._stream.read(size - len(found))):
            found += data
        self._at += len(found)
        if self._at > self._most:
            raise CapacityExceeded("the archive of a layer is larger than there is room for")
        return bytes(found)

    def tell(self) -> int:
        return self._at

    def seek(self, target: int) -> None:
        if target < self._at:
            raise refused("a layer's archive leads back to what was read")
        while self._at < target and self.read(min(target - self._at, _CHUNK)):
            pass


class _Layer:
    def __init__(self, root: Path, below: Sequence[Path], bounds: Bounds) -> None:
        self._root, self._below, self._bounds = root, below, bounds
        self.result = Unpacked()

    def add(self, member: tarfile.TarInfo, reader: _Forward) -> None:
        parts = _parts(member.name)
        self._bounds.take_entry()
        if not parts:
            if member.isdir():
                self._own(self._root, member)
            return
        *above, last = parts
        if last.startswith(_WHITEOUT):
            self._delete(above, last)
            return
        if member.issparse():
            raise refused(f"{member.name!r} of a layer is a sparse file")
        path = self._directory(above) / last
        if member.isdir():
            self._add_directory(path, member)
        elif member.isreg():
            self._clear(path)
            self._add_file(path, member, reader)
        elif member.issym():
            self._clear(path)
            if not 0 < len(os.fsencode(member.linkname)) <= _LONGEST_PATH:
                raise refused(f"the link {member.name!r} leads nowhere, or too far")
            os.symlink(member.linkname, path)
            self._own(path, member)
        elif member.islnk():
            self._link(path, member)
        elif member.isfifo():
            self._clear(path)
            os.mkfifo(path)
            self._own(path, member)
        elif member.ischr() or member.isblk():
            self.result.left_out["device nodes"] += 1
        else:
            raise refused(f"{member.name!r} of a layer is of a kind that no image has ({member.type!r})")

    def _add_directory(self, path: Path, member: tarfile.TarInfo) -> None:
        was_deleted = _is_whiteout(path)
        if not _is_directory(path):
            self._clear(path)
            path.mkdir()
        if was_deleted:
            os.setxattr(path, _OPAQUE_MARK, b"y")
        self._own(path, member)

    def _add_file(self, path: Path, member: tarfile.TarInfo, reader: _Forward) -> None:
        if member.size < 0:
            raise refused(f"{member.name!r} of a layer has a size below nothing")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        left = member.size
        with open(descriptor, "wb", buffering=0) as file:
            while left:
                data = reader.read(min(left, _CHUNK))
                if not data:
                    raise refused("a layer's archive ends in the middle of a file")
                self._bounds.take_bytes(len(data))
                file.write(data)
                left -= len(data)
        self._own(path, member)

    def _link(self, path: Path, member: tarfile.TarInfo) -> None:
        *above, last = _parts(member.linkname) or [""]
        found = self._seen([*self._resolved(above), last]) if last else None
        status = None if found is None else found.lstat()
        if found is None or status is None or not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            raise refused(f"{member.name!r} of a layer is a hard link to {member.linkname!r}, which is no file there")
        if found == path:
            return
        self._clear(path)
        if found.is_relative_to(self._root):
            os.link(found, path, follow_symlinks=False)
            return
        self._bounds.take_bytes(status.st_size)  # of a layer below: as an overlay would, a copy
        shutil.copyfile(found, path, follow_symlinks=False)
        os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode):
            os.chmod(path, stat.S_IMODE(status.st_mode))
        os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns), follow_symlinks=False)

    def _delete(self, above: list[str], last: str) -> None:
        if last == _OPAQUE:
            os.setxattr(self._directory(above), _OPAQUE_MARK, b"y")
            return
        if last.startswith(_OTHERS):
            return  # notes of an older storage driver to itself
        name = last.removeprefix(_WHITEOUT)
        if name in ("", ".", ".."):
            raise refused(f"a layer deletes {name!r}")
        path = self._directory(above) / name
        if _is_directory(path):
            os.setxattr(path, _OPAQUE_MARK, b"y")  # deleted below, and made anew here
        elif not os.path.lexists(path):
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))

    def _directory(self, parts: Sequence[str]) -> Path:
        """Return a directory of this layer, made where it is missing, as it is in the layers below."""
        at, seen = self._root, list[str]()
        for name in self._resolved(parts):
            seen.append(name)
            at = at / name
            if _is_directory(at):
                continue
            like = self._seen(seen)
            self._clear(at)
            self._bounds.take_entry()
            at.mkdir(mode=0o755)
            at.chmod(0o755)
            if like is not None and _is_directory(like):
                status = like.lstat()
                os.chown(at, status.st_uid, status.st_gid)
                os.chmod(at, stat.S_IMODE(status.st_mode))
        return at

    def _resolved(self, parts: Sequence[str]) -> list[str]:
        """Return where a directory is once the links on the way are followed, none of them out of the root."""
        ahead, found, links = list(reversed(parts)), list[str](), 0
        while ahead:
            name = ahead.pop()
            if name == "..":
                del found[-1:]
                continue
            there = self._seen([*found, name])
            if there is None or not there.is_symlink():
                found.append(name)
                if len(found) > _DEEPEST:
                    raise refused("a path of a layer is too deep")
                continue
            links += 1
            if links > _MOST_LINKS:
                raise refused(f"links of {'/'.join(parts)!r} lead in circles")
            target = os.readlink(there)
            if target.startswith("/"):
                found = []
            ahead += [each for each in reversed(target.split("/")) if each not in ("", ".")]
        return found

    def _seen(self, parts: Sequence[str]) -> Path | None:
        """Return the file that all layers together have under a name without links."""
        for layer in (self._root, *self._below):
            at = layer
            for number, name in enumerate(parts):
                at = at / name
                try:
                    mode = at.lstat().st_mode
                except OSError:
                    break
                if number == len(parts) - 1:
                    return None if _is_whiteout(at) else at
                if not stat.S_ISDIR(mode):
                    return None  # it hides what is below
            if self._hides(layer, parts):
                return None
        return None

    def _hides(self, layer: Path, parts: Sequence[str]) -> bool:
        at = layer
        for name in parts[:-1]:
            at = at / name
            if not _is_directory(at):
                return False
            try:
                if os.getxattr(at, _OPAQUE_MARK) == b"y":
                    return True
            except OSError:
                continue
        return False

    def _clear(self, path: Path) -> None:
        """Remove what an earlier entry of the same layer put there."""
        if _is_directory(path):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _own(self, path: Path, member: tarfile.TarInfo) -> None:
        users = (member.uid, member.gid)
        if not all(0 <= each <= _LAST_USER for each in users):
            self.result.left_out["owners over 65,535, who are nobody here"] += 1
        uid, gid = (each if 0 <= each <= _LAST_USER else _NOBODY for each in users)
        os.chown(path, uid, gid, follow_symlinks=False)
        seconds = int(min(max(float(member.mtime), 0), _LATEST))
        if not member.issym():
            mode = member.mode & 0o7777
            if not member.isdir() and mode & 0o6000:
                self.result.left_out["set-user-id bits"] += 1
                mode &= 0o1777
            os.chmod(path, mode)
        os.utime(path, (seconds, seconds), follow_symlinks=False)
        if any(name.startswith("SCHILY.xattr.") for name in member.pax_headers):
            self.result.left_out["extended attributes"] += 1


def _parts(name: str) -> list[str]:
    """Return the components of a name in an archive.

    Raises:
        ConfigError: It leads out, or is too long.
    """
    parts = [each for each in name.split("/") if each not in ("", ".")]
    if ".." in parts:
        raise refused(f"{name[:200]!r} of a layer leads out of it")
    if len(parts) > _DEEPEST or len(os.fsencode(name)) > _LONGEST_PATH:
        raise refused("a path of a layer is too deep or too long")
    if any(len(os.fsencode(each)) > _LONGEST_NAME or "\0" in each for each in parts):
        raise refused("a name of a layer is too long")
    return parts


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _is_whiteout(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
