"""Mounts of a launch alone: host directories under names that tell nothing, and device nodes that nobody changes.

What is bound into a sandbox stands in its mount table with its path on the host, user names and all. An overlay that
was given its directory as a descriptor stands there with `/proc/self/fd/N` instead. Files in it have inodes of their
own, too: to watch or lock one is not to watch or lock the host's.

A device node that is bound into a sandbox is the host's own, and so are its mode, owner and times. Bound read-only, it
keeps those and is written to all the same.

Standard library only: the launcher does this in the child that becomes bubblewrap, and `python mount_names.py
DIRECTORY...` prints what of it the host allows: `seal`, and each directory that an overlay can show.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Sequence

__all__ = ["DEVICES", "checked", "hides_mounts", "mount", "mount_points", "own_mounts", "seal", "show"]

DEVICES = tuple(f"/dev/{name}" for name in ("full", "null", "random", "tty", "urandom", "zero"))
"""Nodes of the host that bubblewrap binds into every /dev."""

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _SLAVE = 0x1, 0x20, 0x1000, 0x4000, 0x80000
_KEPT = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
"""What a mount may forbid and a user namespace may not allow again; `mount` and `statvfs` share these numbers."""


_UNSEEN = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
"""Where containers have mounts that no sandbox is to see: it has such files of its own."""


def own_mounts() -> None:
    """Give this process a mount namespace: nothing that it mounts is seen elsewhere or outlives it.

    Raises:
        OSError: The kernel does not let this user do it.
    """
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    checked(libc.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)))
    if user:
        # As itself: whoever else is in this namespace keeps its number, and nobody gains one.
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    mount(None, "/", _RECURSIVE | _SLAVE)


def show(pairs: Sequence[tuple[str, str]], empty: str) -> bool:
    """Mount overlays, in a process that has its own mounts.

    Args:
        pairs: Directories to mount on, with the directories that shall appear there, read-only.
        empty: An empty directory; an overlay without a place to write takes two.

    Returns:
        Whether all could be shown so; the others appear as they are, with the host's inodes and paths.

    Raises:
        OSError: The kernel does not let this user do it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    mounted, is_whole = mount_points(), True
    second = os.open(empty, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for target, directory in pairs:
        first = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        options = f"lowerdir=/proc/self/fd/{first}:/proc/self/fd/{second}".encode()
        flags = ctypes.c_ulong(_READ_ONLY)
        # An overlay does not show what is mounted further down, and not every file system can be below one.
        if (
            hides_mounts(directory, mounted)
            or libc.mount(b"overlay", os.fsencode(target), b"overlay", flags, options) != 0
        ):
            mount(directory, target, _BIND | _RECURSIVE)
            is_whole = False
        os.close(first)
    os.close(second)
    return is_whole


def hides_mounts(directory: str, mounted: Sequence[str] | None = None) -> bool:
    """Return whether something is mounted below a directory, which an overlay of it would not show."""
    points = mount_points() if mounted is None else mounted
    return any(point.startswith(f"{directory}/") for point in points if point not in _UNSEEN)


def mount_points() -> list[str]:
    with open("/proc/self/mountinfo") as table:
        return [line.split()[4].replace("\\040", " ") for line in table]


def seal(nodes: Sequence[str]) -> None:
    """Bind device nodes onto themselves, read-only, in a process that has its own mounts.

    Raises:
        OSError: The kernel does not let this user do it.
    """
    for node in nodes:
        mount(node, node, _BIND)
        mount(None, node, _REMOUNT | _BIND | _READ_ONLY | os.statvfs(node).f_flag & _KEPT)


def mount(source: str | None, target: str, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    what = None if source is None else os.fsencode(source)
    checked(libc.mount(what, os.fsencode(target), None, ctypes.c_ulong(flags), None))


def checked(result: int) -> int:
    """Return what a call of the C library did, unless it is a failure."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _try(directories: Sequence[str], place: str) -> None:
    """Print what this user may do, with a place for mounts."""
    own_mounts()
    os.mkdir(f"{place}/empty")
    for number, directory in enumerate(directories):
        seen = f"{place}/{number}"
        os.mkdir(seen)
        show([(seen, directory)], f"{place}/empty")
        with open("/proc/self/mountinfo") as file:
            table = file.read().splitlines()
        if any(f" {seen} " in line and " - overlay " in line for line in table) and os.listdir(seen):
            os.write(1, os.fsencode(directory) + b"\n")
    seal(DEVICES)
    os.write(1, b"seal\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        # In a child: its namespaces end with it, and the directory can be removed.
        if (child := os.fork()) == 0:
            with contextlib.suppress(OSError):
                _try(sys.argv[1:], made)
            os._exit(0)
        os.waitpid(child, 0)
