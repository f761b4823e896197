"""The proxy by itself: a configuration says which sandboxes it serves, and where it listens for each.

The configuration is one JSON object:

    {"own_ports": [8420],                         ports of this host that are the hive's own; left out: none
     "sandboxes": [{"id": "sbx-1",
                    "listen": "127.0.0.1:3128",   or the path of a Unix socket, which is made anew
                    "policy": ["example.com"],    as a recipe's `network`
                    "limits": {"connections": 8}  left out: the defaults of `limits.py`
                   }]}

Whoever connects to `listen` is that sandbox, so nobody else may. Standard output has a line of JSON when all are
served, and one for each decision, as `main.py` describes them. SIGTERM ends the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .audit import Audit, Record
from .exchange import OuterNetwork
from .limits import Limits
from .main import outside
from .policy import Policy
from .privileges import give_up_privileges, polling_loop
from .proxy import SandboxProxy
from .resolver import SystemResolver

__all__ = ["listener", "run", "write"]

_BACKLOG = 512


def run(path: Path) -> None:
    """Serve the sandboxes of the configuration at `path` until SIGTERM.

    Raises:
        OSError: The file cannot be read, or an address cannot be listened on.
        ValueError: The configuration is wrong; the message says where.
    """
    own_ports, sandboxes = _read(path)
    with ExitStack() as stack:
        # Before privileges are given up, which it may take to listen there.
        listeners = [stack.enter_context(listener(sandbox.listen)) for sandbox in sandboxes]
        resolver = SystemResolver()
        give_up_privileges(tied=False)
        os.set_blocking(1, False)
        with asyncio.Runner(loop_factory=polling_loop) as runner:
            runner.run(_serve(list(zip(listeners, sandboxes, strict=True)), resolver, own_ports))
    # Threads may still wait for a name server.
    os._exit(0)


@dataclass(frozen=True, slots=True)
class _Sandbox:
    id: str
    listen: str
    policy: Policy
    limits: Limits


def _read(path: Path) -> tuple[frozenset[int], Sequence[_Sandbox]]:
    try:
        config = json.loads(path.read_text())
        found = [_sandbox(**sandbox) for sandbox in config["sandboxes"]]
        return frozenset(int(port) for port in config.get("own_ports", ())), found
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not as `standalone.py` describes it: {error}") from error


def _sandbox(
    *, id: str, listen: str, policy: str | Sequence[str], limits: Mapping[str, Any] | None = None
) -> _Sandbox:
    if not listen.startswith("/") and not listen.rpartition(":")[2].isdecimal():
        raise ValueError(f"{listen!r} is neither the path of a socket nor host:port")
    return _Sandbox(id, listen, Policy.parse(policy), Limits(**limits or {}))


def listener(place: str) -> socket.socket:
    """Listen at `host:port`, or at the path of a Unix socket, which is made anew."""
    if place.startswith("/"):
        if os.path.exists(place) and stat.S_ISSOCK(os.stat(place).st_mode):
            os.unlink(place)
        found = socket.socket(socket.AF_UNIX)
        found.bind(place)
        found.listen(_BACKLOG)
        return found
    host, _, port = place.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=_BACKLOG)


async def _serve(
    served: Sequence[tuple[socket.socket, _Sandbox]], resolver: SystemResolver, own_ports: frozenset[int]
) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    shared = outside(resolver, lambda: own_ports)
    async with asyncio.TaskGroup() as tasks:
        serving = [tasks.create_task(_proxy(sandbox, shared).serve(listener)) for listener, sandbox in served]
        write({"ready": True, "user": os.geteuid()})
        await ended.wait()
        for task in serving:
            task.cancel()


def _proxy(sandbox: _Sandbox, shared: OuterNetwork) -> SandboxProxy:
    audit = Audit(write, event="egress", sandbox=sandbox.id, policy=sandbox.policy.text)
    return SandboxProxy(sandbox.policy, sandbox.limits, shared, audit)


def write(record: Record) -> bool:
    """Write a line, and say whether there was room for it: no request waits for whoever reads the log."""
    try:
        os.write(1, json.dumps(record).encode() + b"\n")
    except OSError:
        return False
    return True
