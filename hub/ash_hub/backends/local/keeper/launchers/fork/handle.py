"""One launch by a fork parent, as a handle: the channel to what is forked, its log, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
from collections.abc import Callable, Sequence

from ..launcher import ExitStatus, LaunchError
from ..plan import Plan
from ..process import readable, status_of
from .order import capabilities_of, walls_order
from .walls import late

__all__ = ["ForkHandle", "NotHandedOver", "hand_over"]

_MOST_BYTES = 4096
_STATUS_BYTES = 16
_CROWDED = "sandboxes have all descriptors on their way that the kernel allows the hive's user"


class NotHandedOver(Exception):
    """A launch could not be given to a parent; nothing is left of it."""

    def __init__(self, why: str, *, passes: bool = False) -> None:
        super().__init__(why)
        self.passes = passes
        """Whether the next one may be."""


class ForkHandle:
    """What a parent forks, or is about to.

    Args:
        release: Called once, when nothing of it is left.
        hangs: Called where the parent does not fork, although it is to end.
    """

    def __init__(
        self,
        channel: socket.socket,
        log: int,
        life: int,
        status: int,
        parent: int,
        release: Callable[[], None],
        hangs: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._life: int | None = life
        self._status = status
        self._parent = parent
        self._first: int | None = None
        self._said = b""
        self._silent = asyncio.Event()
        """Set when the other end of the channel is closed."""
        self._is_up = False
        self._is_closed = False
        self._release = release
        self._hangs = hangs
        self.log = log
        self.copy_of: str | None = None
        self.warnings: Sequence[str] = ()
        asyncio.get_running_loop().add_reader(channel, self._hear)

    @property
    def pidfd(self) -> int:
        return self._parent if self._first is None else self._first

    def _hear(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._channel, _MOST_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        for descriptor in descriptors:
            if self._first is None:
                self._first = descriptor
            else:
                os.close(descriptor)
        self._said += data if len(self._said) < _MOST_BYTES else b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._channel)
            self._silent.set()

    async def up(self) -> bool:
        await self._silent.wait()
        _, _, rest = self._said.partition(b"first\n")
        init, _, problem = rest.partition(b"\n")
        self._is_up = True
        if init == b"init" and problem:
            raise LaunchError("exec", problem.decode(errors="replace").strip())
        return init == b"init"

    async def ended(self) -> ExitStatus:
        await self._silent.wait()
        if self._first is not None:
            await readable(self._first)
        code = os.pread(self._status, _STATUS_BYTES, 0)
        return status_of(int(code)) if code.isdigit() else ExitStatus(signal=signal.SIGKILL)

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL or not self._is_up:
            self._end()
        elif self._first is not None:
            _send(self._first, number)

    def _end(self) -> None:
        life, self._life = self._life, None
        if life is not None:
            os.close(life)
        elif self._first is None and not self._silent.is_set():
            self._hangs()
        if self._first is not None:
            _send(self._first, signal.SIGKILL)

    def close(self) -> None:
        if self._is_closed:
            return
        self._end()
        self._is_closed = True
        if not self._silent.is_set():
            asyncio.get_running_loop().remove_reader(self._channel)
        self._channel.close()
        for descriptor in (self.log, self._status, self._first):
            if descriptor is not None:
                os.close(descriptor)
        self._release()


def hand_over(
    plan: Plan,
    helper: socket.socket,
    parent: int,
    *,
    is_loaded: bool,
    release: Callable[[], None],
    hangs: Callable[[], None],
) -> ForkHandle:
    """Have a parent fork a plan, without waiting for it.

    Args:
        helper: The socket to the parent's helper.
        is_loaded: Whether the main process is what the parent has loaded, and not the plan's command.

    Raises:
        NotHandedOver: The helper takes nothing now, or the plan is too large.
    """
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        log, log_end = os.pipe2(os.O_CLOEXEC)
        life_end, life = os.pipe2(os.O_CLOEXEC)
        status = os.memfd_create("status", os.MFD_CLOEXEC)
        channel, their_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        for number in (log_end, life_end):
            theirs.callback(os.close, number)
        theirs.callback(their_channel.close)
        for number in (log, life, status):
            ours.callback(os.close, number)
        ours.callback(channel.close)
        os.set_blocking(log, False)
        channel.setblocking(False)
        named = {**plan.descriptors, "log": log_end, "life": life_end, "status": status}
        for number, entrance in enumerate(plan.group_entrances):
            named[f"group.{number}"] = os.open(entrance, os.O_WRONLY | os.O_CLOEXEC)
            theirs.callback(os.close, named[f"group.{number}"])
        if plan.hold is not None:
            named["hold"] = plan.hold
        data = plan.to_json()
        order = walls_order(plan, data)
        more = {"is_loaded": is_loaded, "kept_capabilities": capabilities_of(plan), "mounts": late(data["mounts"])}
        message = {"plan": {**data, **more}, "names": list(named)}
        try:
            socket.send_fds(channel, [json.dumps(message).encode()], list(named.values()))
            socket.send_fds(helper, [json.dumps(order).encode()], [their_channel.fileno(), *_spaces(plan)])
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise NotHandedOver(_CROWDED, passes=True) from error
            raise NotHandedOver(str(error), passes=error.errno in (errno.EAGAIN, errno.ENOBUFS)) from error
        ours.pop_all()
    return ForkHandle(channel, log, life, status, parent, release, hangs)


def _send(pidfd: int, number: int) -> None:
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(pidfd, number)


def _spaces(plan: Plan) -> list[int]:
    return [space for layer in plan.layers for space in layer.values()]
