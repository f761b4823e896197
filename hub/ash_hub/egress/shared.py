"""The proxy of a cluster: one listener for many sandboxes, whose policies it asks its hive for.

The configuration is one JSON object:

    {"listen": "0.0.0.0:3128",       where sandboxes connect
     "health": "0.0.0.0:3129",       /healthz and /readyz, for the kubelet
     "hive": "policies.test:8423",   where a hive answers
     "key": "/etc/ash/egress/body",  a file with the key that the hive made for its proxies
     "connections": 512,             at once, of all sandboxes; each takes up to 0.75 MiB
     "drain_seconds": 20}            how long connections may go on after SIGTERM; left out: 0

A sandbox says which it is by its first line (`signing.py`), and is believed at the addresses that the hive says it
has. Nothing is kept here: a proxy that is started anew asks again. Standard output has a line of JSON when it serves,
one for each decision, as `main.py` describes them, and one when the hive begins or ceases to answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from .connected_sandboxes import ConnectedSandboxes
from .main import outside
from .names import Address
from .privileges import give_up_privileges, polling_loop
from .refusal import Refusal
from .resolver import SystemResolver
from .signing import ANSWER, LONGEST_LINE, QUESTION, read_greeting, read_key, read_line, write_line
from .standalone import listener, write
from .wire import open_end
from .wire import read_line as read_first_line

__all__ = ["HiveLine", "run", "serve"]

_ASK_SECONDS = 1.0
_GREETING_SECONDS = 5.0
_GREETING_BYTES = 32 * 1024
"""More than a greeting takes: the reader goes on to read a request's head."""
_MOST_OF_ONE_ADDRESS = 160
"""Connections of one address; more than a sandbox may have, so that it can be told."""
_MOST_OF_ONE_IN_A_CROWD = 16
"""The same where half as many connections wait as may be served: they take memory, too."""
_PAUSE_SECONDS = 0.1
_HEALTH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Config:
    listen: str
    health: str
    hive: str
    key: bytes
    connections: int
    drain_seconds: float


def run(path: Path) -> None:
    """Serve as the configuration at `path` says, until SIGTERM.

    Raises:
        OSError: It or the key cannot be read, or an address cannot be listened on.
        ValueError: The configuration is wrong; the message says where.
    """
    it = _read(path)
    with ExitStack() as stack:
        sandboxes, health = (stack.enter_context(listener(place)) for place in (it.listen, it.health))
        resolver = SystemResolver()
        give_up_privileges(tied=False)
        os.set_blocking(1, False)
        with asyncio.Runner(loop_factory=polling_loop) as runner:
            runner.run(_until_told(it, sandboxes, health, resolver))
    # Threads may still wait for a name server.
    os._exit(0)


def _read(path: Path) -> _Config:
    try:
        config = json.loads(path.read_text())
        return _Config(
            listen=str(config["listen"]),
            health=str(config["health"]),
            hive=str(config["hive"]),
            connections=int(config["connections"]),
            drain_seconds=float(config.get("drain_seconds", 0)),
            key=read_key(Path(config["key"]).read_bytes()),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not as `shared.py` describes it: {error}") from error


async def _until_told(it: _Config, sandboxes: socket.socket, health: socket.socket, resolver: SystemResolver) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    connected = ConnectedSandboxes(HiveLine(it.hive, it.key).ask, outside(resolver, frozenset, it.connections), write)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(connected.run()), tasks.create_task(_tell_health(health, connected))]
        serving = tasks.create_task(
            serve(sandboxes, it.key, connected, most=it.connections, drain_seconds=it.drain_seconds)
        )
        write({"ready": True, "user": os.geteuid()})
        await ended.wait()
        serving.cancel()
        await asyncio.wait([serving])
        for task in running:
            task.cancel()


class HiveLine:
    """Asks a hive, on a connection for each question: a name of several hives leads to one that lives.

    Args:
        place: `host:port`.
    """

    def __init__(self, place: str, key: bytes) -> None:
        host, _, port = place.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._key = key

    async def ask(self, sandboxes: Sequence[str]) -> Mapping[str, Any]:
        """Return what the hive says of each; raises as `Ask` says."""
        nonce = secrets.token_hex(16)
        async with asyncio.timeout(_ASK_SECONDS):
            reader, writer = await asyncio.open_connection(self._host, self._port, limit=LONGEST_LINE)
            try:
                writer.write(write_line(self._key, QUESTION, {"nonce": nonce, "sandboxes": list(sandboxes)}))
                message = read_line(self._key, ANSWER, await reader.readline())
            finally:
                writer.transport.abort()
        if message["nonce"] != nonce:
            raise ValueError("the hive's answer is to another question")
        return message["sandboxes"]


async def serve(
    sandboxes: socket.socket, key: bytes, connected: ConnectedSandboxes, *, most: int, drain_seconds: float = 0
) -> None:
    """Accept until cancelled, then let connections go on for a while.

    Args:
        most: Connections that are served at once; half as many may wait, and of each address a few more.
    """
    loop, by_address, tasks = asyncio.get_running_loop(), dict[str, int](), set[asyncio.Task[None]]()

    def left(host: str) -> None:
        by_address[host] -= 1
        if not by_address[host]:
            del by_address[host]

    sandboxes.setblocking(False)
    try:
        while True:
            try:
                connection, place = await loop.sock_accept(sandboxes)
            except OSError:
                # Out of descriptors, most likely: those that are open have to end first.
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            host = str(place[0])
            open_now = by_address.get(host, 0)
            is_crowd = len(tasks) >= most * 3 // 2
            if open_now >= (_MOST_OF_ONE_IN_A_CROWD if is_crowd else _MOST_OF_ONE_ADDRESS):
                connection.close()
                continue
            by_address[host] = open_now + 1
            task = loop.create_task(_welcome(connection, _address(host), key, connected))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            task.add_done_callback(lambda _, host=host: left(host))
    finally:
        sandboxes.close()
        if tasks:
            await asyncio.wait(tasks, timeout=drain_seconds)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _address(host: str) -> Address:
    found = ip_address(host.partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found


async def _welcome(connection: socket.socket, peer: Address, key: bytes, connected: ConnectedSandboxes) -> None:
    """Learn which sandbox a connection is of, and serve it."""
    client = await open_end(connection, _GREETING_BYTES)
    try:
        async with asyncio.timeout(_GREETING_SECONDS):
            sandbox = read_greeting(key, await read_first_line(client))
    except (OSError, Refusal):
        sandbox = None  # a TimeoutError is an OSError
    if sandbox is not None:
        await connected.serve(sandbox, client, peer)
        return
    await connected.refuse(client, Refusal("no_greeting", f"{peer} does not prove which sandbox it is"))
    client.abort()


async def _tell_health(health: socket.socket, connected: ConnectedSandboxes) -> None:
    """Answer the kubelet: it lives while it answers, and is ready once the hive has answered."""

    async def told(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                good = connected.answered or not head.startswith(b"GET /readyz ")
                status = b"200 OK" if good else b"503 Service Unavailable"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(told, sock=health) as server:
        await server.serve_forever()
