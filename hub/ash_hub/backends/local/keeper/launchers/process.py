"""A process of this host as the handle on a sandbox: its pipes, limits and control groups. All launchers use it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .launcher import ExitStatus, LaunchError
from .plan import Plan
from .rlimits import limit

__all__ = ["INIT", "ProcessHandle", "preparation", "readable", "start", "status_of"]

INIT = Path(__file__).with_name("init.py")
"""The first process of every sandbox."""

_MARK = re.compile(r"@fd:([a-z0-9_.-]+)@")
_CHUNK = 65_536

_FirstProcess = Callable[[int], int | None]
"""Takes the descriptor that a launcher's status is read from; returns one of the first process, if that is known."""


@dataclass(frozen=True)
class _Status:
    """What a launcher says of itself, and how that is read."""

    descriptor: int
    first_process: _FirstProcess


class ProcessHandle:
    """A started process and our ends of its pipes."""

    def __init__(
        self, process: subprocess.Popen[bytes], pidfd: int, log: int, up: int, life: int, status: _Status | None
    ) -> None:
        self._process = process
        self._launcher = pidfd
        self._first: int | None = None
        self._up: int | None = up
        self._life: int | None = life
        self._status = status
        self._is_up = False
        self._is_closed = False
        self.log = log
        self.copy_of: str | None = None
        self.warnings: Sequence[str] = ()

    @property
    def pidfd(self) -> int:
        return self._launcher if self._first is None else self._first

    async def up(self) -> bool:
        said = b""
        descriptor, self._up = self._up, None
        assert descriptor is not None, "a handle is waited for once"
        try:
            while data := await _next_bytes(descriptor):
                said += data
        finally:
            os.close(descriptor)
        if self._status is not None and not self._is_closed:
            self._first = self._status.first_process(self._status.descriptor)
        self._is_up = True
        first, _, rest = said.partition(b"\n")
        if first == b"init" and rest:
            raise LaunchError("exec", rest.decode(errors="replace").strip())
        return first == b"init"

    async def ended(self) -> ExitStatus:
        await readable(self._launcher)
        code = self._process.wait()
        self._end()  # where somebody killed the launcher
        if self._first is not None:
            await readable(self._first)
        return status_of(code)

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL or not self._is_up:
            self._end()
        else:
            _send(self.pidfd, number)

    def _end(self) -> None:
        """End all by the pipe `life`, or else by a signal.

        The launcher is only killed the second time: what it has started might not know of the pipe yet.
        """
        life, self._life = self._life, None
        if life is not None:
            os.close(life)
        else:
            _send(self._launcher, signal.SIGKILL)
        if self._first is not None:
            _send(self._first, signal.SIGKILL)
        _send(self._launcher, signal.SIGCONT)  # one that is stopped would never see that the pipe is closed

    def close(self) -> None:
        if self._is_closed:
            return
        self._end()
        self._is_closed = True
        status = None if self._status is None else self._status.descriptor
        for descriptor in (self.log, self._up, status, self._launcher, self._first):
            if descriptor is not None:
                os.close(descriptor)


def start(
    command: Sequence[str],
    plan: Plan,
    *,
    environment: Mapping[str, str] | None = None,
    directory: str = "/",
    files: Mapping[str, bytes] | None = None,
    arguments: Sequence[str] = (),
    prepare: Callable[[], None] | None = None,
    first_process: _FirstProcess | None = None,
) -> ProcessHandle:
    """Start `command` with the descriptors, limits and control group of a plan.

    `@fd:NAME@` stands for the plan's descriptors and also for `up`, which is told `init` and closed when the main
    process runs, `life`, which is closed to end all (`init.py`), each of `files`, and what is described below.

    Args:
        files: What is handed over as files in memory.
        arguments: Handed over as the file `args`, separated by NUL, so that no process list shows them.
        prepare: Called in the child before it becomes the command.
        first_process: Finds the sandbox's first process by what the command writes to `status`. None: it is the
            command itself, which has no `status`.

    Raises:
        LaunchError: The process could not be started.
    """
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        log, log_end = _pipe(ours, theirs)
        up, up_end = _pipe(ours, theirs)
        life_end, life = os.pipe2(os.O_CLOEXEC)
        theirs.callback(os.close, life_end)
        ours.callback(os.close, life)
        numbers = {**plan.descriptors, "up": up_end, "life": life_end}
        if plan.hold is not None:
            numbers["hold"] = plan.hold
        status: _Status | None = None
        if first_process is not None:
            # a file, as the launcher would be killed for writing to a pipe that a dead keeper read
            numbers["status"] = _memory_file("status", b"", ours)
            status = _Status(numbers["status"], first_process)
        for name, content in (files or {}).items():
            numbers[name] = _memory_file(name, content, theirs)
        if arguments:
            words = [_substituted(word, numbers).encode() + b"\0" for word in arguments]
            numbers["args"] = _memory_file("args", b"".join(words), theirs)
        try:
            process = subprocess.Popen(
                [_substituted(word, numbers) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log_end,
                stderr=log_end,
                pass_fds=tuple(numbers.values()),
                env={key: _substituted(value, numbers) for key, value in (environment or {}).items()},
                cwd=directory,
                start_new_session=True,
                umask=0o022,
                preexec_fn=preparation(plan, prepare),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise LaunchError("launch", f"could not start {command[0]}: {error}") from error
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError as error:
            process.kill()
            process.wait()
            raise LaunchError("launch", f"could not follow {command[0]}: {error.strerror}") from error
        ours.pop_all()
    return ProcessHandle(process, pidfd, log, up, life, status)


def preparation(plan: Plan, prepare: Callable[[], None] | None) -> Callable[[], None]:
    """Return what the child does before it becomes the launcher."""

    def run() -> None:
        for path in plan.group_entrances:
            descriptor = os.open(path, os.O_WRONLY)
            os.write(descriptor, b"0")
            os.close(descriptor)
        for name, wanted in plan.rlimits.items():  # while it may still raise them
            limit(name, wanted)
        if prepare is not None:
            prepare()

    return run


def status_of(code: int) -> ExitStatus:
    """Read an exit code: the first process ends with 128 and the number of the signal that killed the main one."""
    number = -code if code < 0 else code - 128
    if code < 0 or 0 < number < signal.NSIG:
        with contextlib.suppress(ValueError):
            return ExitStatus(signal=signal.Signals(number))
    return ExitStatus(code=code)


def _send(pidfd: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


async def readable(descriptor: int) -> None:
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
            await readable(descriptor)


def _pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    ours.callback(os.close, reading)
    theirs.callback(os.close, writing)
    os.set_blocking(reading, False)
    return reading, writing


def _memory_file(name: str, content: bytes, stack: contextlib.ExitStack) -> int:
    number = os.memfd_create(name, os.MFD_CLOEXEC)
    stack.callback(os.close, number)
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _substituted(word: str, numbers: Mapping[str, int]) -> str:
    match = _MARK.fullmatch(word)
    return word if match is None else str(numbers[match[1]])
