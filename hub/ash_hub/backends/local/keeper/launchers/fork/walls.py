"""The walls of a sandbox: a process of its own makes them, and whoever is to be behind them enters.

`make` stages what is shown of the host, makes the namespaces and builds the root; it sees the host's files and may
mount. `enter` needs no more than to own the user namespace. What belongs to a namespace of processes, `/proc`, comes
last (`finish`), from the first process there. What bubblewrap is told by `launchers/bubblewrap.py` is done here.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from . import kernel

__all__ = [
    "MOST_WATCHERS",
    "NAMESPACES",
    "build_root",
    "enter",
    "enter_namespaces",
    "finish",
    "late",
    "one_user",
    "seal_users",
]

_NEW_MOUNTS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = ("user", "mnt", "net", "ipc", "uts")
"""Those that come as descriptors, in this order. A sandbox makes those of processes and of control groups itself."""
MOST_WATCHERS = 32
"""Inotify instances that a sandbox may have, where all that are forked from one process share those of its user."""
_PLACE = "lower"
"""A directory of the stage that nobody needs by then, on which the root is built."""
_SAFE = kernel.NO_SET_UID | kernel.NO_DEVICES
_SHOWN = kernel.READ_ONLY | _SAFE
_NODES = ("full", "null", "random", "tty", "urandom", "zero")
_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "core": "/proc/kcore",
    "ptmx": "pts/ptmx",
}

Json = Mapping[str, Any]


def enter_namespaces(identity: Json) -> None:
    """Enter namespaces for a helper: of users as well, unless it is to give users away, for which it stays root."""
    if identity["users"]:
        kernel.unshare(_NEW_MOUNTS | _NEW_PIDS | _NEW_IPC | _NEW_UTS)
        kernel.make_private(receives=True)
        return
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_PIDS | _NEW_IPC | _NEW_UTS | _NEW_NETWORK | _NEW_CGROUP)
    kernel.make_private(receives=True)
    _map_self(identity, user, group)


def one_user(identity: Json, place: str) -> int:
    """Return a descriptor of a new user namespace with the one user that this process is.

    A process that maps its user is for that moment open to others of the same number, as the fork parent is. So this
    is done by one that sees nothing of the host.

    Args:
        place: An empty directory.

    Raises:
        OSError: The kernel does not let this user do it.
    """
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if (child := os.fork()) == 0:
        try:
            user, group = os.geteuid(), os.getegid()
            kernel.close_all_but({2, theirs.fileno(), proc})
            kernel.unshare(_NEW_MOUNTS)
            kernel.mount("tmpfs", place, _SAFE, "size=4k")
            kernel.move_root(place)
            kernel.unshare(_NEW_USER)
            _map_self(identity, user, group, proc)
            kernel.send_patiently(theirs, b"+", [os.open("self/ns/user", os.O_RDONLY, dir_fd=proc)])
        except OSError as error:
            os.write(2, f"no user namespace could be made: {error}\n".encode())
        finally:
            os._exit(0)
    theirs.close()
    os.close(proc)
    with mine:
        _, found, _, _ = socket.recv_fds(mine, 1, 1)
    os.waitpid(child, 0)
    if not found:
        raise OSError(errno.EPERM, "no user namespace can be made")
    os.set_inheritable(found[0], False)
    return found[0]


def _map_self(identity: Json, user: int, group: int, proc: int | None = None) -> None:
    """Map the one user that this process was to the one that it is to be, in its new user namespace."""
    kernel.set_dumpable(1)  # else the files below belong to the host's root
    maps = {"setgroups": "deny", "uid_map": f"{identity['uid']} {user} 1", "gid_map": f"{identity['gid']} {group} 1"}
    for name, text in maps.items():
        _write(f"self/{name}" if proc is not None else f"/proc/self/{name}", text, proc)
    kernel.set_dumpable(0)


def seal_users(*, shares_watchers: bool) -> None:
    """Have no user namespace below this one, and, where siblings share inotify instances, a bounded number of them."""
    _write("/proc/sys/user/max_user_namespaces", "0")
    if shares_watchers:
        _write("/proc/sys/user/max_inotify_instances", str(MOST_WATCHERS))


def build_root(order: Json, stage: str) -> list[int]:
    """Make namespaces and the root of an order in them, and return descriptors of all, as `NAMESPACES` names them.

    Args:
        order: As `fork.order.walls_order` makes it.
        stage: Where what is shown of the host is mounted.
    """
    kernel.unshare(_NEW_MOUNTS | _NEW_NETWORK | _NEW_IPC | _NEW_UTS)
    kernel.make_private(receives=False)
    _raise_loopback()
    socket.sethostname(order["identity"]["host_name"])
    place = f"{stage}/{_PLACE}"
    kernel.mount("tmpfs", place, _SAFE, "mode=0711")
    new, covers = f"{place}/root", f"{place}/covers"
    os.mkdir(new)
    os.mkdir(covers)
    kernel.mount("tmpfs", new, _SAFE, "mode=0755")
    root = _Root(new, covers, {int(number): f"{stage}/{path}" for number, path in order["sources"].items()})
    root.build(order["mounts"])
    made = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in NAMESPACES]
    kernel.move_root(new)
    return made


def enter(namespaces: Sequence[int], *, users: int = 0) -> None:
    """Enter namespaces that were made before: all of those in `NAMESPACES`, or those after the user's alone.

    Args:
        users: How many users there are in the user namespace; with any, become their root there.
    """
    for number, namespace in enumerate(namespaces):
        kernel.join(namespace)
        os.close(namespace)
        if number == 0 and users:
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)


def leave_kinds(*, processes: bool) -> None:
    """Have a new namespace of control groups, and one of processes for what is forked from here on."""
    kernel.unshare(_NEW_CGROUP | (_NEW_PIDS if processes else 0))


def finish(mounts: Sequence[Json]) -> None:
    """Mount what is of a namespace of processes, as a process in it."""
    kernel.mount("proc", "/proc", _SAFE | kernel.NO_EXECUTION)
    # Only where there was one to be seen may another be mounted; that one goes now.
    own = kernel.clone_tree("/proc")
    kernel.unmount("/proc")
    kernel.unmount("/proc")
    kernel.attach(own, "/proc")
    os.close(own)
    _Root("", "", {}).add(late(mounts))


def late(mounts: Sequence[Json]) -> list[Json]:
    """Return those that `finish` mounts."""
    return [mount for mount in mounts if _is_late(mount)]


def _is_late(mount: Json) -> bool:
    return mount["kind"] != "proc" and mount["target"].startswith("/proc")


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))


class _Root:
    def __init__(self, new: str, covers: str, sources: Mapping[int, str]) -> None:
        self._new = new
        self._place = covers
        self._sources = sources
        self._covers = 0

    def build(self, mounts: Sequence[Json]) -> None:
        """Mount all, with the `/proc` that is there now in the place of the one to come."""
        self.add([{**mount, "number": number} for number, mount in enumerate(mounts) if not _is_late(mount)])

    def add(self, mounts: Sequence[Json]) -> None:
        for mount in mounts:
            target = self._new + mount["target"]
            if mount["kind"] in ("bind", "writable", "kept") and "number" not in mount:
                raise OSError(errno.EINVAL, f"nothing can be mounted at {mount['target']}: /proc is the sandbox's own")
            if mount["kind"] in ("bind", "writable") or (mount["kind"] == "kept" and mount["number"] in self._sources):
                self._staged(mount, target, self._sources.get(mount["number"]))
            else:
                getattr(self, f"_{mount['kind']}")(mount, target)

    def _staged(self, mount: Json, target: str, source: str | None) -> None:
        try:
            mode = os.stat(source or "").st_mode
        except FileNotFoundError:
            if mount.get("optional"):
                return
            raise FileNotFoundError(f"{mount['source']} cannot be shown: the host has none") from None
        _make_like(target, mode)
        self._show(source or "", target, _SHOWN if mount["kind"] == "bind" else _SAFE)

    def _show(self, source: str, target: str, flags: int) -> None:
        tree = kernel.clone_tree(source)
        kernel.restrict(tree, flags)
        kernel.attach(tree, target)
        os.close(tree)

    def _pinned(self, mount: Json, target: str) -> None:
        os.makedirs(target, exist_ok=True)
        self._show(target, target, _SAFE)

    def _tmpfs(self, mount: Json, target: str) -> None:
        os.makedirs(target, exist_ok=True)
        options = f"mode={mount.get('mode', '0755')}"
        if mount.get("size") is not None:
            options += f",size={mount['size']}"
        kernel.mount("tmpfs", target, _SAFE, options)

    _kept = _tmpfs
    """Where nothing keeps it, as in what sandboxes are forked from."""

    def _file(self, mount: Json, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(target, flags, 0o600)
        os.write(descriptor, base64.b64decode(mount.get("content", "")))
        os.fchmod(descriptor, int(mount.get("mode", "0666"), 8))
        os.close(descriptor)

    def _covered(self, mount: Json, target: str) -> None:
        self._covers += 1
        cover = f"{self._place}/{self._covers}"
        self._file({**mount, "mode": "0444"}, cover)
        self._show(cover, target, _SHOWN)
        os.unlink(cover)

    def _masked(self, mount: Json, target: str) -> None:
        self._show("/dev/null", target, _SHOWN)

    def _directory(self, mount: Json, target: str) -> None:
        os.makedirs(target, exist_ok=True)

    def _link(self, mount: Json, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(mount["source"], target)

    def _proc(self, mount: Json, target: str) -> None:
        os.makedirs(target, exist_ok=True)
        self._show("/proc", target, 0)

    def _devices(self, mount: Json, target: str) -> None:
        os.makedirs(target, exist_ok=True)
        kernel.mount("tmpfs", target, _SAFE, "mode=0755")
        flags = kernel.NO_SET_UID | kernel.NO_EXECUTION | (kernel.READ_ONLY if mount.get("sealed") else 0)
        for name in _NODES:
            if os.path.exists(f"/dev/{name}"):
                _make_like(f"{target}/{name}", 0)
                self._show(f"/dev/{name}", f"{target}/{name}", flags)
        for name, source in _LINKS.items():
            os.symlink(source, f"{target}/{name}")
        os.mkdir(f"{target}/shm")
        os.mkdir(f"{target}/pts")
        options = "newinstance,ptmxmode=0666,mode=620"
        kernel.mount("devpts", f"{target}/pts", kernel.NO_SET_UID | kernel.NO_EXECUTION, options)

    def _read_only(self, mount: Json, target: str) -> None:
        kernel.restrict_here(target, kernel.READ_ONLY)


def _make_like(path: str, mode: int) -> None:
    """Make a directory if `mode` is of one, else an empty file, for something to be mounted on."""
    if stat.S_ISDIR(mode):
        os.makedirs(path, exist_ok=True)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.lexists(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))


def _write(path: str, text: str, directory: int | None = None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
