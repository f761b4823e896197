"""One sandbox, from its launch to its last process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from .cgroups import Group
from .egress import Egress
from .launch import Child, LaunchError, bind_listener, launch
from .tail import Tail

__all__ = ["OUTLET_NAME", "LaunchError", "Sandbox"]

OUTLET_NAME = "proxy.sock"
"""The egress proxy's socket, in a directory that the sandbox sees."""
_CHUNK = 65_536
_BREATH_SECONDS = 0.005
"""Pause after a full chunk of output: a sandbox that floods its log must not keep the keeper busy."""
_KILL_SECONDS = 5.0
_REMOVAL_SECONDS = 2.0


class Sandbox:
    """A sandbox as its keeper has it. `view()` is what the hub is told."""

    def __init__(
        self,
        request: Mapping[str, Any],
        group: Group | None,
        log_bytes: int,
        tasks: asyncio.TaskGroup,
        on_end: Callable[[Sandbox], None],
        egress: Egress,
    ) -> None:
        self.id: str = request["id"]
        self._generation: int = request["generation"]
        self._labels: Mapping[str, str] = request["labels"]
        self._warnings: list[str] = request["warnings"]
        self._plan: Mapping[str, Any] = request["plan"]
        self._limits: Mapping[str, Any] = request["limits"]
        self._timeout: float = request["timeout"]
        self.record: Mapping[str, Any] = request["record"]
        self.log = Tail(log_bytes)
        self.phase = "starting"
        self.exit_message: str | None = None
        self._path = os.path.join("s", self.id)
        self._network: Mapping[str, Any] | None = request["network"]
        self._outlet = os.path.join("e", self.id)
        self._egress = egress
        self._group = group
        self._child: Child | None = None
        self._main: int | None = None
        self._gone = asyncio.Event()
        self._tasks = tasks
        self._on_end = on_end

    def view(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "generation": self._generation,
            "phase": self.phase,
            "socket": self._path,
            "exit_message": self.exit_message,
            "warnings": self._warnings,
            "labels": self._labels,
            "record": self.record,
        }

    async def start(self) -> None:
        """Launch it and return when its main process runs.

        Raises:
            LaunchError: It could not be started; nothing of it is left but its log.
        """
        try:
            self._launch()
            async with asyncio.timeout(self._timeout):
                await self._came_up()
        except TimeoutError:
            await self.end(0.0)
            raise LaunchError("launch", f"its main process did not start within {self._timeout:g} s") from None
        except BaseException:
            await self.end(0.0)
            raise
        self.phase = "running"

    def _launch(self) -> None:
        entrances: list[str] = []
        if self._group is not None:
            held = self._group.create(self._limits)
            missing = [name for name in self._group.directories if name in self._limits["controllers"]]
            if absent := sorted(set(missing) - set(held)):
                raise LaunchError("limits", f"the control group refused its limits: {', '.join(absent)}")
            entrances = self._group.entrances()
        for path in self._plan["directories"]:
            os.makedirs(path, mode=0o700)
        if self._network is not None:
            os.makedirs(self._outlet, mode=0o700)
            self._egress.add(self.id, bind_listener(os.path.join(self._outlet, OUTLET_NAME)), self._network)
        listener = bind_listener(self._path)
        try:
            self._child = launch(self._plan, listener, entrances)
        finally:
            listener.close()
        asyncio.get_running_loop().add_reader(self._child.log, self._read_log)
        self._tasks.create_task(self._watch(self._child))

    async def _came_up(self) -> None:
        """Wait until the main process has been executed, as the `up` pipe tells by its end."""
        child = self._child
        assert child is not None
        said = b""
        try:
            while data := await _next_bytes(child.up):
                said += data
            if child is self._child:
                self._main = _main_process(child)
        finally:
            os.close(child.up)
        first, _, rest = said.partition(b"\n")
        if first != b"init":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), 1.0)
            raise LaunchError("launch", self._first_line() or f"the launcher ended: {self.exit_message}")
        if rest:
            raise LaunchError("exec", rest.decode(errors="replace").strip())

    def _first_line(self) -> str:
        self._read_log()
        lines = self.log.last(4096).decode(errors="replace").splitlines()
        return lines[-1] if lines else ""

    def _read_log(self) -> None:
        child = self._child
        if child is None or child.log < 0:
            return
        loop = asyncio.get_running_loop()
        try:
            data = os.read(child.log, _CHUNK)
        except BlockingIOError:
            return
        self.log.add(data)
        if not data:
            self._close_log()
        elif len(data) == _CHUNK:
            loop.remove_reader(child.log)
            loop.call_later(_BREATH_SECONDS, self._resume_log)

    def _resume_log(self) -> None:
        if self._child is not None and self._child.log >= 0:
            asyncio.get_running_loop().add_reader(self._child.log, self._read_log)

    def _close_log(self) -> None:
        if self._child is not None and self._child.log >= 0:
            asyncio.get_running_loop().remove_reader(self._child.log)
            os.close(self._child.log)
            self._child.log = -1

    async def _watch(self, child: Child) -> None:
        """See it through to its last process, say why it ended, and clean up after it."""
        await _readable(child.pidfd)
        code = child.process.wait()
        if self._main is not None:
            await _readable(self._main)
        self._read_log()
        self.exit_message = _told(code)
        if self._group is not None and code in (128 + signal.SIGKILL, -signal.SIGKILL) and self._group.oom_kills():
            self.exit_message = "killed: out of memory"
        ran, self.phase = self.phase == "running", "ended"
        if ran:
            self._on_end(self)
        try:
            await self._clean_up()
        except OSError:
            traceback.print_exc()
        self._gone.set()

    async def end(self, grace_seconds: float) -> None:
        """Ask it to end, kill it after the grace, and return when nothing of it is left but its log."""
        if self._child is None:
            await self._clean_up()
            return
        if grace_seconds > 0:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), grace_seconds)
        if not self._gone.is_set():
            self._signal(signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), _KILL_SECONDS)

    def _signal(self, number: int) -> None:
        child = self._child
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd if self._main is None else self._main, number)
        if number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, number)

    async def _clean_up(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._egress.remove(self.id)
        shutil.rmtree(self._outlet, ignore_errors=True)
        if self._group is not None:
            for _ in range(int(_REMOVAL_SECONDS / 0.01)):
                self._group.kill()
                if self._group.remove():
                    break
                await asyncio.sleep(0.01)
        for path in self._plan["directories"][:1]:
            shutil.rmtree(path, ignore_errors=True)
        self._close_log()
        child, self._child = self._child, None
        if child is not None:
            # Not earlier: the launcher writes to it when it ends, and a closed pipe would kill it.
            os.close(child.status)
            os.close(child.pidfd)
        main, self._main = self._main, None
        if main is not None:
            os.close(main)


def _main_process(child: Child) -> int | None:
    """Return a descriptor of the sandbox's first process, if the launcher named it."""
    with contextlib.suppress(BlockingIOError, ValueError, KeyError, ProcessLookupError):
        first = os.read(child.status, _CHUNK).decode().splitlines() or ["{}"]
        return os.pidfd_open(json.loads(first[0])["child-pid"])
    return None


def _told(code: int) -> str:
    number = -code if code < 0 else code - 128
    if code < 0 or 0 < number < signal.NSIG:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(number).name}"
    return f"exited with code {code}"


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(descriptor, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _next_bytes(descriptor: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, _CHUNK)
        except BlockingIOError:
            await _readable(descriptor)
