"""The system calls of Linux that the walls of a sandbox are made with, and that Python does not have."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

__all__ = [
    "NO_DEVICES",
    "NO_EXECUTION",
    "NO_SET_UID",
    "READ_ONLY",
    "attach",
    "clone_tree",
    "drop_capabilities",
    "filter_calls",
    "make_private",
    "mount",
    "move_root",
    "overlay",
    "restrict",
    "restrict_here",
    "set_dumpable",
    "unmount",
    "unshare",
]

READ_ONLY, NO_SET_UID, NO_DEVICES, NO_EXECUTION = 0x1, 0x2, 0x4, 0x8
"""Flags of a mount; `mount` and `mount_setattr` share these numbers."""
_SLAVE, _PRIVATE, _RECURSIVE = 0x80000, 0x40000, 0x4000
_DETACH = 2
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_MOVE_FROM_DESCRIPTOR = 0x4
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 22, 24, 38, 47
_CAPABILITY_VERSION = 0x20080522
_LAST_CAPABILITY = 63

# The newer ones have the same number on every architecture.
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _call(number: int, what: str, *arguments: ctypes.c_void_p | ctypes.c_char_p | bytes | int | None) -> int:
    words = (ctypes.c_long(word) if isinstance(word, int) else word for word in arguments)
    return _checked(_libc.syscall(ctypes.c_long(number), *words), what)


def unshare(flags: int) -> None:
    """Give this process new namespaces, as the `CLONE_NEW*` flags say; that of processes only to its children."""
    _checked(_libc.unshare(flags), "unshare")


def mount(kind: str, target: str, flags: int = 0, options: str = "") -> None:
    """Mount a new file system of `kind`."""
    name = kind.encode()
    result = _libc.mount(name, os.fsencode(target), name, ctypes.c_ulong(flags), options.encode() or None)
    _checked(result, f"mount {kind} on {target}")


def make_private(*, receives: bool) -> None:
    """Keep all mounts of this process to itself; if it `receives`, new ones of the host still come."""
    kind = _SLAVE if receives else _PRIVATE
    _checked(_libc.mount(None, b"/", None, ctypes.c_ulong(kind | _RECURSIVE), None), "mount /")


def clone_tree(path: str, at: int = -100) -> int:
    """Return a descriptor of a copy of the mounts at `path`, relative to `at`, that is attached nowhere."""
    flags = 1 | os.O_CLOEXEC | _AT_RECURSIVE | (0 if path else _AT_EMPTY_PATH)
    return _call(_OPEN_TREE, f"open {path}", at, os.fsencode(path), flags)


def restrict(tree: int, flags: int) -> None:
    """Add flags to every mount of a tree."""
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    _call(_MOUNT_SETATTR, "mount_setattr", tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes, len(attributes))


def restrict_here(path: str, flags: int) -> None:
    """Add flags to the mount at `path`, and to none below it."""
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    _call(_MOUNT_SETATTR, f"restrict {path}", -100, os.fsencode(path), 0, attributes, len(attributes))


def attach(tree: int, target: str) -> None:
    """Mount a detached tree at `target`."""
    _call(_MOVE_MOUNT, f"mount on {target}", tree, b"", -100, os.fsencode(target), _MOVE_FROM_DESCRIPTOR)


def overlay(directory: int, empty: int) -> int:
    """Return a descriptor of a read-only overlay of a directory, attached nowhere, with inodes of its own.

    Args:
        empty: An empty directory; an overlay without a place to write takes two.
    """
    made = _call(_FSOPEN, "fsopen overlay", b"overlay", 1)
    try:
        lower = f"/proc/self/fd/{directory}:/proc/self/fd/{empty}".encode()
        _call(_FSCONFIG, "overlay lowerdir", made, 1, b"lowerdir", lower, 0)
        _call(_FSCONFIG, "overlay ro", made, 0, b"ro", None, 0)
        _call(_FSCONFIG, "overlay", made, 6, None, None, 0)
        return _call(_FSMOUNT, "fsmount", made, 1, READ_ONLY | NO_SET_UID | NO_DEVICES)
    finally:
        os.close(made)


def move_root(new: str) -> None:
    """Make `new`, a mount, the root of this process, and let go of the old one with all that is mounted below."""
    old = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir(new)
    _call(_PIVOT_ROOT[os.uname().machine], "pivot_root", b".", b".")
    os.fchdir(old)
    os.close(old)
    unmount(".")
    os.chdir("/")


def unmount(path: str) -> None:
    _checked(_libc.umount2(os.fsencode(path), _DETACH), f"umount {path}")


def set_dumpable(value: int) -> None:
    """Let processes of this user read and change this one (1), or not (0)."""
    _libc.prctl(_PR_SET_DUMPABLE, value, 0, 0, 0)


def drop_capabilities(keep: Iterable[int] = ()) -> None:
    """Give up every capability but `keep`, for good."""
    kept = frozenset(keep)
    _libc.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0)
    for capability in range(_LAST_CAPABILITY + 1):
        if capability not in kept and _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # this kernel has no more
    bits = sum(1 << capability for capability in kept)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    _checked(_libc.capset(header, struct.pack("6I", low, low, 0, high, high, 0)), "capset")


def filter_calls(program: bytes | None) -> None:
    """Allow no new privileges, and from here on only the system calls that a classic BPF program lets pass."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if program is None:
        return
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _checked(_libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")
