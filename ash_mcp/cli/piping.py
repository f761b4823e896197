"""A job in a sandbox connected to this process's standard streams and signals."""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread

from ash_mcp.errors import ConfigError, SandboxGone, SandboxRefused

if TYPE_CHECKING:
    from ash_mcp.jobs import Job, OutputStream
    from ash_mcp.sandbox import Sandbox

__all__ = ["Ended", "input_waits", "run_piped"]

_READ_BYTES: Final = 64 * 1024
_INTERRUPT_SECONDS: Final = 2.0
"""How long a command may take to end after Ctrl-C, before it is killed."""
_CLEANUP_SECONDS: Final = 5.0
_DESCRIPTORS: Final = {"stdout": 1, "stderr": 2}


@dataclass(slots=True, kw_only=True)
class Ended:
    """How a command ended."""

    exit_code: int | None = None
    timed_out: bool = False
    lost_bytes: int = 0
    interrupted_by: int | None = None
    """The number of the signal that came here meanwhile."""


async def run_piped(
    box: Sandbox,
    command: str | list[str],
    *,
    stdin: bool,
    timeout_seconds: float | None,
    cwd: str | None,
    env: Mapping[str, str] | None,
    user: str | None = None,
) -> Ended:
    """Run a command to its end with this process's streams, stdin only on request; SIGINT and SIGTERM go to it."""
    ended = Ended()
    has_stdin = stdin and sys.stdin is not None  # where 0 was closed, it may be another file by now
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as group:
            starting = anyio.CancelScope()
            job: Job | None = None

            async def obey() -> None:
                async for number in signals:
                    ended.interrupted_by = int(number)
                    if job is None:
                        starting.cancel()
                        return
                    await _interrupt(job, number)
                    # A command that ends by it says so in its output's end; one that does not is left to itself.
                    with anyio.move_on_after(_INTERRUPT_SECONDS):
                        await finished.wait()
                    group.cancel_scope.cancel()
                    return

            finished = anyio.Event()
            group.start_soon(obey)
            with starting:
                job = await box.background(
                    command, stdin=has_stdin, timeout_seconds=timeout_seconds, cwd=cwd, env=env, paced=True, user=user
                )
            if job is not None:
                await _pass_all(job, has_stdin, ended)
                finished.set()
            group.cancel_scope.cancel()
    return ended


async def _pass_all(job: Job, has_stdin: bool, ended: Ended) -> None:
    """Pass both ways until the command has ended; kill it when this is left early."""
    try:
        async with anyio.create_task_group() as group:
            if has_stdin:
                group.start_soon(_pass_stdin, job)
            output = job.output()
            if await _pass_output(output):
                result = output.result
                ended.exit_code, ended.timed_out = result.exit_code, result.timed_out
                ended.lost_bytes = result.lost_bytes
            else:
                ended.interrupted_by = signal.SIGPIPE
                await _interrupt(job, signal.SIGTERM)
            group.cancel_scope.cancel()
    except BaseException:
        with anyio.move_on_after(_CLEANUP_SECONDS, shield=True):
            await _interrupt(job, signal.SIGKILL)
        raise


async def _pass_output(output: OutputStream) -> bool:
    """Write the output as it comes; return False when its reader here has closed the pipe."""
    async for chunk in output:
        try:
            # In a thread: a reader that is slow must hold up neither stdin nor a signal.
            await anyio.to_thread.run_sync(_write_all, _DESCRIPTORS[chunk.stream], chunk.data, abandon_on_cancel=True)
        except BrokenPipeError:
            return False
    return True


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


async def _pass_stdin(job: Job) -> None:
    """Pass what comes on stdin, and its end; a command that does not read it any more is no failure."""
    try:
        while piece := await _read_stdin():
            await job.write(piece)
        await job.write(eof=True)
    except (SandboxRefused, SandboxGone, ConfigError):
        return  # the runner takes a write to an stdin that is closed for a wrong argument


async def _read_stdin() -> bytes:
    try:
        await anyio.wait_readable(0)
    except PermissionError:  # a file cannot be waited for, and need not be
        pass
    try:
        return os.read(0, _READ_BYTES)
    except OSError:
        return b""


async def _interrupt(job: Job, number: int) -> None:
    try:
        await job.signal(signal.Signals(number).name.removeprefix("SIG"))
    except (SandboxRefused, SandboxGone):
        return


def input_waits() -> bool:
    """Return whether stdin is a pipe that holds data, or a file at its start that is not empty."""
    from fcntl import ioctl
    from termios import FIONREAD

    if sys.stdin is None:
        return False
    try:
        info = os.fstat(0)
        if stat.S_ISREG(info.st_mode):
            return info.st_size > 0 and os.lseek(0, 0, os.SEEK_CUR) == 0
        if not stat.S_ISFIFO(info.st_mode):
            return False
        return int.from_bytes(ioctl(0, FIONREAD, bytes(4)), sys.byteorder) > 0
    except OSError:
        return False
