"""The process: takes sandboxes from the keeper, and tells it what was decided.

Descriptor 0 is a socket of type SOCK_SEQPACKET; each message is one JSON object.

    to the proxy      {"op": "configure", "own_ports": [8420]}
                      {"op": "add", "id", "policy", "limits": {…}}, with a listening socket
                      {"op": "remove", "id"}
                      {"op": "stats", "n"}
    from the proxy    {"ready": true, "user"}
                      {"event": "egress", "sandbox", "time", "decision", "reason", "message", "method", "target",
                       "address", "policy", "omitted"?}
                      {"n", "stats": {id: {"open", "accepted", "bytes"}}}

It ends when the other end of descriptor 0 is closed.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .audit import Audit, Record
from .exchange import World
from .limits import Limits
from .policy import Policy
from .proxy import SandboxProxy
from .resolver import HostWatch, SystemResolver, dial

__all__ = ["Control", "main"]

MESSAGE_BYTES = 192 * 1024
_NOBODY = 65_534
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION = 0x20080522


def main() -> None:
    """Serve until descriptor 0 ends."""
    control = socket.socket(fileno=0)
    control.setblocking(False)
    resolver = SystemResolver()
    _give_up_privileges()
    asyncio.run(_serve(control, resolver))
    # Threads may still wait for a name server.
    os._exit(0)


def _give_up_privileges() -> None:
    """Become nobody, without capabilities, files to write or a way back; ends with the keeper."""
    for signal_number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    for encoding in ("ascii", "idna", "latin-1"):
        codecs.lookup(encoding)  # loads it, while this process may still read Python's own files
    if os.geteuid() == 0:
        # Where no other user is mapped, in a container, capabilities are all that can be dropped.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capabilities could not be dropped")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    # After the change of user, which clears it.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


async def _serve(control: socket.socket, resolver: SystemResolver) -> None:
    async with asyncio.TaskGroup() as tasks:
        served = Control(control, tasks)
        served.world = World(resolver, dial, HostWatch(lambda: served.own_ports))
        served.send({"ready": True, "user": os.geteuid()})
        await served.run()


class Control:
    """The keeper's side of the process."""

    world: World

    def __init__(self, control: socket.socket, tasks: asyncio.TaskGroup) -> None:
        self.own_ports: frozenset[int] = frozenset()
        self._control = control
        self._tasks = tasks
        self._proxies: dict[str, tuple[SandboxProxy, asyncio.Task[None]]] = {}
        self._ended = asyncio.Event()
        self._operations: Mapping[str, Callable[[Mapping[str, Any], list[int]], None]] = {
            "configure": self._configure,
            "add": self._add,
            "remove": self._remove,
            "stats": self._stats,
        }

    async def run(self) -> None:
        """Do what messages say until there are no more; then every sandbox is let go."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._control, self._readable)
        try:
            await self._ended.wait()
        finally:
            loop.remove_reader(self._control)
            for _, task in self._proxies.values():
                task.cancel()

    def send(self, message: Record) -> bool:
        """Send a message, and say whether there was room for it."""
        try:
            self._control.send(json.dumps(message).encode())
        except BlockingIOError:
            return False
        except OSError:
            self._ended.set()
            return False
        return True

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", list[int]()
        if not data:
            self._ended.set()
            return
        message: dict[str, Any] = json.loads(data)
        self._operations[message["op"]](message, descriptors)

    def _configure(self, message: Mapping[str, Any], _: list[int]) -> None:
        self.own_ports = frozenset(message["own_ports"])

    def _add(self, message: Mapping[str, Any], descriptors: list[int]) -> None:
        listener = socket.socket(fileno=descriptors[0])
        policy = Policy.parse(message["policy"])
        audit = Audit(self.send, event="egress", sandbox=message["id"], policy=policy.text)
        proxy = SandboxProxy(listener, policy, Limits.of(message["limits"]), self.world, audit)
        task = self._tasks.create_task(_until_cancelled(proxy, listener))
        self._proxies[message["id"]] = proxy, task

    def _remove(self, message: Mapping[str, Any], _: list[int]) -> None:
        if found := self._proxies.pop(message["id"], None):
            found[1].cancel()

    def _stats(self, message: Mapping[str, Any], _: list[int]) -> None:
        counts = {name: proxy.stats() for name, (proxy, _) in self._proxies.items()}
        self.send({"n": message["n"], "stats": counts})


async def _until_cancelled(proxy: SandboxProxy, listener: socket.socket) -> None:
    with listener:
        await proxy.serve()


if __name__ == "__main__":
    sys.exit("start it as the keeper does: from egress.main import main; main()")
