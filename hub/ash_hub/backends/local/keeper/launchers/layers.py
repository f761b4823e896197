"""Layers: what a sandbox writes, on file systems that outlive it, so that others can stand on it.

A layer is a tmpfs for each space of a plan (`Plan.spaces`), mounted nowhere: descriptors of the keeper hold it, and
with the last of them, or with the keeper, the kernel gives it up. Files in it have owners from 0 on. A launch shows a
layer to its own mounts as the sandbox's (idmapped), and what is frozen read-only; nobody else ever walks through it.

In a space there is a directory for each place that is written to, named after it, with the `upper` and `work` of an
overlay. What was written so becomes a lower layer as it is: its whiteouts and opaque directories are the kernel's own
(`trusted.overlay.*`, which nothing inside can set). Lower layers are never let to redirect (`OPTIONS`).

Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Generator, Mapping, Sequence

from .mount_names import checked

__all__ = ["OPTIONS", "Spaces", "acting_as", "attach", "key_of", "new_space", "prepared", "used_bytes"]

OPTIONS = "volatile,xino=off,index=off,metacopy=off,redirect_dir=nofollow,nfs_export=off"
"""Not `userxattr`: with that, attributes that anybody may set would mean something in a lower layer."""
_FSOPEN, _FSCONFIG, _FSMOUNT, _OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 430, 431, 432, 428, 429, 442
_SET_STRING, _CREATE = 1, 6
_CLOSE = os.O_CLOEXEC
_NO_SUID, _NO_DEVICES, _READ_ONLY, _IDMAP = 0x2, 0x4, 0x1, 0x00100000
_CLONE, _EMPTY_PATH, _FROM_EMPTY_PATH, _AT_FDCWD = 1, 0x1000, 0x4, -100
_SET_SECURE_BITS, _KEEP_CAPABILITIES = 28, 1 << 2

Spaces = Mapping[str, int]
"""A descriptor for each space of a layer, by name."""


def new_space(size: int | None) -> int:
    """Return the descriptor of a tmpfs that is mounted nowhere.

    Args:
        size: In bytes; None is as much as memory allows.

    Raises:
        OSError: The kernel does not let this user do it.
    """
    context = _call(_FSOPEN, b"tmpfs", 1)
    try:
        given = {"mode": "0711", **({} if size is None else {"size": str(size)})}
        for name, value in given.items():
            _call(_FSCONFIG, context, _SET_STRING, name.encode(), value.encode(), 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, 1, _NO_SUID | _NO_DEVICES)
    finally:
        os.close(context)


def used_bytes(space: int) -> int:
    """Return what is written to a space, in bytes."""
    found = os.fstatvfs(space)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def attach(space: int, target: str, users: int | None, *, read_only: bool) -> None:
    """Mount a space on a directory once more, in a process that has its own mounts.

    Args:
        users: A user namespace: what belongs to 0 in the space belongs to its 0 there. None: owners as they are.

    Raises:
        OSError: The kernel cannot (before Linux 6.15), or does not let this user do it.
    """
    tree = _call(_OPEN_TREE, space, b"", _CLONE | _CLOSE | _EMPTY_PATH)
    try:
        flags = (_READ_ONLY if read_only else 0) | (0 if users is None else _IDMAP)
        wanted = struct.pack("=QQQQ", flags | _NO_SUID | _NO_DEVICES, 0, 0, users or 0)
        _call(_MOUNT_SETATTR, tree, b"", _EMPTY_PATH, wanted, len(wanted))
        _call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _FROM_EMPTY_PATH)
    finally:
        os.close(tree)


def key_of(target: str) -> str:
    """Return the name of a place's directory in its space."""
    return target.replace("%", "%25").replace("/", "%2F")


def prepared(layers: Sequence[Spaces], space: str, target: str, like: int | None, mode: int) -> list[int]:
    """Make what a place needs in the space that is written to; return the layers below that have something of it.

    Args:
        layers: Of the launch, the one that is written to as the last.
        like: A directory whose mode the place takes, below all layers; None: it has `mode`.

    Returns:
        Their numbers, the lowest first.
    """
    key = key_of(target)
    below = [number for number, layer in enumerate(layers[:-1]) if _has(layer, space, f"{key}/upper")]
    if below:
        found = os.stat(f"{key}/upper", dir_fd=layers[below[-1]][space], follow_symlinks=False)
        mode, owner, group = found.st_mode & 0o7777, found.st_uid, found.st_gid
    else:
        mode = os.fstat(like).st_mode & 0o7777 if like is not None else mode
        owner = group = 0
    top = layers[-1][space]
    for name in (key, f"{key}/upper", f"{key}/work"):
        os.mkdir(name, 0o755, dir_fd=top)
    os.chown(f"{key}/upper", owner, group, dir_fd=top)
    os.chmod(f"{key}/upper", mode, dir_fd=top)
    return below


def _has(layer: Spaces, space: str, path: str) -> bool:
    # `key` was made by a keeper, and nothing inside can reach the directory above `upper`.
    return space in layer and _exists(path, layer[space])


def _exists(path: str, directory: int) -> bool:
    try:
        os.stat(path, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def acting_as(owner: int) -> Generator[None]:
    """Be a user of the sandbox to file systems, with all rights: an overlay makes files as whoever mounted it.

    Host root has no number on an idmapped mount, so that an overlay of its would be read-only there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    checked(libc.prctl(_SET_SECURE_BITS, _KEEP_CAPABILITIES, 0, 0, 0))
    libc.setfsgid(owner)
    libc.setfsuid(owner)
    try:
        yield
    finally:
        libc.setfsuid(0)
        libc.setfsgid(0)
        checked(libc.prctl(_SET_SECURE_BITS, 0, 0, 0, 0))


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return checked(libc.syscall(number, *arguments))
