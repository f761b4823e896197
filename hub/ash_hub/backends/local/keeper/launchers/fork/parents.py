"""The fork parents of a keeper: started when a hub asks, watched, replaced, and ended when nobody needs them.

A parent that dies is started again while it is in use; one that cannot be had is not tried again for a while, and says
why. Its sandboxes live on under its helper until they end. Nothing here waits: a launch for which no parent is ready
goes to the other launcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bubblewrap import SHARED
from ..launcher import Handle, Launcher, LaunchError, LaunchPutOff
from ..plan import Plan
from ..process import preparation
from ..rlimits import limit
from .handle import ForkHandle, NotHandedOver, hand_over
from .order import walls_order

if TYPE_CHECKING:
    from ...cgroups import Group
    from ...user_ranges import UserRanges

__all__ = ["BOOT", "ForkLauncher", "ForkParents"]

BOOT = (
    "import sys, types; launchers = types.ModuleType('launchers'); launchers.__path__ = [{path!r}]; "
    "sys.modules['launchers'] = launchers; from launchers.fork.{module} import main; main()"
)
"""Starts a module of this package without the rest of the launchers, which would make it three times as large."""
_LAUNCHERS = Path(__file__).parents[1]
_READY_SECONDS = 60.0
_MOST_PARENTS = 8
_MOST_DEATHS = 3
_DEATHS_SECONDS = 60.0
_UNFIT_SECONDS = 600.0
"""After which one that could not be had is tried again."""
_LOG_BYTES = 16_384
_CHUNK = 65_536
_MESSAGE_BYTES = 180_000
_CHECK_SECONDS = 10.0
_REMOVAL_TRIES, _REMOVAL_PAUSE_SECONDS = 100, 0.02
_TRIES_ALONE = 10
"""Before it is killed: a helper that ends by itself leaves no zombie to a first process that may never reap it."""

Json = Mapping[str, Any]


class _Parent:
    """One fork parent with its helper.

    Args:
        ranges: Where a range of users is taken from, if its plan asks for one: the first of them is the parent's user.

    Raises:
        OSError: It could not be started, or there are no users for it.
    """

    def __init__(
        self, order: Json, group: Group | None, ranges: UserRanges, on_change: Callable[[_Parent], None]
    ) -> None:
        self.order = order
        self.state = "starting"
        """`starting`, `ready`, or `ended`: it forks no more, but its sandboxes may run."""
        self.why: str | None = None
        self.is_shared = False
        self.used_at = time.monotonic()
        self.children = 0
        self._group = group
        self._on_change = on_change
        self._pidfd: int | None = None
        self._log = b""
        self._is_gone = False
        self.cleared = asyncio.Event()
        """Set when nothing of it is left, or what is left was given up."""
        plan, held = _with_users(Plan.from_json(order["plan"]), ranges)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        entrances: list[str] = []
        if group is not None:
            group.create(order["group"])
            entrances = group.entrances()
        start = Plan(command=(), python="", rlimits={}, group_entrances=tuple(entrances))
        with theirs, os.fdopen(writing, "wb") as log, contextlib.ExitStack() as stack:
            kept = (theirs.fileno(), *held)
            for descriptor in held:
                stack.callback(os.close, descriptor)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-c"),
                    *(BOOT.format(path=str(_LAUNCHERS), module="helper"), *map(str, kept)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=kept,
                env={},
                cwd="/",
                start_new_session=True,
                preexec_fn=preparation(start, lambda: limit("CORE", 1)),
            )
        config = {"walls": walls_order(plan, plan.to_json()), "plan": order["plan"], "load": order["load"]}
        self._socket.send(json.dumps(config).encode())
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, self._hear)
        loop.add_reader(self._reading, self._read_log)
        self._timer = loop.call_later(_READY_SECONDS, self._fail, f"it was not ready within {_READY_SECONDS:g} s")

    def _read_log(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._reading, _CHUNK)
            self._log = (self._log + data)[-_LOG_BYTES:]
            if not data:
                asyncio.get_running_loop().remove_reader(self._reading)

    def _hear(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._leave()
            return
        message: Json = json.loads(data)
        match message:
            case {"started": True}:
                (self._pidfd,) = descriptors
                if self.state == "ended":
                    self.kill()
            case {"ready": True, "shared": shared}:
                self._timer.cancel()
                if self.state == "starting":
                    self.state, self.is_shared = "ready", shared
                    self.used_at = time.monotonic()
                    self._on_change(self)
            case {"unfit": why}:
                self._fail(str(why))
            case _:
                self._fail(None)

    def _fail(self, why: str | None) -> None:
        """Fork no more; with a reason, it is not worth another try soon."""
        if self.state != "ended":
            if why is None and self.state == "starting":
                why = f"it ended before it was ready: {self.last_line()}"
            self.state, self.why = "ended", why
            self._timer.cancel()
            self.kill()
            self._on_change(self)
        self._leave_if_idle()

    def last_line(self) -> str:
        self._read_log()
        lines = self._log.decode(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"

    def launch(self, plan: Plan, *, is_loaded: bool) -> ForkHandle:
        """Have it fork.

        Raises:
            NotHandedOver: It is not ready, or takes nothing now.
        """
        if self.state != "ready":
            raise NotHandedOver(self.why or "it is not ready")
        self.used_at = time.monotonic()
        assert self._pidfd is not None
        handle = hand_over(
            plan, self._socket, self._pidfd, is_loaded=is_loaded, release=self._released, hangs=self._hangs
        )
        self.children += 1
        return handle

    def notice_end(self) -> None:
        """Take it for ended if it has, also where its helper has not told so yet."""
        if self.state == "ready" and self._pidfd is not None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if poll.poll(0):
                self._fail(None)

    def _released(self) -> None:
        self.children -= 1
        self._leave_if_idle()

    def _hangs(self) -> None:
        self._fail(None)

    def retire(self) -> None:
        """Fork no more; sandboxes stay."""
        if self.state != "ended":
            self.state = "ended"
            self._timer.cancel()
            self.kill()
        self._leave_if_idle()

    def kill(self) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _leave_if_idle(self) -> None:
        if self.state == "ended" and self.children == 0:
            self._leave()

    def _leave(self) -> None:
        """Let the helper end, which ends all that it has."""
        if self._is_gone:
            return
        self._is_gone = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        self._socket.close()
        if self.state != "ended":
            self._fail(None)
        self._clean_up(_REMOVAL_TRIES)

    def _clean_up(self, tries: int) -> None:
        """Reap the process and remove the control group, once all has ended."""
        if self._group is not None and tries <= _REMOVAL_TRIES - _TRIES_ALONE:
            self._group.kill()
        ended = self._process.poll() is not None
        removed = self._group is None or self._group.remove()
        if not (ended and removed) and tries:
            asyncio.get_running_loop().call_later(_REMOVAL_PAUSE_SECONDS, self._clean_up, tries - 1)
            return
        asyncio.get_running_loop().remove_reader(self._reading)
        os.close(self._reading)
        if self._pidfd is not None:
            os.close(self._pidfd)
        self.cleared.set()


def _with_users(plan: Plan, ranges: UserRanges) -> tuple[Plan, list[int]]:
    """Return a plan that says which users it has, and the descriptor that holds them, if it is to have any."""
    identity = plan.identity
    if not identity.users:
        return plan, []
    first, held = ranges.take(plan.user_block, identity.users)
    return replace(plan, identity=replace(identity, first_user=first)), [held]


class ForkParents:
    """All of them, by what a sandbox must have in common with its parent.

    Args:
        group_of: Makes a control group of a name; None where there are none.
        ranges: Where parents of machines take their users from.
        notify: Told `{"event": "fork_parent", "name", "state", "why"}` when one is ready, takes no launch or cannot be
            had.
    """

    def __init__(
        self, group_of: Callable[[str], Group | None], ranges: UserRanges, notify: Callable[[Json], None]
    ) -> None:
        self._group_of = group_of
        self._ranges = ranges
        self._notify = notify
        self._parents: dict[str, _Parent] = {}
        self._deaths: dict[str, list[float]] = {}
        self._unfit: dict[str, tuple[float, str]] = {}
        self._changed = asyncio.Event()
        self._uncleared: list[_Parent] = []
        self._numbers = 0
        self._timer: asyncio.TimerHandle | None = None

    def prepare(self, order: Json) -> None:
        """Have a parent as `order` says, unless there is one: `{"name", "identity", "key", "plan", "load", "group",
        "idle_seconds"}`, where `key` differs from `identity` in what may change while a hive lives."""
        key: str = order["key"]
        if key in self._parents:
            self._parents[key].used_at = time.monotonic()
            return
        unfit_until, _ = self._unfit.get(key, (0.0, ""))
        if unfit_until > time.monotonic():
            return
        self._unfit.pop(key, None)
        for other, parent in list(self._parents.items()):
            if parent.order["identity"] == order["identity"]:
                self._retire(other)
        while len(self._parents) >= _MOST_PARENTS:
            self._retire(min(self._parents, key=lambda it: self._parents[it].used_at))
        self._start(order)

    def _start(self, order: Json) -> None:
        self._numbers += 1
        group = self._group_of(f"fork-{self._numbers}")
        try:
            made = self._parents[order["key"]] = _Parent(order, group, self._ranges, self._on_change)
            self._uncleared = [*(parent for parent in self._uncleared if not parent.cleared.is_set()), made]
        except (OSError, subprocess.SubprocessError) as error:
            self._give_up(order, f"it could not be started: {error}")
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_CHECK_SECONDS, self._end_idle)

    def _on_change(self, parent: _Parent) -> None:
        order = parent.order
        if parent.state == "ready":
            self._notify({"event": "fork_parent", "name": order["name"], "state": "ready", "why": None})
        elif self._parents.get(order["key"]) is parent:
            del self._parents[order["key"]]
            if parent.why is not None:
                self._give_up(order, parent.why)
            else:
                self._replace(order)
        self._tell()

    def _replace(self, order: Json) -> None:
        now = time.monotonic()
        deaths = [at for at in self._deaths.get(order["key"], []) if at > now - _DEATHS_SECONDS]
        self._deaths[order["key"]] = [*deaths, now]
        if len(deaths) >= _MOST_DEATHS:
            self._give_up(order, f"it died {len(deaths) + 1} times within {_DEATHS_SECONDS:g} s")
        else:
            self._start(order)

    def _give_up(self, order: Json, why: str) -> None:
        self._unfit[order["key"]] = time.monotonic() + _UNFIT_SECONDS, why
        while len(self._unfit) > 8 * _MOST_PARENTS:
            del self._unfit[next(iter(self._unfit))]
        self._notify({"event": "fork_parent", "name": order["name"], "state": "unfit", "why": why})

    def tell_of_refusal(self, parent: _Parent, why: str) -> None:
        """Have it written down that a parent took no launch, which another launcher started."""
        self._notify({"event": "fork_parent", "name": parent.order["name"], "state": "refused", "why": why})

    def _retire(self, key: str) -> None:
        self._parents.pop(key).retire()
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _end_idle(self) -> None:
        self._timer = None
        for key, parent in list(self._parents.items()):
            if parent.state != "starting" and time.monotonic() - parent.used_at > parent.order["idle_seconds"]:
                self._retire(key)
        self._deaths = {key: deaths for key, deaths in self._deaths.items() if key in self._parents}
        if self._parents:
            self._timer = asyncio.get_running_loop().call_later(_CHECK_SECONDS, self._end_idle)

    async def until_known(self, key: str) -> None:
        """Return once a parent is ready, or is not to be had."""
        self._notice_end(key)
        while (parent := self._parents.get(key)) is not None and parent.state == "starting":
            await self._changed.wait()

    def find(self, key: str) -> tuple[_Parent | None, str]:
        """Return the parent of a key, or why there is none."""
        self._notice_end(key)
        return self._parents.get(key), self._unfit.get(key, (0.0, "it is not ready"))[1]

    def _notice_end(self, key: str) -> None:
        if (parent := self._parents.get(key)) is not None:
            parent.notice_end()

    def end(self) -> None:
        """Let all of them go."""
        if self._timer is not None:
            self._timer.cancel()
        for key in list(self._parents):
            self._retire(key)

    async def cleared(self) -> None:
        """Return once nothing of those is left that were let go and have no sandboxes, a few seconds at most."""
        for parent in self._uncleared:
            if not parent.children:
                await parent.cleared.wait()


class ForkLauncher:
    """Has a parent fork a plan; where none is ready, another launcher starts it.

    Args:
        otherwise: That other one; None: the launch fails.
    """

    def __init__(self, parents: ForkParents, key: str, otherwise: Launcher | None, *, is_loaded: bool) -> None:
        self._parents = parents
        self._key = key
        self._otherwise = otherwise
        self._is_loaded = is_loaded

    def launch(self, plan: Plan) -> Handle:
        parent, why = self._parents.find(self._key)
        try:
            if parent is None:
                raise NotHandedOver(why)
            handle = parent.launch(plan, is_loaded=self._is_loaded)
        except NotHandedOver as problem:
            if self._otherwise is None and problem.passes:
                raise LaunchPutOff("fork", f"it could not be forked now: {problem}") from problem
            if self._otherwise is None:
                raise LaunchError("fork", f"its recipe has no fork parent: {problem}") from problem
            if parent is not None:
                self._parents.tell_of_refusal(parent, str(problem))
            return self._otherwise.launch(plan)
        handle.warnings = [SHARED] if parent.is_shared else []
        handle.copy_of = self._key if self._is_loaded else None
        return handle
