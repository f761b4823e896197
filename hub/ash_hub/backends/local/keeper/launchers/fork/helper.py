"""The first process of a fork parent's namespaces: it has walls made, for its parent and for sandboxes, and reaps.

The keeper starts `main` with a socket, the log and perhaps the lock on a range of users as its only descriptors. The
first message there is the configuration: `{"walls", "plan", "load"}`, an order of walls and the plan of the parent;
each other one is an order of walls for a launch, with the channel to the process that is to be forked. Answers are
`{"started"}` with a descriptor of the parent, `{"ready", "shared"}` or `{"unfit"}`, and `{"ended"}`.

It has the keeper's view of the host's files, which what it starts has not, and may mount: as the host's root where
sandboxes have users of their own, else in its own user namespace. It runs nothing of a recipe, and reads nothing of
what sandboxes are given. With it end all sandboxes of its parent.
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import staging
from . import kernel, walls

__all__ = ["MOST_BYTES", "main", "receive"]

MOST_BYTES = 180_000
"""Of one message; what a socket takes at once."""
_MOST_DESCRIPTORS = 128
_KEPT = (8, 18, 21)
"""SETPCAP, SYS_CHROOT and SYS_ADMIN, to enter mounts and to make them."""
_MOST_WORDS = 2000
_WALLS_SECONDS = 45.0
_PARENT_PID = 30_001
"""Far from the low numbers that processes in a sandbox have: libraries that reseed after a fork look at the pid, and
one that a sandbox's process had in common with the parent would tell them that there was none."""

Json = Mapping[str, Any]


def main() -> None:
    """Be the helper of the parent that the keeper's first message describes."""
    keeper = socket.socket(fileno=int(sys.argv[1]))
    for number in sys.argv[1:]:
        os.set_inheritable(int(number), False)
    data, _ = receive(keeper)
    if not data:
        return
    config = json.loads(data)
    try:
        walls.enter_namespaces(config["walls"]["identity"])
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
        self._order: Json = config["walls"]
        self._plan: Json = config["plan"]
        self._load: Json = config["load"]
        self._owner: int = self._order["identity"]["first_user"] or 0
        """The host's user that the parent is, where sandboxes have users of their own."""
        self._shared = False

    def run(self) -> None:
        kernel.set_dumpable(0)
        os.setsid()
        os.umask(0o022)
        kernel.mount("proc", "/proc", kernel.NO_SET_UID | kernel.NO_DEVICES | kernel.NO_EXECUTION)
        if not self._order["identity"]["users"]:
            kernel.bound_capabilities(_KEPT)
            kernel.set_capabilities(_KEPT)
        wakeup, wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._forker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._forker.send(json.dumps(self._load).encode())
        self._parent = self._start_parent(theirs)
        theirs.close()
        _say(self._keeper, {"started": True}, os.pidfd_open(self._parent))
        self._serve(wakeup)

    def _start_parent(self, theirs: socket.socket) -> int:
        mine, makers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._fork(lambda: self._make_walls(self._order, makers))
        makers.close()
        mine.settimeout(_WALLS_SECONDS)
        said, namespaces = receive(mine)
        mine.close()
        if not said:
            raise OSError(0, "its walls could not be made")
        self._shared = said != b"+"
        with contextlib.suppress(OSError), open("/proc/sys/kernel/ns_last_pid", "w") as last:
            last.write(str(_PARENT_PID - 1))
        child = self._fork(lambda: self._become_parent(namespaces, theirs))
        for namespace in namespaces:
            os.close(namespace)
        return child

    def _fork(self, then: Callable[[], None]) -> int:
        if child := os.fork():
            return child
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            then()
        except BaseException as error:
            os.write(2, f"walls could not be made: {error}\n".encode())
        finally:
            os._exit(1)

    def _make_walls(self, order: Json, to: socket.socket, spaces: Sequence[int] = ()) -> None:
        """Make them and hand them on; `spaces` are those of the order's layers."""
        self._keeper.close()
        identity, stage = order["identity"], order["place"]
        things = [staging.Staged(*thing) for thing in order["stage"]]
        count, first = identity["users"], identity["first_user"]
        kernel.unshare(0x00020000)
        kernel.make_private(receives=False)
        users = staging.user_namespace(first, count, self._owner) if count else None
        left = iter(spaces)
        layers = [{name: next(left) for name in names} for names in order["layers"]]
        whole = staging.set_up(stage, things, users, first or 0, order["writable_bytes"], layers)
        users = walls.one_user(identity, f"{stage}/empty") if users is None else users
        walls.enter([users], users=count)
        walls.seal_users(shares_watchers=bool(count))
        staging.make_places([staging.Place(*it) for it in order["places"]])
        made = walls.build_root(order, stage)
        kernel.send_patiently(to, b"+" if whole else b"-", made)

    def _become_parent(self, namespaces: Sequence[int], door: socket.socket) -> None:
        plan, mounts = self._plan, self._order["mounts"]
        self._keeper.close()
        walls.enter(namespaces[1:])
        os.close(namespaces[0])
        walls.leave_kinds(processes=False)
        walls.finish(mounts)
        os.chdir(plan["directory"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        kernel.bound_capabilities()
        if self._order["identity"]["users"]:
            os.setgroups([])
            os.setresgid(self._owner, self._owner, self._owner)
            os.setresuid(self._owner, self._owner, self._owner)
        kernel.set_capabilities()
        os.set_inheritable(door.fileno(), True)
        code = plan["system_call_filter"]
        kernel.filter_calls(None if code is None else base64.b64decode(code))
        words = [str(door.fileno()) if word == "@fd:door@" else word for word in plan["command"]]
        os.execve(words[0], words, dict(plan["environment"]))

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
                    self._launch(json.loads(data), descriptors)
                elif not self._pass_on():
                    poll.unregister(self._forker.fileno())

    def _pass_on(self) -> bool:
        """Tell the keeper what the parent says; False if it says no more. Nothing that it sends can do harm."""
        data, descriptors = receive(self._forker)
        for descriptor in descriptors:
            os.close(descriptor)
        if data == b"ready":
            _say(self._keeper, {"ready": True, "shared": self._shared})
        elif data:
            _say(self._keeper, {"unfit": data[:_MOST_WORDS].decode(errors="replace")})
        return bool(data)

    def _reap(self, wakeup: int) -> None:
        os.read(wakeup, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == self._parent:
                    _say(self._keeper, {"ended": os.waitstatus_to_exitcode(ended[1])})

    def _launch(self, order: Json, given: Sequence[int]) -> None:
        """Have a launch forked, and walls made for it meanwhile. A channel that is closed tells that this failed."""
        count = sum(len(layer) for layer in order["layers"])
        channel, spaces = given[: len(given) - count], given[len(given) - count :]
        try:
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with mine, theirs:
                socket.send_fds(self._forker, [b"+"], [*channel, theirs.fileno()], socket.MSG_DONTWAIT)
                self._fork(lambda: self._make_walls(order, mine, spaces))
        except OSError as error:
            os.write(2, f"a launch failed: {error}\n".encode())
        for descriptor in given:
            os.close(descriptor)
