"""The keeper's socket: requests of hubs and events for them, one JSON object a line; the grace after the last hub.

Requests are `{"op", "n", …}`; each has one answer `{"n", "ok": {…}}` or `{"n", "error": {"kind", "message", …}}`.
Beside them the keeper tells every hub of a sandbox that was `started`, `annotated`, `ended` by itself or `removed`
(`{"event": …, "sandbox": {…}}`), and one hub, so that it is written down once, of each decision of the egress proxy
(`{"event": "egress", "sandbox": id, …}`), and of each fork parent that is ready or cannot be had (`{"event":
"fork_parent", …}`), which hubs ask for with `prepare`.

The first request is `hello`. Hubs that say the same `shared` there are replicas of one hive and all equal; any other
second hub is refused. `leave` says that a hub goes on purpose. After the last one is gone the sandboxes stay without a
time limit if it left to `keep` them, and otherwise for the grace, in which a hub may come; the keeper ends when a hub
has left and nothing runs.

A sandbox can be frozen (`freeze`): what it wrote becomes a layer, and it goes on over that, or be taken back to one
(`reset`); it runs for hubs meanwhile. What is kept of it is a snapshot, until it is dropped or its time is over. As
long as there is one, a keeper that was left to keep what there is does not end.

The answer to `hello` has the `lead` of the hive's time before the host's steady clock, as the hub that started the
keeper said it. The sandboxes' records are in that time, whatever the time of day is when the next hub comes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import struct
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from .cgroups import Group, Hierarchy
from .egress import Egress
from .launchers import ForkParents
from .sandbox import LaunchError, Sandbox
from .snapshots import Layer, SnapshotProblem, Snapshots
from .user_ranges import UserRanges

__all__ = ["MOST_UNREAD_BYTES", "PROTOCOL", "SOCKET_NAME", "Keeper"]

PROTOCOL = 10
"""Raised when a hub and a keeper of different versions would not understand each other."""
SOCKET_NAME = "keeper.sock"
_LINE_LIMIT = 16 * 1024 * 1024
_FIRST_HUB_SECONDS = 10.0
_POLICY_SECONDS = 3.0
"""What the egress proxy may take to follow a changed policy; less than a hub waits for an answer."""
_CREDENTIALS = struct.Struct("3i")
_MOST_HUBS = 64
MOST_UNREAD_BYTES = 16 * 1024 * 1024
"""A hub that leaves more than this unread is cut off: it will come again, and ask for all there is."""

Answer = Mapping[str, Any]


class Refused(Exception):
    """A request cannot be done; becomes its error answer."""

    def __init__(self, kind: str, message: str, **data: Any) -> None:
        super().__init__(message)
        self.answer: Answer = {"kind": kind, "message": message, **data}


class _Hub:
    """A hub at the other end of a connection."""

    def __init__(self, writer: asyncio.StreamWriter, pid: int) -> None:
        self.writer = writer
        self.pid = pid
        self.has_left = False
        self.keeps = False
        """Whether it left its sandboxes to whichever hub comes, however late."""

    def send(self, message: Mapping[str, Any]) -> None:
        if self.writer.is_closing():
            return
        if self.writer.transport.get_write_buffer_size() > MOST_UNREAD_BYTES:
            self.writer.transport.abort()
            return
        _send(self.writer, message)


class Keeper:
    """All sandboxes of one hive on this host, and the connected hubs that control them."""

    def __init__(self, config: Mapping[str, Any], hierarchy: Hierarchy) -> None:
        self._grace: float = config["grace_seconds"]
        self._log_bytes: int = config["log_bytes"]
        self._most: int = config["max_sandboxes"]
        self._lead: float = config["lead"]
        """By how much the hive's time is ahead of the host's steady clock: the same for every hub."""
        self._hierarchy = hierarchy
        self._egress = Egress(config["egress_command"], self._on_decision)
        self._ranges = UserRanges()
        self._parents = ForkParents(self._group_of, self._ranges, self._tell_one)
        self._sandboxes: dict[str, Sandbox] = {}
        self._starts: dict[str, asyncio.Task[Exception | None]] = {}
        self._restarts: dict[str, asyncio.Task[Exception | None]] = {}
        """Of sandboxes that are frozen or taken back."""
        self._snapshots = Snapshots(self._layers_in_use, self._finish_if_unneeded)
        self._hubs: list[_Hub] = []
        """The longest connected first."""
        self._shared: str | None = None
        self._ports: set[int] = set()
        self._is_kept = False
        """Whether the sandboxes stay although there is no hub."""
        self._is_deserted = False
        """Whether the last hub that had not left is gone."""
        self._ending = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._operations: Mapping[str, Callable[[Mapping[str, Any]], Awaitable[Answer]]] = {
            "prepare": self._prepare,
            "start": self._start,
            "stop": self._stop,
            "annotate": self._annotate,
            "set_network": self._set_network,
            "freeze": self._freeze,
            "reset": self._reset,
            "snapshots": self._list_snapshots,
            "drop": self._drop,
            "logs": self._logs,
            "list": self._list,
            "ping": self._ping,
        }

    def finish(self) -> None:
        """Kill every sandbox and let `serve` return."""
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
            if under_way := [*self._starts.values(), *self._restarts.values()]:
                for start in under_way:
                    start.cancel()
                await asyncio.wait(under_way)
            async with asyncio.TaskGroup() as ends:
                for sandbox in self._sandboxes.values():
                    ends.create_task(sandbox.end(0.0))
            self._parents.end()
            self._egress.end()

    def _wait_for_hub(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self.finish)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hub: _Hub | None = None
        try:
            if self._is_own_user(writer) and (hub := await self._admit_hub(reader, writer)):
                await self._serve_hub(reader, hub)
        except (ConnectionError, ValueError, LookupError, TypeError, AttributeError):
            pass  # a peer that breaks the protocol or goes away is dropped like one that has left
        except asyncio.CancelledError:
            pass  # the loop ends, and nobody waits for this task but the loop
        finally:
            if hub is None:
                writer.close()
            elif not self._ending.is_set():
                self._forget_hub(hub)
                writer.close()

    @staticmethod
    def _is_own_user(writer: asyncio.StreamWriter) -> bool:
        peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return _CREDENTIALS.unpack(peer)[1] in (0, os.geteuid())

    async def _admit_hub(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Hub | None:
        request = json.loads(await reader.readline() or b"{}")
        if request.get("op") != "hello":
            return None
        refusal = self._refusal(request["shared"])
        if refusal is not None:
            _send(writer, {"n": request["n"], "error": refusal})
            return None
        hub = _Hub(writer, request["pid"])
        self._shared, self._is_kept, self._is_deserted = request["shared"], False, False
        self._hubs.append(hub)
        if self._timer is not None:
            self._timer.cancel()
        self._ports |= set(request["ports"])
        self._egress.hive_listens_on(sorted(self._ports))
        groups = {"version": self._hierarchy.version, "controllers": sorted(self._hierarchy.directories)}
        hello = {"protocol": PROTOCOL, "pid": os.getpid(), "lead": self._lead, "cgroups": groups}
        _send(writer, {"n": request["n"], "ok": {**hello, "sandboxes": self._views()}})
        return hub

    def _refusal(self, shared: str | None) -> Answer | None:
        """Say why a hub may not join those that are here, or None."""
        if self._ending.is_set():
            return {"kind": "ending", "message": "the keeper is about to end"}
        if self._hubs and (shared is None or shared != self._shared):
            message = "another hub leads this keeper"
            return {"kind": "led", "message": message, "pid": self._hubs[0].pid, "shared": self._shared is not None}
        if len(self._hubs) >= _MOST_HUBS:
            return {"kind": "crowded", "message": f"{_MOST_HUBS} hubs lead this keeper, which is its limit"}
        return None

    async def _serve_hub(self, reader: asyncio.StreamReader, hub: _Hub) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            if request["op"] == "leave":
                hub.send({"n": request["n"], "ok": self._leave(hub, keeps=request["keep"])})
            else:
                self._tasks.create_task(self._answer(hub, request, self._operations[request["op"]]))

    def _forget_hub(self, hub: _Hub) -> None:
        self._hubs.remove(hub)
        if not hub.has_left:  # the ends of several connections may be seen in any order
            self._is_deserted = all(other.has_left for other in self._hubs)
        if self._hubs:
            return
        self._is_kept = hub.has_left and hub.keeps and not self._is_deserted
        if not self._is_kept:
            self._wait_for_hub(self._grace)
        self._finish_if_unneeded()

    def _leave(self, hub: _Hub, *, keeps: bool) -> Answer:
        hub.has_left, hub.keeps = True, keeps
        stays = self._running() or any(not other.has_left for other in self._hubs) or (keeps and self._snapshots)
        if not stays:
            self.finish()
        return {"stays": bool(stays)}

    async def _answer(
        self, hub: _Hub, request: Mapping[str, Any], operation: Callable[[Mapping[str, Any]], Awaitable[Answer]]
    ) -> None:
        try:
            answer = {"n": request["n"], "ok": await operation(request)}
        except Refused as refusal:
            answer = {"n": request["n"], "error": refusal.answer}
        except Exception as fault:
            # One request must not end the sandboxes of all others.
            traceback.print_exc()
            answer = {"n": request["n"], "error": {"kind": "fault", "message": f"the keeper failed: {fault!r}"}}
        hub.send(answer)

    def _broadcast(self, event: str, sandbox: Sandbox) -> None:
        message = {"event": event, "sandbox": sandbox.view()}
        for hub in self._hubs:
            hub.send(message)

    def _group_of(self, name: str) -> Group | None:
        return self._hierarchy.group(name) if self._hierarchy.version else None

    async def _prepare(self, request: Mapping[str, Any]) -> Answer:
        self._parents.prepare(request["order"])
        return {}

    async def _start(self, request: Mapping[str, Any]) -> Answer:
        name = request["id"]
        self._require_going_on()
        if name in self._sandboxes:
            raise Refused("exists", f"sandbox {name} exists")
        living = sum(sandbox.phase != "ended" for sandbox in self._sandboxes.values())
        if living >= self._most:
            raise Refused("full", f"{living} sandboxes run, which is the limit of this hive")
        sandbox = Sandbox(
            request,
            self._group_of(name),
            self._log_bytes,
            self._tasks,
            self._on_end,
            self._egress,
            self._ranges,
            self._parents,
            ()
            if (snapshot := request.get("snapshot")) is None
            else self._layers_of(snapshot, request["plan"]["image"]),
        )
        self._sandboxes[name] = sandbox
        start = self._starts[name] = self._tasks.create_task(_exception_of(sandbox.start))
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
            self._sandboxes.pop(name, None)  # a stop may have come first
            raise
        finally:
            del self._starts[name]
        self._broadcast("started", sandbox)
        return sandbox.view()

    def _on_end(self, sandbox: Sandbox) -> None:
        if sandbox.id not in self._starts:  # else nobody was told that it started, and whoever asked is answered
            self._broadcast("ended", sandbox)
        self._finish_if_unneeded()

    def _finish_if_unneeded(self) -> None:
        """End where there is no hub, and nothing that the next one could want."""
        if self._is_kept and not self._hubs and not self._running() and not self._snapshots:
            self.finish()

    def _on_decision(self, record: Mapping[str, Any]) -> None:
        """Write what the egress proxy decided into the sandbox's log, and tell one hub, which writes it down."""
        if sandbox := self._sandboxes.get(record["sandbox"]):
            sandbox.log.add(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            self._tell_one(record)

    def _tell_one(self, message: Answer) -> None:
        """Tell one hub, so that it is written down once."""
        staying = next((hub for hub in self._hubs if not hub.has_left), None)
        if staying is not None:
            staying.send(message)

    def _running(self) -> bool:
        return any(sandbox.phase != "ended" for sandbox in self._sandboxes.values())

    async def _stop(self, request: Mapping[str, Any]) -> Answer:
        name = request["id"]
        if start := self._starts.get(name):
            start.cancel()
            await asyncio.wait([start])
            if start.cancelled() or start.result() is not None:
                return {}
        if restart := self._restarts.get(name):
            restart.cancel()
            await asyncio.wait([restart])
        # A start that was over before it could be cancelled has made a sandbox like any other.
        if sandbox := self._sandboxes.get(name):
            await sandbox.end(request["grace_seconds"])
            if self._sandboxes.pop(name, None):  # by the first of those who stop it at once
                self._broadcast("removed", sandbox)
            self._snapshots.sweep()
        return {}

    async def _annotate(self, request: Mapping[str, Any]) -> Answer:
        self._replace_record(self._unchanged(request), request)
        return {}

    async def _set_network(self, request: Mapping[str, Any]) -> Answer:
        sandbox = self._unchanged(request)
        if sandbox.phase != "running":
            raise Refused("changed", f"sandbox {sandbox.id} does not run")
        if not sandbox.has_way_out:
            raise Refused("no_way_out", "it was started without a network")
        followed = sandbox.set_policy(request["policy"])
        self._replace_record(sandbox, request)
        await asyncio.wait([followed], timeout=_POLICY_SECONDS)
        if not followed.done():
            why = "the egress proxy does not answer; what it was told is recorded, and holds when it goes on"
            raise Refused("unheard", why)
        return {}

    def _unchanged(self, request: Mapping[str, Any]) -> Sandbox:
        """Return the sandbox of a change if its record is as whoever asks for that has read it."""
        if time.clock_gettime(time.CLOCK_BOOTTIME) > request["until"]:
            raise Refused("late", "the hub that asked for this waits no more and has told its caller that it failed")
        sandbox = self._sandboxes.get(request["id"])
        if sandbox is None or sandbox.revision != request["revision"]:
            raise Refused("changed", f"the record of sandbox {request['id']} is not at revision {request['revision']}")
        return sandbox

    def _replace_record(self, sandbox: Sandbox, request: Mapping[str, Any]) -> None:
        sandbox.record, sandbox.revision = request["record"], sandbox.revision + 1
        if sandbox.phase != "starting":
            self._broadcast("annotated", sandbox)

    async def _freeze(self, request: Mapping[str, Any]) -> Answer:
        sandbox, name, owner = self._restartable(request), request["snapshot"], request["owner"]
        frozen: list[tuple[Layer, ...]] = []

        async def freeze() -> None:
            frozen.append(await (sandbox.copy(owner) if request["live"] else sandbox.freeze(owner)))

        try:
            with self._snapshots.promised(name, owner, sandbox.size, sandbox.layers, request["limits"]):
                await self._restart(sandbox, freeze)
                snapshot = self._snapshots.add(name, frozen[0], request["record"], request["for_seconds"])
        except SnapshotProblem as problem:
            raise Refused(problem.kind, str(problem)) from problem
        return {"sandbox": sandbox.view(), "snapshot": snapshot.view()}

    async def _reset(self, request: Mapping[str, Any]) -> Answer:
        sandbox = self._restartable(request)
        layers = self._layers_of(request["snapshot"], sandbox.image)
        with self._snapshots.held(layers):
            await self._restart(sandbox, lambda: sandbox.reset(layers))
        self._snapshots.sweep()
        return {"sandbox": sandbox.view()}

    def _require_going_on(self) -> None:
        if self._ending.is_set():
            raise Refused("stopped", "the keeper is about to end")

    def _restartable(self, request: Mapping[str, Any]) -> Sandbox:
        self._require_going_on()
        sandbox = self._sandboxes.get(request["id"])
        if sandbox is None or sandbox.phase != "running":
            raise Refused("changed", f"sandbox {request['id']} does not run")
        if sandbox.id in self._restarts:
            raise Refused("busy", f"sandbox {sandbox.id} is frozen or reset already")
        if not sandbox.takes_snapshots:
            raise Refused("no_snapshots", "it was started as one whose files cannot be frozen")
        return sandbox

    async def _restart(self, sandbox: Sandbox, work: Callable[[], Awaitable[None]]) -> None:
        restart = self._restarts[sandbox.id] = self._tasks.create_task(_exception_of(work))
        try:
            await asyncio.wait([restart])
        finally:
            del self._restarts[sandbox.id]
        if restart.cancelled():
            raise Refused("stopped", "it was stopped while it was started anew")
        if error := restart.result():
            if isinstance(error, LaunchError) and error.step == "copy":
                raise Refused("copy", str(error))
            raise Refused("restart", f"it has ended, for it could not be started anew: {error}")

    def _layers_of(self, snapshot: str, image: str) -> tuple[Layer, ...]:
        try:
            layers = self._snapshots.layers_of(snapshot)
        except SnapshotProblem as problem:
            raise Refused(problem.kind, str(problem)) from problem
        if layers[-1].image != image:
            raise Refused("other_image", f"snapshot {snapshot} is of another image: name the one that it was taken of")
        return layers

    def _layers_in_use(self) -> list[Layer]:
        return [layer for sandbox in self._sandboxes.values() for layer in sandbox.layers]

    async def _list_snapshots(self, request: Mapping[str, Any]) -> Answer:
        del request
        return {"snapshots": self._snapshots.views()}

    async def _drop(self, request: Mapping[str, Any]) -> Answer:
        self._snapshots.drop(request["snapshot"])
        return {}

    async def _list(self, request: Mapping[str, Any]) -> Answer:
        del request
        return {"sandboxes": self._views()}

    async def _ping(self, request: Mapping[str, Any]) -> Answer:
        del request
        return {}

    def _views(self) -> list[Answer]:
        return [sandbox.view() for sandbox in self._sandboxes.values() if sandbox.phase != "starting"]

    async def _logs(self, request: Mapping[str, Any]) -> Answer:
        sandbox = self._sandboxes.get(request["id"])
        data = sandbox.log.last(request["tail_bytes"]) if sandbox else b""
        return {"data": base64.b64encode(data).decode()}


async def _exception_of(start: Callable[[], Awaitable[None]]) -> Exception | None:
    """Return what `start` raises: raised in a task of the keeper it would end all others."""
    try:
        await start()
    except (LaunchError, OSError) as error:
        return error
    return None


def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
