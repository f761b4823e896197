"""The walls of a sandbox, made by the process that is to be behind them: namespaces, a root, and no privileges.

A plan comes as the JSON of `launchers.plan.Plan`; what bubblewrap is told by `launchers/bubblewrap.py` is done here.
Directories of the host come as trees: descriptors of mounts that are attached nowhere, made by whoever may see them.
"""

from __future__ import annotations

import base64
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from . import kernel

__all__ = ["bases_of", "build_root", "enter_namespaces", "name_host", "raise_loopback"]

_NEW_MOUNTS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
_ALL = _NEW_MOUNTS | _NEW_CGROUP | _NEW_UTS | _NEW_IPC | _NEW_USER | _NEW_PIDS | _NEW_NETWORK
_PLACE = "/tmp"
"""A directory of every root, on which the next one is built in mounts that nobody else sees."""
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


def bases_of(plan: Json) -> list[tuple[str, bool]]:
    """Return the directories and files of the host that a plan shows, and whether each is to be an overlay."""
    found: dict[str, bool] = {}
    for mount in plan["mounts"]:
        if mount["kind"] == "bind":
            over = mount.get("overlay")
            found[over if over is not None else mount["source"]] = over is not None
    return sorted(found.items())


def enter_namespaces(identity: Json, proc: int | None = None) -> None:
    """Enter new namespaces of every kind, as one mapped user and without privileges outside; a child is in all.

    Args:
        proc: A tree with a writable `/proc` that has this process in it, where the one that is there is read-only.
    """
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(_ALL)
    kernel.set_dumpable(1)  # else the files below belong to the host's root
    kernel.make_private(receives=proc is None)
    if proc is not None:
        kernel.attach(proc, "/proc")
    maps = {"setgroups": "deny", "uid_map": f"{identity['uid']} {user} 1", "gid_map": f"{identity['gid']} {group} 1"}
    for name, text in maps.items():
        _write(f"/proc/self/{name}", text)


def raise_loopback() -> None:
    """Have 127.0.0.1 in a network namespace of one's own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))


def name_host(identity: Json) -> None:
    socket.sethostname(identity["host_name"])


def build_root(mounts: Sequence[Json], trees: Mapping[str, int], *, nested: int | None = None) -> None:
    """Make the root that `mounts` describe, and have this process and its children in it.

    Args:
        trees: What of the host can be shown, by its path there.
        nested: A tree with the writable limits of user namespaces, where there shall be none below this one.
    """
    kernel.mount("tmpfs", _PLACE, _SAFE, "mode=0700")
    new, stage = f"{_PLACE}/root", f"{_PLACE}/stage"
    os.mkdir(new)
    os.mkdir(stage)
    kernel.mount("tmpfs", new, _SAFE, "mode=0755")
    if nested is not None:
        os.mkdir(f"{_PLACE}/limits")
        kernel.attach(nested, f"{_PLACE}/limits")
        _write(f"{_PLACE}/limits/max_user_namespaces", "0")
    _Root(new, stage, trees).build(mounts)
    kernel.move_root(new)


class _Root:
    def __init__(self, new: str, stage: str, trees: Mapping[str, int]) -> None:
        self._new = new
        self._stage = stage
        self._staged: dict[str, str] = {}
        self._covers = 0
        for number, (path, tree) in enumerate(trees.items()):
            place = f"{stage}/{number}"
            _make_like(place, os.fstat(tree).st_mode)
            kernel.attach(tree, place)
            self._staged[path] = place

    def build(self, mounts: Sequence[Json]) -> None:
        for mount in mounts:
            getattr(self, f"_{mount['kind']}")(mount, self._new + mount["target"])

    def _bind(self, mount: Json, target: str) -> None:
        base = mount["source"] if mount.get("overlay") is None else mount["overlay"]
        source = self._staged.get(base, "") + mount["source"].removeprefix(base)
        try:
            mode = os.stat(source).st_mode
        except FileNotFoundError:
            if mount.get("optional"):
                return
            raise FileNotFoundError(f"{mount['source']} cannot be shown: the host has none") from None
        _make_like(target, mode)
        self._show(source, target, _SHOWN)

    def _show(self, source: str, target: str, flags: int) -> None:
        tree = kernel.clone_tree(source)
        kernel.restrict(tree, flags)
        kernel.attach(tree, target)
        os.close(tree)

    def _tmpfs(self, mount: Json, target: str) -> None:
        os.makedirs(target, exist_ok=True)
        options = f"mode={mount.get('mode', '0755')}"
        if mount.get("size") is not None:
            options += f",size={mount['size']}"
        kernel.mount("tmpfs", target, _SAFE, options)

    def _file(self, mount: Json, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.write(descriptor, base64.b64decode(mount.get("content", "")))
        os.fchmod(descriptor, int(mount.get("mode", "0666"), 8))
        os.close(descriptor)

    def _covered(self, mount: Json, target: str) -> None:
        self._covers += 1
        cover = f"{self._stage}/cover{self._covers}"
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
        kernel.mount("proc", target, _SAFE | kernel.NO_EXECUTION)

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


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
