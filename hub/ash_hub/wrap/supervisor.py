"""Runs a plan as if its server were this process: its streams, its signals, its exit code.

No descriptor of the host gets inside. Three threads carry bytes between this process's standard streams and pipes that
the server alone has; nothing of them is read. When this process dies, however it does, all inside is ended by the
launcher's first process. When the host has gone, which an open stdin would have told a server that listens, the server
is asked to end, and then ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ash_hub.backends.local.keeper.cgroups import Group, open_hierarchy
from ash_hub.backends.local.keeper.egress import Egress
from ash_hub.backends.local.keeper.launchers.bubblewrap import BubblewrapLauncher
from ash_hub.backends.local.keeper.launchers.launcher import LaunchError
from ash_hub.backends.local.keeper.launchers.plan import Plan
from ash_hub.backends.local.keeper.launchers.process import ProcessHandle, readable
from ash_hub.backends.local.limits import Enforcement, namespaced_processes
from ash_hub.egress.starting import proxy_command
from ash_hub.wrap.walls import with_streams

__all__ = ["NOT_FOUND", "NOT_STARTED", "Streams", "control_group", "supervise"]

NOT_STARTED, NOT_FOUND = 126, 127
"""Exit codes as a shell's: the walls could not be made, or the program is not there."""
_CHUNK = 65_536
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_UP_SECONDS = 30.0
_GONE_POLL_SECONDS = 0.25
_GRACE_SECONDS = 1.0
_DRAIN_SECONDS = 60.0
_END_SECONDS = 5.0
_MOST_REFUSALS_SHOWN = 20
_GROUP = "ash-wrap"


@dataclass(frozen=True, slots=True)
class Streams:
    """Descriptors of this process that the server's standard streams are carried from and to."""

    stdin: int | None = 0
    """None: it reads the end at once."""
    stdout: int = 1
    stderr: int = 2


@contextmanager
def control_group() -> Generator[tuple[Enforcement, Group | None]]:
    """Yield what of this host's limits can be enforced, with a control group of this process's own for it."""
    hierarchy = open_hierarchy(_GROUP, {os.getpid()})
    if not hierarchy.directories:
        yield Enforcement(version=0, controllers=frozenset(), namespaced_processes=namespaced_processes()), None
        return
    for old in hierarchy.groups():  # whoever is killed leaves an empty one
        name = os.path.basename(next(iter(old.directories.values())))
        if name.isdigit() and not os.path.exists(f"/proc/{name}"):
            old.remove()
    group = hierarchy.group(str(os.getpid()))
    controllers = frozenset(hierarchy.directories)
    try:
        yield Enforcement(version=hierarchy.version, controllers=controllers, namespaced_processes=False), group
    finally:
        until = time.monotonic() + _END_SECONDS
        while not group.remove() and time.monotonic() < until:
            group.kill()
            time.sleep(0.005)
        # The one above stays: others may be about to make theirs in it.


def supervise(
    plan: Plan,
    launcher: BubblewrapLauncher,
    group: Group | None,
    *,
    network: str | Sequence[str] = "none",
    streams: Streams | None = None,
    say: Callable[[str], None],
    until: Callable[[], str | None] | None = None,
) -> int:
    """Run a plan to its end and return its exit code, 128 and more for a signal.

    Args:
        network: Its policy.
        streams: Those of its host; this process's own by default.
        say: Takes a sentence for whoever reads the log.
        until: Asked a few times a second; what it returns is why all is ended.
    """
    run = _Run(plan, launcher, group, network, streams or Streams(), say, until)
    return asyncio.run(run.whole())


class _Run:
    def __init__(
        self,
        plan: Plan,
        launcher: BubblewrapLauncher,
        group: Group | None,
        network: str | Sequence[str],
        streams: Streams,
        say: Callable[[str], None],
        until: Callable[[], str | None] | None,
    ) -> None:
        self._plan = plan
        self._launcher = launcher
        self._group = group
        self._network = network
        self._streams = streams
        self._say = say
        self._until = until
        self._host = os.getppid()
        self._stdin_ended = threading.Event()
        self._refused: set[str] = set()
        self._early_signals: list[int] = []

    async def whole(self) -> int:
        for number in _PASSED_ON:  # the server may be up, and its host know it, before this process does
            asyncio.get_running_loop().add_signal_handler(number, self._early_signals.append, number)
        with ExitStack() as ends:
            theirs, pumps = self._pipes()
            outlet = self._egress(ends) if self._network != "none" else None
            try:
                handle = self._launch(theirs, None if outlet is None else outlet[1])
            except LaunchError as error:
                self._say(f"no sandbox could be made: {error}; `ash doctor` says what this machine lacks")
                return NOT_STARTED
            finally:
                for descriptor in theirs.values():
                    os.close(descriptor)
                if outlet is not None:
                    outlet[1].close()
            ends.callback(handle.close)
            for pump in pumps:
                pump.start()
            try:
                async with asyncio.timeout(_UP_SECONDS):
                    is_up = await handle.up()
            except LaunchError as error:
                self._say(str(error))
                return NOT_FOUND
            except TimeoutError:
                is_up = False
            if not is_up:
                self._say(f"no sandbox could be made: {_log_of(handle)}; `ash doctor` says what this machine lacks")
                return NOT_STARTED
            return await self._until_ended(handle, pumps, outlet)

    async def _until_ended(
        self,
        handle: ProcessHandle,
        pumps: Sequence[threading.Thread],
        outlet: tuple[Egress, socket.socket, socket.socket] | None,
    ) -> int:
        loop = asyncio.get_running_loop()
        for number in _PASSED_ON:
            loop.add_signal_handler(number, handle.signal, number)
        for number in self._early_signals:
            handle.signal(number)
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(self._end_without_host(handle))]
            if outlet is not None:
                beside.append(tasks.create_task(self._serve_outlet(outlet[0], outlet[2])))
            status = await handle.ended()
            for task in beside:
                task.cancel()
        _, *outward = pumps
        for pump, seconds in zip(outward, (_DRAIN_SECONDS, _END_SECONDS), strict=True):
            await asyncio.to_thread(pump.join, seconds)
        if self._group is not None and self._group.oom_kills():
            self._say("the server was ended: it took more memory than --memory allows")
        assert status.code is not None or status.signal is not None, "it has ended"
        return status.code if status.code is not None else 128 + int(status.signal or 0)

    def _pipes(self) -> tuple[dict[str, int], list[threading.Thread]]:
        """Return the server's ends, and the threads that carry its bytes, which have the others."""
        in_, to_server = os.pipe2(os.O_CLOEXEC)
        from_server, out = os.pipe2(os.O_CLOEXEC)
        errors, err = os.pipe2(os.O_CLOEXEC)
        pairs = [
            (self._streams.stdin, to_server, self._stdin_ended.set),
            (from_server, self._streams.stdout, _nothing),
            (errors, self._streams.stderr, _nothing),
        ]
        own = {to_server, from_server, errors}
        pumps = [threading.Thread(target=_pump, args=(*pair, own), daemon=True) for pair in pairs]
        return {"stdin": in_, "stdout": out, "stderr": err}, pumps

    def _egress(self, ends: ExitStack) -> tuple[Egress, socket.socket, socket.socket]:
        egress = Egress(proxy_command(), self._on_decision)
        ends.callback(egress.end)
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.callback(ours.close)
        ours.setblocking(False)
        return egress, theirs, ours

    async def _serve_outlet(self, egress: Egress, ours: socket.socket) -> None:
        """Give the proxy the listener that the first process of the server's network has opened."""
        await readable(ours.fileno())
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        if descriptors:
            policy = self._network if isinstance(self._network, str) else list(self._network)
            egress.add("wrapped", socket.socket(fileno=descriptors[0]), {"policy": policy, "limits": {}})

    def _on_decision(self, decision: Mapping[str, Any]) -> None:
        target = str(decision.get("target"))
        if decision.get("decision") == "refused" and target not in self._refused:
            if len(self._refused) < _MOST_REFUSALS_SHOWN:
                self._refused.add(target)
                self._say(f"network: {target} was refused: {decision.get('message')}; --network may allow it")

    def _launch(self, theirs: Mapping[str, int], outlet: socket.socket | None) -> ProcessHandle:
        plan = with_streams(self._plan, theirs, None if outlet is None else outlet.fileno())
        if self._group is not None:
            missing = set(plan.group["controllers"]) - set(self._group.create(plan.group))
            if missing:
                raise LaunchError("limits", f"the control group refused its limits: {', '.join(sorted(missing))}")
            plan = replace(plan, group_entrances=tuple(self._group.entrances()))
        return self._launcher.launch(plan)

    async def _end_without_host(self, handle: ProcessHandle) -> None:
        """End the server once its host has gone, or `until` says so; it may end by itself first."""
        why: str | None = None
        while why is None:
            await asyncio.sleep(_GONE_POLL_SECONDS)
            why = self._until() if self._until is not None else "" if self._host_is_gone() else None
        if why:
            self._say(why)
        else:
            await asyncio.sleep(_GRACE_SECONDS)
        handle.signal(signal.SIGTERM)
        await asyncio.sleep(_GRACE_SECONDS)
        handle.signal(signal.SIGKILL)
        await asyncio.sleep(_END_SECONDS)
        handle.signal(signal.SIGKILL)

    def _host_is_gone(self) -> bool:
        """Say whether nobody writes to the server any more, and nobody reads it or started this process."""
        if not self._stdin_ended.is_set() or self._streams.stdin is None:
            return False
        return os.getppid() != self._host or _is_broken(self._streams.stdout)


def _pump(source: int | None, target: int, ended: Callable[[], None], own: set[int]) -> None:
    """Carry bytes until one side ends, and close what is this process's own."""
    with contextlib.suppress(OSError):
        while source is not None and (data := os.read(source, _CHUNK)):
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]
    ended()
    for descriptor in (source, target):
        if descriptor in own:
            os.close(descriptor)


def _is_broken(descriptor: int) -> bool:
    """Say whether nobody is at the other end."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _log_of(handle: ProcessHandle) -> str:
    with contextlib.suppress(BlockingIOError):
        if lines := os.read(handle.log, _CHUNK).decode(errors="replace").strip().splitlines():
            return lines[-1]
    return "the launcher ended at once"


def _nothing() -> None:
    pass
