"""The first process of a fork parent's namespaces: it makes its walls, prepares mounts for sandboxes, and reaps.

The keeper starts `main` with a socket and the log as its only descriptors. The first message there is the
configuration: `{"plan", "load", "empty"}` (an empty directory of the host); each other one is a launch, `{"bases"}`,
with the channel to the process that is to be forked. Answers are `{"started"}` with a descriptor of the parent,
`{"ready", "shared"}` or `{"unfit"}`, and `{"ended"}`.

It has the keeper's view of the host's files, which what it starts has not, and may mount in its own user namespace.
It runs nothing of a recipe, and reads nothing of what sandboxes are given. With it end all sandboxes of its parent.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import kernel, walls

__all__ = ["MOST_BYTES", "main", "receive"]

MOST_BYTES = 180_000
"""Of one message; what a socket takes at once."""
_MOST_DESCRIPTORS = 64
_SETPCAP, _SYS_ADMIN = 8, 21
_PARENT_PID = 30_001
"""Far from the low numbers that processes in a sandbox have: libraries that reseed after a fork look at the pid, and
one that a sandbox's process had in common with the parent would tell them that there was none."""
_UNSEEN = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")

Json = Mapping[str, Any]


def main() -> None:
    """Be the helper of the parent that the keeper's first message describes."""
    keeper = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(keeper.fileno(), False)
    data, _ = receive(keeper)
    if not data:
        return
    config = json.loads(data)
    try:
        walls.enter_namespaces(config["plan"]["identity"])
    except OSError as error:
        keeper.send(json.dumps({"unfit": f"this host refuses new namespaces: {error.strerror or error}"}).encode())
        return
    first = os.fork()
    if first:
        keeper.close()
        os.waitpid(first, 0)
        return
    try:
        _Helper(keeper, config).run()
    except OSError as error:
        _say(keeper, {"unfit": f"this host refuses what the walls are made of: {error.strerror or error}"})
    os._exit(0)


def receive(source: socket.socket) -> tuple[bytes, list[int]]:
    """Return one message with its descriptors; nothing when the other end is closed."""
    try:
        data, descriptors, _, _ = socket.recv_fds(source, MOST_BYTES, _MOST_DESCRIPTORS)
    except ConnectionError:
        return b"", []
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return data, descriptors


def _say(keeper: socket.socket, message: Json, *descriptors: int) -> None:
    with contextlib.suppress(OSError):
        socket.send_fds(keeper, [json.dumps(message).encode()], descriptors)


class _Helper:
    def __init__(self, keeper: socket.socket, config: Json) -> None:
        self._keeper = keeper
        self._plan: Json = config["plan"]
        self._load: Json = config["load"]
        self._empty_path: str = config["empty"]
        self._shared = False

    def run(self) -> None:
        kernel.set_dumpable(0)
        os.setsid()
        os.umask(0o022)
        kernel.mount("proc", "/proc", kernel.NO_SET_UID | kernel.NO_DEVICES | kernel.NO_EXECUTION)
        walls.raise_loopback()
        walls.name_host(self._plan["identity"])
        kernel.drop_capabilities((_SETPCAP, _SYS_ADMIN))
        with contextlib.suppress(OSError), open("/proc/sys/kernel/ns_last_pid", "w") as last:
            last.write(str(_PARENT_PID - 1))
        wakeup, wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._empty = os.open(self._empty_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._forker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._forker.send(json.dumps(self._load).encode())
        self._parent = self._start_parent(theirs)
        theirs.close()
        _say(self._keeper, {"started": True}, os.pidfd_open(self._parent))
        self._serve(wakeup)

    def _start_parent(self, theirs: socket.socket) -> int:
        bases = walls.bases_of(self._plan)
        trees = self._trees(bases)
        child = os.fork()
        if child:
            _close(trees)
            return child
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            kernel.unshare(0x00020000)
            _become_parent(self._plan, _named(bases, trees), theirs)
        except BaseException as error:
            _say(self._keeper, {"unfit": f"its walls could not be made: {error}"})
        finally:
            os._exit(1)

    def _serve(self, wakeup: int) -> None:
        poll = select.poll()
        for descriptor in (self._keeper.fileno(), self._forker.fileno(), wakeup):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == wakeup:
                    self._reap(wakeup)
                elif descriptor == self._keeper.fileno():
                    data, descriptors = receive(self._keeper)
                    if not data:
                        return
                    self._launch(json.loads(data)["bases"], descriptors)
                else:
                    data, _ = receive(self._forker)
                    if data:
                        _say(self._keeper, {**json.loads(data), "shared": self._shared})
                    else:
                        poll.unregister(self._forker.fileno())

    def _reap(self, wakeup: int) -> None:
        os.read(wakeup, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == self._parent:
                    _say(self._keeper, {"ended": os.waitstatus_to_exitcode(ended[1])})

    def _launch(self, bases: Sequence[tuple[str, bool]], channel: list[int]) -> None:
        """Hand a launch on, with what it may see of the host. A channel that is closed tells that this failed."""
        trees: list[int | None] = []
        try:
            trees = [kernel.clone_tree("/proc"), kernel.clone_tree("/proc/sys/user"), *self._trees(bases)]
            given = [tree for tree in trees if tree is not None]
            there = bytes(tree is not None for tree in trees)
            socket.send_fds(self._forker, [there], [*channel, *given], socket.MSG_DONTWAIT)
        except OSError as error:
            os.write(2, f"a launch failed: {error}\n".encode())
        finally:
            _close([*channel, *trees])

    def _trees(self, bases: Sequence[tuple[str, bool]]) -> list[int | None]:
        """Return the mounts for a root, in order, None for what is not there.

        What an overlay cannot show appears as it is.
        """
        mounted = _mount_points()
        trees: list[int | None] = []
        for path, is_overlay in bases:
            if not os.path.exists(path):
                trees.append(None)
                continue
            hides = any(point.startswith(f"{path}/") for point in mounted if point not in _UNSEEN)
            tree = self._overlay(path) if is_overlay and not hides else None
            if tree is None:
                self._shared = self._shared or is_overlay
                tree = kernel.clone_tree(path)
                kernel.restrict(tree, kernel.READ_ONLY | kernel.NO_SET_UID | kernel.NO_DEVICES)
            trees.append(tree)
        return trees

    def _overlay(self, path: str) -> int | None:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return kernel.overlay(directory, self._empty)
        except OSError:
            return None
        finally:
            os.close(directory)


def _named(bases: Sequence[tuple[str, bool]], trees: Sequence[int | None]) -> dict[str, int]:
    return {path: tree for (path, _), tree in zip(bases, trees, strict=True) if tree is not None}


def _close(descriptors: Sequence[int | None]) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)


def _become_parent(plan: Json, trees: Mapping[str, int], door: socket.socket) -> None:
    walls.build_root(plan["mounts"], trees)
    os.chdir(plan["directory"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = plan["system_call_filter"]
    kernel.drop_capabilities()
    os.set_inheritable(door.fileno(), True)
    kernel.filter_calls(None if code is None else base64.b64decode(code))
    words = [str(door.fileno()) if word == "@fd:door@" else word for word in plan["command"]]
    os.execve(words[0], words, dict(plan["environment"]))


def _mount_points() -> list[str]:
    with open("/proc/self/mountinfo") as table:
        return [line.split()[4].replace("\\040", " ") for line in table]
