"""One command on a pseudo-terminal, which is its session's controlling terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import termios
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import anyio

from ash_recipes.runner.problems import Problem
from ash_recipes.runner.processes import Command, SessionLeader, start_command
from ash_recipes.runner.users import User

__all__ = ["PtyProcess"]

READ_BYTES: Final = 32_768
DRAIN_SECONDS: Final = 0.25
"""How long output may come after the command's own end: as its session's leader it takes the terminal with it."""
_OF_TERMINAL: Final = tuple(getattr(signal, f"SIG{name}") for name in ("HUP", "INT", "QUIT", "TSTP", "TTIN", "TTOU"))
_IUTF8: Final = 0o40000
"""Python's termios has no name for it: erasing deletes characters, not bytes."""


class PtyProcess(SessionLeader):
    """A running command on a pty. What it writes goes to `on_data`.

    Args:
        command: A string for `bash -c`, or a list of words.
        size: Rows and columns.
        has_room: Awaited before each read; while it waits the command waits too, when the terminal is full.
        user: Whom it runs as; None: as the runner does.

    Raises:
        Problem: `spawn_failed`, when nothing could be started.
    """

    def __init__(
        self,
        command: Command,
        *,
        cwd: Path,
        env: Mapping[str, str],
        size: tuple[int, int],
        on_data: Callable[[bytes], None],
        has_room: Callable[[], Awaitable[None]],
        user: User | None = None,
    ) -> None:
        try:
            self._master, slave = os.openpty()
        except OSError as exc:
            raise Problem("spawn_failed", f"there is no pseudo-terminal here: {exc.strerror}") from exc
        try:
            self.resize(*size)
            _prepare(slave, user)
            super().__init__(
                start_command(
                    command,
                    cwd=cwd,
                    env=env,
                    user=user,
                    stdin=slave,
                    stdout=slave,
                    stderr=slave,
                    preexec_fn=_take_terminal,
                )
            )
        except BaseException:
            os.close(self._master)
            raise
        finally:
            os.close(slave)
        os.set_blocking(self._master, False)
        self._on_data = on_data
        self._has_room = has_room
        self._drained = anyio.Event()

    async def read(self) -> None:
        """Pass on what the command writes until nobody has the terminal any more."""
        try:
            while True:
                await anyio.wait_readable(self._master)
                await self._has_room()
                try:
                    data = self._read_some()
                except BlockingIOError:
                    continue
                except OSError:  # EIO: the other side is closed
                    return
                if not data:
                    return
                self._on_data(data)
        finally:
            self._drained.set()

    def _read_some(self) -> bytes:
        """Return what there is, up to `READ_BYTES`: the kernel gives at most 4 KiB at once."""
        data = os.read(self._master, READ_BYTES)
        with contextlib.suppress(OSError):  # no more now; an end is told once more
            while len(data) < READ_BYTES and (more := os.read(self._master, READ_BYTES)):
                data += more
        return data

    async def wait(self) -> int:
        """Return the exit code as `wait_exit` does, its output read."""
        code = await self.wait_exit()
        with anyio.move_on_after(DRAIN_SECONDS):
            await self._drained.wait()
        return code

    async def write(self, data: bytes) -> bool:
        """Type `data`; False when nobody has the terminal any more. It takes as long as the command does not read."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._master, view) :]
            except BlockingIOError:
                await anyio.wait_writable(self._master)
            except OSError:
                return False
        return True

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size; what runs in the foreground is sent SIGWINCH if it is another one."""
        if self._master < 0:
            return
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def signal(self, number: int) -> bool:
        """Send a signal to what runs in the foreground of the terminal; False when there is nothing."""
        if self.exited:
            return False
        try:
            group = os.tcgetpgrp(self._master)
        except OSError:
            return super().signal(number)
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def hang_up(self) -> None:
        """Send SIGHUP as a line that is cut does: to the leader, and to what runs in the foreground."""
        for number in (signal.SIGHUP, signal.SIGCONT):  # who is stopped hears nothing
            if not self.exited:
                self.signal(number)
                super().signal(number)

    def close(self) -> None:
        """Let go of the terminal, once the command has ended and nothing reads."""
        master, self._master = self._master, -1  # the number may soon be another file's
        os.close(master)


def _prepare(slave: int, user: User | None) -> None:
    if user is not None:
        with contextlib.suppress(PermissionError):  # root needs no right to it
            os.fchown(slave, user.uid, -1)  # else it could not open /dev/tty's name
    attributes = termios.tcgetattr(slave)
    attributes[0] |= _IUTF8
    termios.tcsetattr(slave, termios.TCSANOW, attributes)


def _take_terminal() -> None:
    """Make stdin the controlling terminal of the new session; this runs in the child, before the command."""
    for number in _OF_TERMINAL:  # who started the hive may have ignored some, and that is inherited
        signal.signal(number, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
