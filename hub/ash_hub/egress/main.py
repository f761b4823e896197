"""The proxy as a child process: its parent adds and removes sandboxes over a socket, and is told each decision.

Descriptor 0 is a socket of type SOCK_SEQPACKET; each message is one JSON object.

    to the proxy      {"op": "configure", "own_ports": [8420]}
                      {"op": "add", "id", "n", "policy", "limits": {…}}, with a listening socket
                      {"op": "policy", "id", "n", "policy"}
                      {"op": "remove", "id"}
                      {"op": "stats", "n"}
    from the proxy    {"ready": true, "user"}
                      {"event": "egress", "sandbox", "time", "decision", "reason", "message", "method", "target",
                       "address", "policy", "omitted"?}
                      {"serves": id, "n"} once the message of that number holds, or {"unserved": id, "why"} where the
                      descriptor did not arrive
                      {"n", "stats": {id: {"open", "accepted", "bytes", "look_ups"}}}

It ends when the other end of descriptor 0 is closed. `starting.py` has the command to start it with.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
from collections.abc import Callable, Mapping
from typing import Any

from .audit import Audit, Record
from .capacity import Capacity
from .exchange import OuterNetwork
from .limits import Limits
from .policy import Policy
from .privileges import give_up_privileges, polling_loop
from .proxy import SandboxProxy
from .resolver import HostWatch, SystemResolver, dial

__all__ = ["Control", "main", "outside"]

MESSAGE_BYTES = 192 * 1024
_MOST_CONNECTIONS = 2048
"""Of all sandboxes at once; each takes up to three quarters of a MiB where both sides send and neither reads."""
_MOST_LOOK_UPS = 256
"""Of all sandboxes at once; each is a thread."""


def main() -> None:
    """Serve until descriptor 0 ends."""
    control = socket.socket(fileno=0)
    control.setblocking(False)
    resolver = SystemResolver()
    give_up_privileges(tied=True)
    with asyncio.Runner(loop_factory=polling_loop) as runner:
        runner.run(_serve(control, resolver))
    # Threads may still wait for a name server.
    os._exit(0)


async def _serve(control: socket.socket, resolver: SystemResolver) -> None:
    async with asyncio.TaskGroup() as tasks:
        served = Control(control, tasks)
        served.outside = outside(resolver, lambda: served.own_ports)
        served.send({"ready": True, "user": os.geteuid()})
        await served.run()


def outside(
    resolver: SystemResolver, own_ports: Callable[[], frozenset[int]], connections: int = _MOST_CONNECTIONS
) -> OuterNetwork:
    """Return what all sandboxes of this process share.

    Args:
        own_ports: Where the hive itself listens on this host.
        connections: How many there may be at once.
    """
    capacity = Capacity(min(connections, _most_connections()))
    return OuterNetwork(resolver, dial, HostWatch(own_ports), Capacity(_MOST_LOOK_UPS), capacity)


def _most_connections() -> int:
    """Return how many there may be: half of the descriptors, two each. The rest is for what no sandbox can take up."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4


class Control:
    """The sandboxes that whoever started this process tells it of."""

    outside: OuterNetwork

    def __init__(self, control: socket.socket, tasks: asyncio.TaskGroup) -> None:
        self.own_ports: frozenset[int] = frozenset()
        self._control = control
        self._tasks = tasks
        self._proxies: dict[str, tuple[SandboxProxy, asyncio.Task[None]]] = {}
        self._ended = asyncio.Event()
        self._operations: Mapping[str, Callable[[Mapping[str, Any], list[int]], None]] = {
            "configure": self._configure,
            "add": self._add,
            "policy": self._policy,
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
        if not descriptors:
            self.send({"unserved": message["id"], "why": "it has no descriptor left"})
            return
        self._remove(message, [])
        listener = socket.socket(fileno=descriptors[0])
        policy = Policy.parse(message["policy"])
        audit = Audit(self.send, event="egress", sandbox=message["id"], policy=policy.text)
        proxy = SandboxProxy(policy, Limits.of(message["limits"]), self.outside, audit)
        task = self._tasks.create_task(_until_cancelled(proxy, listener))
        self._proxies[message["id"]] = proxy, task
        self.send({"serves": message["id"], "n": message["n"]})

    def _policy(self, message: Mapping[str, Any], _: list[int]) -> None:
        if found := self._proxies.get(message["id"]):
            found[0].set_policy(Policy.parse(message["policy"]))
            self.send({"serves": message["id"], "n": message["n"]})

    def _remove(self, message: Mapping[str, Any], _: list[int]) -> None:
        if found := self._proxies.pop(message["id"], None):
            found[1].cancel()

    def _stats(self, message: Mapping[str, Any], _: list[int]) -> None:
        counts = {name: proxy.stats() for name, (proxy, _) in self._proxies.items()}
        self.send({"n": message["n"], "stats": counts})


async def _until_cancelled(proxy: SandboxProxy, listener: socket.socket) -> None:
    with listener:
        await proxy.serve(listener)
