"""One command in a session of its own: started, read, fed and ended as a whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import anyio
import anyio.to_thread

from ash_recipes.runner.problems import Problem
from ash_recipes.runner.users import User

__all__ = [
    "Command",
    "Process",
    "SessionLeader",
    "Stream",
    "end_children",
    "end_session",
    "session_members",
    "shell_of",
    "start_command",
]

Stream = Literal["stdout", "stderr"]
Command = str | Sequence[str]

READ_BYTES = 65_536
DRAIN_SECONDS = 0.25
"""How long the pipes may stay open after the command's own end, held by what it left in the background."""


class SessionLeader:
    """A running command that leads a session of its own."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self.pid = popen.pid

    async def wait_exit(self) -> int:
        """Return the exit code (128 and the signal's number for a killed command), however much output is unread."""
        await self._wait_exit()
        code = self._popen.wait()
        return code if code >= 0 else 128 - code

    async def _wait_exit(self) -> None:
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:  # not every kernel, and not every emulation of one, has it
            await anyio.to_thread.run_sync(self._popen.wait, abandon_on_cancel=True)
            return
        try:
            await anyio.wait_readable(descriptor)
        finally:
            os.close(descriptor)

    @property
    def exited(self) -> bool:
        return self._popen.poll() is not None

    def signal(self, number: int) -> bool:
        """Send a signal to the whole process group; False when nothing of it is left."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def kill(self) -> None:
        """End the command and all that shares its session, also what made a process group of its own."""
        end_session(self.pid)

    def forget(self) -> None:
        """Reap the command if it has ended."""
        self._popen.poll()


def start_command(
    command: Command, *, cwd: Path, env: Mapping[str, str], user: User | None, **more: Any
) -> subprocess.Popen[bytes]:
    """Start a command as the leader of a session.

    Args:
        command: A string for `bash -c` (`sh -c` where there is no bash), or a list of words.
        user: Whom it runs as; None: as the runner does.
        more: Further arguments of `subprocess.Popen`.

    Raises:
        Problem: `spawn_failed`, when nothing could be started.
    """
    words = [shell_of(env), "-c", command] if isinstance(command, str) else list(command)
    try:
        popen = subprocess.Popen(
            words,
            cwd=cwd,
            env=dict(env) | ({} if user is None else user.variables),
            user=None if user is None else user.uid,
            group=None if user is None else user.gid,
            extra_groups=None if user is None else user.groups,
            start_new_session=True,
            bufsize=0,
            **more,
        )
        return cast("subprocess.Popen[bytes]", popen)
    except (OSError, ValueError) as exc:
        raise Problem("spawn_failed", _why_not_started(exc, words, cwd)) from exc


def shell_of(env: Mapping[str, str]) -> str:
    """Return the shell that runs commands: bash, or what an image has in its place."""
    return "bash" if shutil.which("bash", path=env.get("PATH", os.defpath)) is not None else "sh"


class Process(SessionLeader):
    """A running command. What it writes goes to `on_data`, chunk by chunk, in the order in which it was read.

    Args:
        command: A string for `bash -c`, or a list of words.
        has_room: Awaited before each read; while it waits the command waits too, when its pipe is full.
        stdin: Whether `write` will be used; otherwise the command reads end of file.
        pass_fds: Descriptors that the command inherits under the same numbers.
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
        on_data: Callable[[Stream, bytes], None],
        has_room: Callable[[], Awaitable[None]] | None = None,
        stdin: bool = False,
        pass_fds: Sequence[int] = (),
        user: User | None = None,
    ) -> None:
        super().__init__(
            start_command(
                command,
                cwd=cwd,
                env=env,
                user=user,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=pass_fds,
            )
        )
        self._on_data = on_data
        self._has_room = has_room
        self._drained = anyio.Event()
        self._open_streams = 2
        self._stdin_lock = anyio.Lock()
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)

    async def read(self, stream: Stream) -> None:
        """Pass on what the command writes to `stream` until nobody holds its other end."""
        pipe = self._popen.stdout if stream == "stdout" else self._popen.stderr
        assert pipe is not None
        try:
            while True:
                await anyio.wait_readable(pipe.fileno())
                if self._has_room is not None:
                    await self._has_room()
                try:
                    data = os.read(pipe.fileno(), READ_BYTES)
                except BlockingIOError:
                    continue
                if not data:
                    return
                self._on_data(stream, data)
        finally:
            pipe.close()
            self._open_streams -= 1
            if self._open_streams == 0:
                self._drained.set()

    async def wait(self) -> int:
        """Return the exit code (128 and the signal's number for a killed command), its output read.

        What it left in the background may hold its pipes longer; that is not waited for.
        """
        await self._wait_exit()
        with anyio.move_on_after(DRAIN_SECONDS):
            await self._drained.wait()
        return await self.wait_exit()

    @property
    def takes_input(self) -> bool:
        return self._popen.stdin is not None and not self._popen.stdin.closed

    async def write(self, data: bytes) -> int:
        """Write all of `data` to the command's stdin and return how much was taken before it stopped reading."""
        pipe = self._popen.stdin
        view, written = memoryview(data), 0
        async with self._stdin_lock:
            while pipe is not None and not pipe.closed and written < len(data):
                try:
                    written += os.write(pipe.fileno(), view[written : written + READ_BYTES])
                except BlockingIOError:
                    await anyio.wait_writable(pipe.fileno())
                except BrokenPipeError:
                    break
        return written

    async def close_stdin(self) -> None:
        """Let the command read end of file; idempotent."""
        async with self._stdin_lock:
            if self._popen.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._popen.stdin.close()

    def forget(self) -> None:
        """Reap the command if it has ended, and let go of its stdin."""
        super().forget()
        if self._popen.stdin is not None:
            with contextlib.suppress(OSError):
                self._popen.stdin.close()


def _why_not_started(exc: Exception, words: Sequence[str], cwd: Path) -> str:
    name = words[0] if words else ""
    if isinstance(exc, FileNotFoundError | NotADirectoryError | PermissionError) and str(exc.filename) == str(cwd):
        return f"cannot start in {cwd}: {(exc.strerror or '').lower()}"
    if words[1:2] == ["-c"] and name == "sh" and isinstance(exc, FileNotFoundError):
        return "there is no shell in this sandbox: give the command as a list of words, a program by its path first"
    if isinstance(exc, OSError):
        return f"cannot start {name!r}: {(exc.strerror or str(exc)).lower()}"
    return f"cannot start {name!r}: {exc}"


def end_session(leader: int) -> None:
    """Kill the process group of `leader` and every process of its session.

    Repeated while new ones appear, since a fork may run ahead of one look at /proc.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    for _ in range(5):
        members = session_members(leader)
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def end_children() -> None:
    """Kill what this process has started and not ended, with all of its sessions."""
    me = os.getpid()
    for pid, parent, _ in _living():
        if parent == me:
            end_session(pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def session_members(leader: int) -> list[int]:
    """Return the living processes whose session `leader` began, itself included."""
    return [pid for pid, _, session in _living() if session == leader]


def _living() -> list[tuple[int, int, int]]:
    """Return the number, the parent and the session of every process that has not ended."""
    found: list[tuple[int, int, int]] = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # After the name in parentheses: state, parent, group, session.
                fields = file.read().rpartition(b")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[0] not in (b"Z", b"X"):
            found.append((int(name), int(fields[1]), int(fields[3])))
    return found
