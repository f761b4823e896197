"""The keeper's socket: one JSON object a line, one hub at a time, and the grace after a hub is gone.

Requests are `{"op", "n", …}`; each has one answer `{"n", "ok": {…}}` or `{"n", "error": {"kind", "message", …}}`.
Beside them the keeper sends `{"event": "ended", "sandbox": {…}}`, and `{"event": "egress", "sandbox": id, …}` for each
decision of the egress proxy. The first request is `hello`. `leave` says that a
hub goes on purpose: its sandboxes stay, without a time limit, and the keeper ends if there are none. A hub that is
gone without `leave` has the grace to come back.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import struct
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from .cgroups import Hierarchy
from .egress import Egress
from .sandbox import LaunchError, Sandbox

__all__ = ["PROTOCOL", "SOCKET_NAME", "Keeper"]

PROTOCOL = 2
"""Raised when a hub and a keeper of different versions would not understand each other."""
SOCKET_NAME = "keeper.sock"
_LINE_LIMIT = 16 * 1024 * 1024
_FIRST_HUB_SECONDS = 10.0
_CREDENTIALS = struct.Struct("3i")

Answer = Mapping[str, Any]


class Refused(Exception):
    """A request cannot be done; becomes its error answer."""

    def __init__(self, kind: str, message: str, **data: Any) -> None:
        super().__init__(message)
        self.answer: Answer = {"kind": kind, "message": message, **data}


class Keeper:
    """All sandboxes of one hive, and the hub that leads them."""

    def __init__(self, config: Mapping[str, Any], hierarchy: Hierarchy) -> None:
        self._grace: float = config["grace_seconds"]
        self._log_bytes: int = config["log_bytes"]
        self._most: int = config["max_sandboxes"]
        self._hierarchy = hierarchy
        self._egress = Egress(self._decided)
        self._sandboxes: dict[str, Sandbox] = {}
        self._starts: dict[str, asyncio.Task[Exception | None]] = {}
        self._leader: asyncio.StreamWriter | None = None
        self._leader_pid = 0
        self._left = False
        self._ending = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._operations: Mapping[str, Callable[[Mapping[str, Any]], Awaitable[Answer]]] = {
            "start": self._start,
            "stop": self._stop,
            "annotate": self._annotate,
            "logs": self._logs,
            "leave": self._leave,
        }

    def finish(self) -> None:
        """Begin the end: every sandbox is killed and `serve` returns."""
        self._ending.set()

    async def serve(self, ready: Callable[[], None]) -> None:
        """Listen until the end has come; return when no sandbox is left.

        The hub's connection stays open, so that its end, with this process, tells that all is cleared away.
        """
        async with asyncio.TaskGroup() as self._tasks:
            server = await asyncio.start_unix_server(self._connected, path=SOCKET_NAME, limit=_LINE_LIMIT)
            os.chmod(SOCKET_NAME, 0o600)
            ready()
            self._wait_for_hub(_FIRST_HUB_SECONDS + self._grace)
            await self._ending.wait()
            server.close()
            for start in list(self._starts.values()):
                start.cancel()
            async with asyncio.TaskGroup() as ends:
                for sandbox in self._sandboxes.values():
                    ends.create_task(sandbox.end(0.0))
            self._egress.end()

    def _wait_for_hub(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self.finish)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._admitted(writer) and await self._greeted(reader, writer):
                await self._led(reader)
        except (ConnectionError, ValueError, LookupError, TypeError, AttributeError):
            pass  # a peer that breaks the protocol or goes away is dropped like one that has left
        except asyncio.CancelledError:
            pass  # the loop ends, and nobody waits for this task but the loop
        finally:
            if self._leader is writer and not self._ending.is_set():
                self._lost_hub()
                writer.close()
            elif self._leader is not writer:
                writer.close()

    @staticmethod
    def _admitted(writer: asyncio.StreamWriter) -> bool:
        peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return _CREDENTIALS.unpack(peer)[1] in (0, os.geteuid())

    async def _greeted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = json.loads(await reader.readline() or b"{}")
        if request.get("op") != "hello":
            return False
        if self._leader is not None or self._ending.is_set():
            kind = "ending" if self._ending.is_set() else "led"
            error = {"kind": kind, "message": "another hub leads this keeper", "pid": self._leader_pid}
            _send(writer, {"n": request["n"], "error": error})
            return False
        self._leader, self._leader_pid, self._left = writer, request["pid"], False
        if self._timer is not None:
            self._timer.cancel()
        self._egress.hive_listens_on(request["ports"])
        known = [sandbox.view() for sandbox in self._sandboxes.values() if sandbox.phase != "starting"]
        groups = {"version": self._hierarchy.version, "controllers": sorted(self._hierarchy.directories)}
        hello = {"protocol": PROTOCOL, "pid": os.getpid(), "sandboxes": known, "cgroups": groups}
        _send(writer, {"n": request["n"], "ok": hello})
        return True

    async def _led(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            self._tasks.create_task(self._answer(request, self._operations[request["op"]]))

    def _lost_hub(self) -> None:
        self._leader = None
        if not self._left:
            self._wait_for_hub(self._grace)

    async def _answer(
        self, request: Mapping[str, Any], operation: Callable[[Mapping[str, Any]], Awaitable[Answer]]
    ) -> None:
        try:
            answer = {"n": request["n"], "ok": await operation(request)}
        except Refused as refusal:
            answer = {"n": request["n"], "error": refusal.answer}
        except Exception as fault:
            # One request must not end the sandboxes of all others.
            traceback.print_exc()
            answer = {"n": request["n"], "error": {"kind": "fault", "message": f"the keeper failed: {fault!r}"}}
        self._tell(answer)

    def _tell(self, message: Mapping[str, Any]) -> None:
        if self._leader is not None:
            _send(self._leader, message)

    async def _start(self, request: Mapping[str, Any]) -> Answer:
        name = request["id"]
        if name in self._sandboxes:
            raise Refused("exists", f"sandbox {name} exists")
        living = sum(sandbox.phase != "ended" for sandbox in self._sandboxes.values())
        if living >= self._most:
            raise Refused("full", f"{living} sandboxes run, which is the limit of this hive")
        group = self._hierarchy.group(name) if self._hierarchy.version else None
        sandbox = Sandbox(request, group, self._log_bytes, self._tasks, self._ended, self._egress)
        self._sandboxes[name] = sandbox
        start = self._starts[name] = self._tasks.create_task(_outcome(sandbox.start()))
        try:
            await asyncio.wait([start])
            if start.cancelled():
                raise Refused("stopped", "it was stopped while it started")
            if error := start.result():
                step = error.step if isinstance(error, LaunchError) else "launch"
                log = base64.b64encode(sandbox.log.last(self._log_bytes)).decode()
                raise Refused("start", str(error), step=step, log=log)
            if sandbox.phase == "ended":
                log = base64.b64encode(sandbox.log.last(self._log_bytes)).decode()
                raise Refused("start", f"its main process {sandbox.exit_message}", step="run", log=log)
        except Refused:
            del self._sandboxes[name]
            raise
        finally:
            del self._starts[name]
        return sandbox.view()

    def _ended(self, sandbox: Sandbox) -> None:
        self._tell({"event": "ended", "sandbox": sandbox.view()})
        if self._left and self._leader is None and not self._running():
            self.finish()

    def _decided(self, record: Mapping[str, Any]) -> None:
        """Write what the egress proxy decided into the sandbox's log, and tell the hub."""
        if sandbox := self._sandboxes.get(record["sandbox"]):
            sandbox.log.add(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            self._tell(record)

    def _running(self) -> bool:
        return any(sandbox.phase != "ended" for sandbox in self._sandboxes.values())

    async def _stop(self, request: Mapping[str, Any]) -> Answer:
        name = request["id"]
        if start := self._starts.get(name):
            start.cancel()
            await asyncio.wait([start])
        elif sandbox := self._sandboxes.get(name):
            await sandbox.end(request["grace_seconds"])
            self._sandboxes.pop(name, None)
        return {}

    async def _annotate(self, request: Mapping[str, Any]) -> Answer:
        if sandbox := self._sandboxes.get(request["id"]):
            sandbox.record = request["record"]
        return {}

    async def _logs(self, request: Mapping[str, Any]) -> Answer:
        sandbox = self._sandboxes.get(request["id"])
        data = sandbox.log.last(request["tail_bytes"]) if sandbox else b""
        return {"data": base64.b64encode(data).decode()}

    async def _leave(self, request: Mapping[str, Any]) -> Answer:
        self._left = True
        stays = self._running()
        if not stays:
            self.finish()
        return {"stays": stays}


async def _outcome(start: Coroutine[Any, Any, None]) -> Exception | None:
    """Return what `start` raises: raised in a task of the keeper it would end all others."""
    try:
        await start
    except (LaunchError, OSError) as error:
        return error
    return None


def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
