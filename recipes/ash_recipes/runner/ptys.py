"""The ptys of a sandbox: commands on a terminal, which outlive the connections that show them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio

from ash_recipes.runner.jobs import TERM_SECONDS, Jobs
from ash_recipes.runner.output import JobLog
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.processes import Command
from ash_recipes.runner.pty_process import PtyProcess
from ash_recipes.runner.users import User

__all__ = ["Pty", "Ptys"]

LOG_BYTES: Final = 1024 * 1024
"""How much of a pty's output is kept for who attaches again."""
AHEAD_BYTES: Final = 128 * 1024
"""How much output may wait for its viewer before the command does: more, and Ctrl-C would show late."""
INPUT_BYTES: Final = 64 * 1024
"""How much input may wait for the command before its viewer is not read any more."""
MAX_RUNNING: Final = 16
DETACHED_SECONDS: Final = 3600.0
"""How long a pty that nobody is attached to goes on, where its start says nothing else."""
KEPT_SECONDS: Final = 600.0
"""How long an ended pty is kept, so that who was cut off learns of its end."""
MAX_KEPT: Final = 16


@dataclass(slots=True, eq=False)
class Pty:
    """A command on a terminal, running or ended, with the last of its output."""

    id: str
    command: Command
    process: PtyProcess
    detached_seconds: float
    started_at: float
    """Seconds since the epoch."""
    key: str | None = None
    log: JobLog = field(default_factory=lambda: JobLog(LOG_BYTES))
    exit_code: int | None = None
    """None while it runs."""
    ended_at: float = 0.0
    """By the clock of `Ptys`."""
    viewer: anyio.CancelScope | None = None
    """Cancelled when another takes the terminal over."""
    shown_to: int = 0
    """The offset up to which the viewer has the output."""
    input_total: int = 0
    """How many bytes were typed in all: who was cut off learns by it what has arrived."""
    input: bytearray = field(default_factory=bytearray)
    """What the command has not read yet."""
    changed: anyio.Event = field(default_factory=anyio.Event)
    """Set, and replaced by a new one, whenever something of the above changes."""

    @property
    def running(self) -> bool:
        return self.exit_code is None

    def notify(self) -> None:
        changed, self.changed = self.changed, anyio.Event()
        changed.set()

    def append_output(self, data: bytes) -> None:
        self.log.append("stdout", data)
        self.notify()

    async def wait_for_room(self) -> None:
        """Wait while its viewer is far behind; without one the oldest output is dropped instead."""
        while self.viewer is not None and self.log.total - self.shown_to > AHEAD_BYTES and not self.process.exited:
            await self.changed.wait()

    async def type(self, data: bytes) -> None:
        """Take input, and wait while the command leaves too much unread."""
        if not self.running:
            return
        self.input += data
        self.input_total += len(data)
        self.notify()
        while len(self.input) > INPUT_BYTES and self.running:
            await self.changed.wait()

    async def pass_input(self) -> None:
        """Type what was taken as the command reads it, until nobody has the terminal."""
        while True:
            while not self.input:
                await self.changed.wait()
            data = bytes(self.input)
            if not await self.process.write(data):
                return
            del self.input[: len(data)]
            self.notify()

    def attach(self, viewer: anyio.CancelScope, offset: int) -> None:
        """Show the terminal to a viewer from `offset` on, and to nobody else."""
        if self.viewer is not None:
            self.viewer.cancel()
        self.viewer, self.shown_to = viewer, offset
        self.notify()

    def detach(self, viewer: anyio.CancelScope) -> None:
        """Note that a viewer has left; no-op for one that another has replaced."""
        if self.viewer is viewer:
            self.viewer = None
            self.notify()


class Ptys:
    """All ptys of one sandbox; its `Jobs` end them with everything else."""

    def __init__(self, jobs: Jobs, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs = jobs
        self._clock = clock
        self._ptys: dict[str, Pty] = {}
        self._count = 0

    def start(
        self,
        command: Command,
        *,
        cwd: Path,
        env: Mapping[str, str],
        size: tuple[int, int],
        detached_seconds: float = DETACHED_SECONDS,
        key: str | None = None,
        user: User | None = None,
    ) -> Pty:
        """Start a command on a pty, or return the one that the same key has started.

        Args:
            size: Rows and columns.
            detached_seconds: How long it goes on while nobody is attached.

        Raises:
            Problem: `spawn_failed`: it could not be started, or too many run.
        """
        self._drop_old()
        for pty in self._ptys.values():
            if key is not None and pty.key == key:
                return pty
        if sum(pty.running for pty in self._ptys.values()) >= MAX_RUNNING:
            raise Problem("spawn_failed", f"{MAX_RUNNING} terminals are open already; end one of them first")

        def on_data(data: bytes) -> None:
            pty.append_output(data)

        async def has_room() -> None:
            await pty.wait_for_room()

        process = PtyProcess(command, cwd=cwd, env=env, size=size, on_data=on_data, has_room=has_room, user=user)
        self._jobs.adopt(process)
        self._count += 1
        pty = Pty(f"pty-{self._count}", command, process, detached_seconds, time.time(), key)
        self._ptys[pty.id] = pty
        self._jobs.tasks.start_soon(self._watch, pty)
        return pty

    def get(self, pty_id: str) -> Pty:
        """Return a pty.

        Raises:
            Problem: `pty_not_found`.
        """
        self._drop_old()
        pty = self._ptys.get(pty_id)
        if pty is None:
            named = ", ".join(known.id for known in self._ptys.values() if known.running) or "none"
            raise Problem("pty_not_found", f"there is no terminal {pty_id!r}; there run: {named}")
        return pty

    def list(self) -> list[Pty]:
        """Return those that run and those that are kept, in the order of their starts."""
        self._drop_old()
        return list(self._ptys.values())

    async def _watch(self, pty: Pty) -> None:
        process = pty.process
        try:
            async with self._jobs.owned(process), anyio.create_task_group() as group:
                group.start_soon(process.read)
                group.start_soon(pty.pass_input)
                group.start_soon(self._end_unattended, pty)
                pty.exit_code = await process.wait()
                group.cancel_scope.cancel()
        finally:
            pty.ended_at = self._clock()
            pty.input.clear()
            process.close()
            pty.notify()

    async def _end_unattended(self, pty: Pty) -> None:
        """Hang up once nobody was attached for so long."""
        while True:
            with anyio.move_on_after(pty.detached_seconds) as limit:
                while pty.viewer is None:
                    await pty.changed.wait()
            if limit.cancelled_caught:
                await hang_up(pty)
                return
            while pty.viewer is not None:
                await pty.changed.wait()

    def _drop_old(self) -> None:
        ended = sorted((pty for pty in self._ptys.values() if not pty.running), key=lambda pty: pty.ended_at)
        for pty in ended[:-MAX_KEPT] + [pty for pty in ended if pty.ended_at + KEPT_SECONDS <= self._clock()]:
            self._ptys.pop(pty.id, None)


async def hang_up(pty: Pty) -> None:
    """End a pty's command as a cut line does: SIGHUP, and SIGKILL to what is left of its session."""
    if pty.running:
        pty.process.hang_up()
        with anyio.move_on_after(TERM_SECONDS):
            await pty.process.wait_exit()
        pty.process.kill()
