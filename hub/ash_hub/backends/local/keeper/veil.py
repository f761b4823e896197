"""Host directories under names that tell nothing.

What is bound into a sandbox stands in its mount table with its path on the host, user names and all. An overlay that
was given its directory as a descriptor stands there with `/proc/self/fd/N` instead. Standard library only: the keeper
does this in the child that becomes the launcher, and `python veil.py DIRECTORY` says whether the host lets it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Sequence

__all__ = ["veil"]

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _BIND, _RECURSIVE, _SLAVE = 0x1, 0x1000, 0x4000, 0x80000


def veil(pairs: Sequence[tuple[str, str]], empty: str) -> None:
    """Mount overlays in mount namespaces of this process alone.

    Args:
        pairs: Directories to mount on, with the directories that shall appear there, read-only.
        empty: An empty directory; an overlay without a place to write takes two.

    Raises:
        OSError: The kernel does not let this user do it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    _checked(libc.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)))
    if user:
        # As itself: whoever else is in this namespace keeps its number, and nobody gains one.
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _checked(libc.mount(b"none", b"/", None, ctypes.c_ulong(_RECURSIVE | _SLAVE), None))
    second = os.open(empty, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for target, directory in pairs:
        first = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        options = f"lowerdir=/proc/self/fd/{first}:/proc/self/fd/{second}".encode()
        flags = ctypes.c_ulong(_READ_ONLY)
        if libc.mount(b"overlay", os.fsencode(target), b"overlay", flags, options) != 0:
            # Not every file system can be below an overlay; better seen than missing.
            flags = ctypes.c_ulong(_BIND | _RECURSIVE)
            _checked(libc.mount(os.fsencode(directory), os.fsencode(target), None, flags, None))
        os.close(first)
    os.close(second)


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        # In a child: its namespaces end with it, and the directory can be removed.
        if (child := os.fork()) == 0:
            try:
                os.mkdir(os.path.join(place, "empty"))
                os.mkdir(os.path.join(place, "seen"))
                veil([(os.path.join(place, "seen"), sys.argv[1])], os.path.join(place, "empty"))
                with open("/proc/self/mountinfo") as table:
                    overlaid = any(f" {place}/seen " in line and " - overlay " in line for line in table)
                os._exit(0 if overlaid and os.listdir(os.path.join(place, "seen")) else 1)
            except OSError:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code)
