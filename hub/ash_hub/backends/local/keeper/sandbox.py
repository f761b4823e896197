"""One sandbox in the keeper: launched, watched, ended, and cleaned up after."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import traceback
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .cgroups import Group
from .egress import OUTLET_NAME, Egress
from .launchers import ForkParents, Handle, LaunchError, Plan, launcher_of
from .launchers.launcher import ExitStatus, LaunchPutOff
from .launchers.layers import Spaces
from .live_copy import copied
from .snapshots import Layer, close_spaces, new_spaces, size_of
from .tail import Tail
from .used_directories import hold
from .user_ranges import RangeProblem, UserRanges

__all__ = ["LaunchError", "Sandbox", "bind_listener"]

_BACKLOG = 512
_CHUNK = 65_536
_BREATH_SECONDS = 0.005
"""Pause after a full chunk of output: a sandbox that floods its log must not keep the keeper busy."""
_END_SECONDS = 2.0
"""How long what is to end at once has until its launcher is killed, too."""
_KILL_SECONDS = 5.0
_PUT_OFF_SECONDS, _PAUSE_SECONDS = 3.0, 0.05
_REMOVAL_SECONDS = 2.0
_AGAIN = {"ASH_CLAIM_FIRST": "1"}
"""Has a runner that starts anew serve nobody before the hub has handed over the environment."""


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
        ranges: UserRanges,
        parents: ForkParents,
        layers: Sequence[Layer] = (),
    ) -> None:
        self.id: str = request["id"]
        self._labels: Mapping[str, str] = request["labels"]
        self._warnings: list[str] = request["warnings"]
        self._plan = Plan.from_json(request["plan"])
        self._launcher: Mapping[str, Any] = request["launcher"]
        self._parents = parents
        self._timeout: float = request["timeout"]
        self.record: Mapping[str, Any] = request["record"]
        self.revision = 0
        """Counts the changes of the record."""
        self.log = Tail(log_bytes)
        self.phase = "starting"
        self.exit_message: str | None = None
        self.was_out_of_memory = False
        self.failed_again = False
        """Whether it ended because it could not be started anew."""
        self.layers = tuple(layers)
        """What it stands on, the lowest first."""
        self._spaces: Spaces = {}
        """What it writes to."""
        self._is_restarting = False
        self._is_ending = False
        """Whether it is to end, so that it must not be started anew: a cancellation alone may be lost on its way."""
        self._replaced: Handle | None = None
        """What another takes the place of."""
        self._path = os.path.join("s", self.id)
        self._outlet = os.path.join("e", self.id)
        self._egress = egress
        self._way_out: asyncio.Future[None] | None = None
        self._group = group
        self._ranges = ranges
        self._held_users: int | None = None
        self._used: list[int] = []
        """Descriptors by which directories are locked against removal."""
        self._handle: Handle | None = None
        self._copy_of: str | None = None
        self._reads_log = False
        self._gone = asyncio.Event()
        self._tasks = tasks
        self._on_end = on_end

    def view(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "phase": self.phase,
            "socket": self._path,
            "exit_message": self.exit_message,
            "was_out_of_memory": self.was_out_of_memory,
            "failed_again": self.failed_again,
            "warnings": self._warnings,
            "labels": self._labels,
            "record": self.record,
            "revision": self.revision,
            "copy_of": self._copy_of,
        }

    async def start(self) -> None:
        """Launch it and return when its main process runs.

        Raises:
            LaunchError: It could not be started; nothing of it is left but its log.
        """
        came_up = False
        try:
            if "key" in self._launcher and self._launcher["otherwise"] is None:
                await self._parents.until_known(self._launcher["key"])
            self._take_users()
            self._use_directories()
            self._give_way_out()
            with bind_listener(self._path) as listener:
                await self._launch(listener)
            async with asyncio.timeout(self._timeout):
                await self._came_up()
                came_up = True
                if self._way_out is not None:
                    await self._way_out
        except TimeoutError:
            await self.end(0.0)
            if came_up:
                why = f"it had no way out within {self._timeout:g} s: {self._egress.problem}"
                raise LaunchError("egress", why) from None
            raise LaunchError("launch", f"its main process did not start within {self._timeout:g} s") from None
        except BaseException:
            await self.end(0.0)
            raise
        if self.phase == "starting":
            self.phase = "running"

    async def _launch(self, listener: socket.socket, more: Mapping[str, str] | None = None) -> None:
        """Start its processes; `more` is further environment."""
        entrances: list[str] = []
        if self._group is not None:
            limits = self._plan.group
            held = self._group.create(limits)
            missing = [name for name in self._group.directories if name in limits["controllers"]]
            if absent := sorted(set(missing) - set(held)):
                raise LaunchError("limits", f"the control group refused its limits: {', '.join(absent)}")
            entrances = self._group.entrances()
        for path in self._plan.own_directories:
            os.makedirs(path, mode=0o700, exist_ok=more is not None)
        if self._plan.snapshots:
            self._spaces = new_spaces(self._plan.spaces)
        plan = replace(
            self._plan,
            descriptors={"listen": listener.fileno()},
            group_entrances=tuple(entrances),
            hold=self._held_users,
            layers=(*(layer.spaces for layer in self.layers), self._spaces) if self._spaces else (),
            environment={**self._plan.environment, **(more or {})},
        )
        self._handle = await self._launched(plan)
        self._warnings = [*self._warnings, *(it for it in self._handle.warnings if it not in self._warnings)]
        self._copy_of = self._handle.copy_of
        self._resume_log()
        self._tasks.create_task(self._watch(self._handle))

    async def _launched(self, plan: Plan) -> Handle:
        """Have the launcher start it, again and again for a while where it is put off."""
        gives_up_at = asyncio.get_running_loop().time() + _PUT_OFF_SECONDS
        while True:
            try:
                return launcher_of(self._launcher, self._parents).launch(plan)
            except LaunchPutOff:
                if asyncio.get_running_loop().time() > gives_up_at:
                    raise
            await asyncio.sleep(_PAUSE_SECONDS)

    def _give_way_out(self) -> None:
        if self._plan.network is None:
            return
        os.makedirs(self._outlet, mode=0o700)
        outlet = bind_listener(os.path.join(self._outlet, OUTLET_NAME))
        if self._plan.subordinate is not None:
            # Nobody but this user passes through the keeper's directory, and inside it belongs to nobody.
            os.chmod(self._outlet, 0o755)
            os.chmod(os.path.join(self._outlet, OUTLET_NAME), 0o666)
        elif (owner := self._plan.identity.first_user) is not None:
            for path in (self._outlet, os.path.join(self._outlet, OUTLET_NAME)):
                os.chown(path, owner, owner)
        self._way_out = self._egress.add(self.id, outlet, self._plan.network)

    def _take_users(self) -> None:
        identity = self._plan.identity
        if identity.users and self._plan.user_block[1]:
            try:
                first, held = self._ranges.take(self._plan.user_block, identity.users, self._plan.user_lock)
            except RangeProblem as problem:
                raise LaunchError("users", str(problem)) from problem
            self._held_users = held
            self._plan = replace(self._plan, identity=replace(identity, first_user=first))

    def _use_directories(self) -> None:
        for path in self._plan.in_use:
            try:
                self._used.append(hold(path))
            except OSError as error:
                raise LaunchError("root", f"what its root begins as cannot be used: {path}: {error}") from error

    async def _came_up(self) -> None:
        assert self._handle is not None
        if not await self._handle.up():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), 1.0)
            raise LaunchError("launch", self._last_line() or f"the launcher ended: {self.exit_message}")

    def _last_line(self) -> str:
        self._read_log()
        lines = self.log.last(4096).decode(errors="replace").splitlines()
        return lines[-1] if lines else ""

    def _read_log(self) -> None:
        handle = self._handle
        if handle is None:
            return
        try:
            data = os.read(handle.log, _CHUNK)
        except BlockingIOError:
            return
        self.log.add(data)
        if len(data) in (0, _CHUNK):
            self._pause_log(handle)
        if len(data) == _CHUNK:
            asyncio.get_running_loop().call_later(_BREATH_SECONDS, self._resume_log)

    def _resume_log(self) -> None:
        if self._handle is not None and not self._reads_log:
            self._reads_log = True
            asyncio.get_running_loop().add_reader(self._handle.log, self._read_log)

    def _pause_log(self, handle: Handle) -> None:
        if self._reads_log:
            self._reads_log = False
            asyncio.get_running_loop().remove_reader(handle.log)

    async def _watch(self, handle: Handle) -> None:
        """See it through to its last process, say why it ended, and clean up after it."""
        status = await handle.ended()
        self._read_log()
        if handle is self._replaced:
            await self._end_processes()
            self._gone.set()
            return
        if not self.failed_again:
            self.exit_message = _sentence(status)
        if self._group is not None and status.signal == signal.SIGKILL and self._group.oom_kills():
            self.exit_message, self.was_out_of_memory = "killed: out of memory", True
        ran, self.phase = self.phase == "running" and not self._is_restarting, "ended"
        if ran:
            self._on_end(self)
        try:
            await self._clean_up()
        except OSError:
            traceback.print_exc()
        self._gone.set()

    @property
    def takes_snapshots(self) -> bool:
        """Whether what it writes can be frozen, and it can be started anew."""
        return self._plan.snapshots

    @property
    def size(self) -> int:
        """What it has written since it began, or was started anew; in bytes."""
        return size_of(self._spaces)

    async def freeze(self, owner: str) -> tuple[Layer, ...]:
        """End its processes, make a layer of what it wrote, start it anew over that, and return what it stands on.

        Raises:
            LaunchError: It could not be started anew, and has ended.
        """
        layer: Layer | None = None
        try:
            async with self._anew():
                layer, self._spaces = Layer(owner, self._spaces, self.size), {}
                self.layers = layers = (*self.layers, layer)
        except BaseException:
            if layer is not None:
                close_spaces(layer.spaces)
            raise
        return layers

    async def copy(self, owner: str) -> tuple[Layer, ...]:
        """Make a layer of a copy of what it wrote, while it runs, and return it over what the sandbox stands on.

        Raises:
            LaunchError: It could not be copied; the sandbox goes on.
        """
        below = self.layers
        spaces = await copied(self._spaces, self._plan.spaces)
        return (*below, Layer(owner, spaces, size_of(spaces)))

    async def reset(self, layers: Sequence[Layer]) -> None:
        """End its processes, give up what it wrote, and start it anew over layers.

        Raises:
            LaunchError: It could not be started anew, and has ended.
        """
        async with self._anew():
            self.layers = tuple(layers)
            self._give_up_spaces()

    @contextlib.asynccontextmanager
    async def _anew(self) -> AsyncGenerator[None]:
        """End its processes, let the caller change what it stands on, and start them again; whoever connects waits."""
        new = f"{self._path}+"
        self._is_restarting = True
        try:
            with bind_listener(new) as listener:
                os.rename(new, self._path)
                self._replaced = self._handle
                await self._kill()
                if not self._gone.is_set():
                    raise LaunchError("end", "its processes could not be ended")
                self._gone.clear()
                yield
                if self._is_ending:
                    raise LaunchError("end", "it was ended meanwhile")
                await self._launch(listener, _AGAIN)
            async with asyncio.timeout(self._timeout):
                await self._came_up()
        except BaseException as error:
            why = str(error) or f"its main process did not start within {self._timeout:g} s"
            await self._fail(f"it did not start anew: {why}")
            if isinstance(error, TimeoutError | OSError):
                raise LaunchError("launch", why) from error
            raise
        finally:
            self._is_restarting = False

    async def _fail(self, message: str) -> None:
        """End for good what could not be started anew."""
        self.phase, self.exit_message, self.failed_again = "ended", message, True
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._path}+")
        await self.end(0.0)
        await self._clean_up()
        self._on_end(self)

    @property
    def has_way_out(self) -> bool:
        """Whether it was started with a network, so that its policy can be changed."""
        return self._plan.network is not None

    def set_policy(self, policy: Any) -> asyncio.Future[None]:
        """Change what it may reach. Only while it runs, and where it has a way out.

        Returns:
            What is done when nothing goes out that the policy refuses.
        """
        return self._egress.set_policy(self.id, policy)

    async def end(self, grace_seconds: float) -> None:
        """Ask it to end, kill it after the grace, and return when nothing of it is left but its log."""
        self._is_ending = True
        if self._handle is None:
            await self._clean_up()
            return
        if grace_seconds > 0:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), grace_seconds)
        await self._kill()

    async def _kill(self) -> None:
        for seconds in (_END_SECONDS, _KILL_SECONDS):
            if not self._gone.is_set():
                self._signal(signal.SIGKILL)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._gone.wait(), seconds)

    def _signal(self, number: int) -> None:
        if self._handle is not None:  # else it has ended and is cleaned up
            self._handle.signal(number)

    async def _clean_up(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._egress.remove(self.id)
        shutil.rmtree(self._outlet, ignore_errors=True)
        await self._end_processes()
        for path in self._plan.own_directories[:1]:
            shutil.rmtree(path, ignore_errors=True)
        self._give_up_spaces()
        self.layers = ()
        held, self._held_users = self._held_users, None
        used, self._used = self._used, []
        for descriptor in (*used, *(() if held is None else (held,))):
            os.close(descriptor)

    async def _end_processes(self) -> None:
        """Remove the control group with all that is in it, and close the handle."""
        if self._group is not None:
            for _ in range(int(_REMOVAL_SECONDS / 0.01)):
                self._group.kill()
                if self._group.remove():
                    break
                await asyncio.sleep(0.01)
        handle, self._handle = self._handle, None
        if handle is not None:
            self._pause_log(handle)
            handle.close()

    def _give_up_spaces(self) -> None:
        spaces, self._spaces = self._spaces, {}
        close_spaces(spaces)


def bind_listener(path: str) -> socket.socket:
    """Bind and listen on `path`, relative to the keeper's directory, so that a sandbox cannot ask where that is."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise LaunchError("listen", f"could not listen on {path}: {error.strerror}") from error
    return listener


def _sentence(status: ExitStatus) -> str:
    if status.signal is not None:
        return f"killed by {signal.Signals(status.signal).name}"
    return f"exited with code {status.code}"
