"""Copies what a sandbox has written while it goes on: a process of its own, which sees nothing but the two layers.

    layer_copy.py FROM TO [FROM TO]...

Each is the descriptor of a space. The process covers a directory with them in mounts of its own and makes that its
root, so that a link leads nowhere else, whenever it is made. Each file is as it was at some moment; all of them
together are not. Whiteouts, attributes, owners and hard links are kept, sockets left out.

Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import sys
from collections.abc import Iterator
from typing import NamedTuple

from .layers import attach
from .mount_names import checked, own_mounts
from .staging import place

__all__ = ["main"]

_NO_SUID, _NO_DEVICES = 0x2, 0x4
_GONE = (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ESTALE)
"""Of what was removed or replaced while it was looked at."""
_MOST_LINKED = 100_000
_LOWEST_PRIORITY = 19
_PARENT_DEATH_SIGNAL = 1


def main(words: list[str]) -> None:
    """Copy, and end with the exit code 0 if all was."""
    numbers = [int(word) for word in words]
    libc, flags = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong(_NO_SUID | _NO_DEVICES)
    checked(libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))
    os.nice(_LOWEST_PRIORITY)
    own_mounts()
    root = place()
    checked(libc.mount(b"tmpfs", os.fsencode(root), b"tmpfs", flags, b"mode=0700"))
    for number, space in enumerate(numbers):
        os.mkdir(f"{root}/{number}")
        attach(space, f"{root}/{number}", None, read_only=number % 2 == 0)
    os.chroot(root)
    os.chdir("/")
    for number in range(0, len(numbers), 2):
        for key in os.listdir(f"/{number}"):
            os.mkdir(f"/{number + 1}/{key}", 0o755)
            os.mkdir(f"/{number + 1}/{key}/upper", 0o755)
            _Copy(f"/{number}/{key}/upper", f"/{number + 1}/{key}/upper").run()


class _Directory(NamedTuple):
    names: Iterator[str]
    source: int
    target: int
    path: str
    """Below the top, for hard links."""


class _Copy:
    """One copy of a tree, by descriptors: a path may be longer than the kernel takes."""

    def __init__(self, source: str, target: str) -> None:
        self._top = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        self._linked: dict[int, str] = {}
        self._open: list[_Directory] = []
        self._enter(os.open(source, os.O_RDONLY | os.O_DIRECTORY), os.dup(self._top), "")

    def run(self) -> None:
        while self._open:
            at = self._open[-1]
            name = next(at.names, None)
            if name is None:
                self._leave(self._open.pop())
                continue
            try:
                self._one(at, name)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
        os.close(self._top)

    def _enter(self, source: int, target: int, path: str) -> None:
        self._open.append(_Directory(iter(os.listdir(source)), source, target, path))

    def _leave(self, at: _Directory) -> None:
        _same(at.source, at.target, os.fstat(at.source))
        os.close(at.source)
        os.close(at.target)

    def _one(self, at: _Directory, name: str) -> None:
        found = os.stat(name, dir_fd=at.source, follow_symlinks=False)
        path = f"{at.path}{name}"
        if stat.S_ISDIR(found.st_mode):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            source = os.open(name, flags, dir_fd=at.source)
            os.mkdir(name, 0o700, dir_fd=at.target)
            self._enter(source, os.open(name, flags, dir_fd=at.target), f"{path}/")
        elif stat.S_ISREG(found.st_mode):
            if (first := self._linked.get(found.st_ino)) is not None:
                os.link(first, name, src_dir_fd=self._top, dst_dir_fd=at.target)
                return
            _file(at, name)
            if found.st_nlink > 1 and len(path) < 4000 and len(self._linked) < _MOST_LINKED:
                self._linked[found.st_ino] = path
        elif stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(name, dir_fd=at.source), name, dir_fd=at.target)
            os.chown(name, found.st_uid, found.st_gid, dir_fd=at.target, follow_symlinks=False)
        elif stat.S_ISFIFO(found.st_mode) or (stat.S_ISCHR(found.st_mode) and found.st_rdev == 0):
            os.mknod(name, found.st_mode, 0, dir_fd=at.target)
            os.chown(name, found.st_uid, found.st_gid, dir_fd=at.target, follow_symlinks=False)


def _file(at: _Directory, name: str) -> None:
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at.source)
    target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=at.target)
    found = os.fstat(source)
    for start, end in _written(source, found.st_size):
        os.lseek(source, start, os.SEEK_SET)
        os.lseek(target, start, os.SEEK_SET)
        while start < end and (done := os.sendfile(target, source, None, end - start)):
            start += done
    os.ftruncate(target, found.st_size)
    _same(source, target, found)
    os.close(source)
    os.close(target)


def _written(source: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where a file has something, so that its holes stay holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        end = min(os.lseek(source, start, os.SEEK_HOLE), size)
        yield start, end


def _same(source: int, target: int, found: os.stat_result) -> None:
    """Give a copy the owner, mode, attributes and times of the original."""
    os.fchown(target, found.st_uid, found.st_gid)
    os.fchmod(target, stat.S_IMODE(found.st_mode))
    for attribute in os.listxattr(source):
        os.setxattr(target, attribute, os.getxattr(source, attribute))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


if __name__ == "__main__":
    main(sys.argv[1:])
