"""The system calls of Linux that the walls of a sandbox are made with, and that Python does not have."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import struct
import time
from collections.abc import Iterable, Sequence

__all__ = [
    "NO_DEVICES",
    "NO_EXECUTION",
    "NO_SET_UID",
    "READ_ONLY",
    "attach",
    "bound_capabilities",
    "clone_tree",
    "close_all_but",
    "filter_calls",
    "fold_pages",
    "fork",
    "join",
    "make_private",
    "mount",
    "move_root",
    "restrict",
    "restrict_here",
    "send_patiently",
    "set_capabilities",
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
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PATIENCE_SECONDS, _PAUSE_SECONDS = 2.0, 0.02
_HUGE, _COLLAPSE = 2 * 1024 * 1024, 25
_libc = ctypes.CDLL(None, use_errno=True)
_python = ctypes.PyDLL(None, use_errno=True)
"""The same, for calls that keep Python's lock."""


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


def join(namespace: int) -> None:
    """Enter a namespace, by its descriptor."""
    _checked(_libc.setns(namespace, 0), "setns")


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


def bound_capabilities(most: Iterable[int] = ()) -> None:
    """Let nothing that this process becomes have other capabilities than these."""
    kept = frozenset(most)
    _libc.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0)
    for capability in range(_LAST_CAPABILITY + 1):
        if capability not in kept and _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # this kernel has no more


def set_capabilities(kept: Iterable[int] = ()) -> None:
    """Give up every capability but these, for good."""
    bits = sum(1 << capability for capability in kept)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    _checked(_libc.capset(header, struct.pack("6I", low, low, 0, high, high, 0)), "capset")


def fork() -> int:
    """Fork as `os.fork` does, without what Python does after it in the child.

    That writes to many pages, each of which is copied for it. For a process of one thread, whose child has nothing to
    do with threads or random numbers.
    """
    return _checked(_python.fork(), "fork")


def fold_pages() -> None:
    """Have this process's memory in pages of 2 MiB where that can be: a fork copies one entry for each page."""
    with open("/proc/self/maps") as table:
        lines = [line.split() for line in table]
    for place, access, *_, name in (line if len(line) > 5 else [*line, ""] for line in lines):
        first, last = (int(end, 16) for end in place.split("-"))
        first, last = -(-first // _HUGE) * _HUGE, last // _HUGE * _HUGE
        if access.startswith("rw") and name in ("", "[heap]") and first < last:
            _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _COLLAPSE)


def send_patiently(to: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    """Send a message with descriptors; wait a while for others of this user that have too many on their way.

    Raises:
        OSError: It cannot be sent.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            socket.send_fds(to, [data], descriptors, socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def close_all_but(kept: set[int]) -> None:
    """Close every descriptor of this process but these."""
    start = 0
    for number in sorted(kept):
        if start < number:  # Python takes an empty range for all that there are
            os.closerange(start, number)
        start = number + 1
    os.closerange(start, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def filter_calls(program: bytes | None) -> None:
    """Allow no new privileges, and from here on only the system calls that a classic BPF program lets pass."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if program is None:
        return
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _checked(_libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")
