"""The jobs of a sandbox: commands that run beside the calls that started them, with a bounded log each."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import anyio
from anyio.abc import TaskGroup

from ash_recipes.runner.keys import SpentKeys
from ash_recipes.runner.output import Chunk, Log
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.processes import READ_BYTES, Command, Process, Stream

__all__ = ["Job", "JobPage", "Jobs", "signal_number"]

TERM_SECONDS = 0.5
"""How long a command that is to end may take to do so by itself."""
LAST_SECONDS = 1.0
"""How long a killed command may take to be gone when all of them end."""
LOOK_SECONDS = 0.05
"""How often a command that waits for its reader is looked at, since its end wakes nobody."""
MAX_RUNNING = 64
KEPT_SECONDS = 600.0
"""How long a job is kept after its end at least, within the bounds below."""
KEPT_LONGER = 64
"""So many of the last that ended are kept for longer."""
MAX_KEPT = 1000
MAX_KEPT_BYTES = 64 * 1024 * 1024
"""Over these ended jobs are let go before their time, oldest first."""


@dataclass(frozen=True, slots=True)
class JobPage:
    """A piece of a job's log."""

    chunks: list[Chunk]
    next_offset: int


@dataclass(slots=True, eq=False)
class Job:
    id: str
    command: Command
    process: Process
    started_at: float
    log: Log = field(default_factory=Log)
    paced: bool = False
    """Whether the command waits for its reader instead of its oldest output being let go."""
    read_to: int = 0
    """What lies before this offset has reached a reader, who asked for what comes after."""
    key: str | None = None
    exit_code: int | None = None
    """None while it runs."""
    ended_at: float = 0.0
    """By the clock of `Jobs`."""
    timed_out: bool = False
    ended: anyio.Event = field(default_factory=anyio.Event)
    changed: anyio.Event = field(default_factory=anyio.Event)

    @property
    def running(self) -> bool:
        return self.exit_code is None

    def append_output(self, stream: Stream, data: bytes) -> None:
        self.log.append(stream, data)
        self.notify()

    def notify(self) -> None:
        changed, self.changed = self.changed, anyio.Event()
        changed.set()

    def signal(self, number: int) -> bool:
        """Send a signal to the job's whole process group; False when it has ended.

        SIGKILL reaches its whole session, also what made a process group of its own.
        """
        if not self.running or self.process.exited:
            return False  # its number may already be another process's
        if number == signal.SIGKILL:
            self.process.kill()
            return True
        return self.process.signal(number)

    async def wait_for_room(self) -> None:
        """Wait while another piece of output could push unread output out of the log; not after the command's end."""
        while self.paced and self.log.would_lose(self.read_to, READ_BYTES) and not self.process.exited:
            with anyio.move_on_after(LOOK_SECONDS):
                await self.changed.wait()

    async def read(self, offset: int, limit: int, wait_seconds: float) -> JobPage:
        """Return what stands in the log from `offset` on, waiting for it if the job still runs."""
        if offset > self.read_to:
            self.read_to = offset
            self.notify()
        with anyio.move_on_after(wait_seconds):
            while self.running and self.log.total <= offset:
                await self.changed.wait()
        return JobPage(*self.log.read(offset, limit))


class Jobs:
    """All jobs of one sandbox. Entered once, before the first is started; leaving it ends them all."""

    def __init__(self, *, max_running: int = MAX_RUNNING, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._ended: dict[str, Job] = {}
        """Those of the jobs that have ended, in the order in which they did."""
        self._by_key: dict[str, tuple[Any, Job]] = {}
        self._spent = SpentKeys(clock)
        self._running: set[Process] = set()
        self._fewer = anyio.Event()
        self._ending = False
        self._count = 0
        self._max_running = max_running
        self._tasks: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.end_all()
        with anyio.move_on_after(LAST_SECONDS, shield=True):
            while self._running:
                await self._fewer.wait()
        self.tasks.cancel_scope.cancel()
        await self.tasks.__aexit__(*error)
        self._tasks = None

    @property
    def tasks(self) -> TaskGroup:
        """Where work goes on that outlives the call which began it."""
        if self._tasks is None:
            raise RuntimeError("the jobs have not been entered")
        return self._tasks

    def start(
        self,
        command: Command,
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: bool = False,
        timeout_seconds: float | None = None,
        paced: bool = False,
        key: str | None = None,
        shown: str | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Job:
        """Start a job, or return the one that the same key has started.

        Args:
            paced: Whether the command waits for whoever reads its output, so that none is let go.
            shown: What stands for the command in lists; None for the command itself.

        Raises:
            Problem: It could not be started, too many run, the key stands for another command, or `result_lost`:
                the job of this key is kept no longer.
        """
        asked = (command if isinstance(command, str) else tuple(command), str(cwd), stdin, timeout_seconds)
        if key is not None and key in self._by_key:
            known, job = self._by_key[key]
            if known != asked:
                raise Problem("bad_request", f"the key {key!r} was used for another command; take a new one")
            return job
        if key is not None:
            self._spent.refuse(key)
        if sum(job.running for job in self._jobs.values()) >= self._max_running:
            raise Problem("spawn_failed", f"{self._max_running} jobs run already; stop one of them first")

        def written(stream: Stream, data: bytes) -> None:
            job.append_output(stream, data)  # nothing is read before the tasks below run

        async def has_room() -> None:
            await job.wait_for_room()

        process = Process(
            command, cwd=cwd, env=env, stdin=stdin, on_data=written, has_room=has_room, pass_fds=pass_fds
        )
        self._count += 1
        job = Job(f"job-{self._count}", shown or command, process, started_at=time.time(), paced=paced, key=key)
        self._jobs[job.id] = job
        if key is not None:
            self._by_key[key] = (asked, job)
        self._adopt(process)  # now, not when its task first runs: all may end before
        self.tasks.start_soon(self._watch, job, timeout_seconds)
        return job

    async def _watch(self, job: Job, timeout_seconds: float | None) -> None:
        code: int | None = None
        async with self.watched(job.process):
            with anyio.move_on_after(timeout_seconds):
                code = await job.process.wait()
            job.timed_out = code is None
            job.exit_code = await stop(job.process) if code is None else code
        job.ended_at = self._clock()
        self._ended[job.id] = job
        job.ended.set()
        job.notify()
        self._drop_oldest()

    @contextlib.asynccontextmanager
    async def watched(self, process: Process) -> AsyncGenerator[None]:
        """Read the process's output while its owner waits for it; it ends with this runner at the latest."""
        self._adopt(process)
        self.tasks.start_soon(process.read, "stdout")
        self.tasks.start_soon(process.read, "stderr")
        try:
            yield
        finally:
            if process.exited:
                self._forget(process)
            else:
                process.kill()
                self.tasks.start_soon(self._reap, process)

    def _adopt(self, process: Process) -> None:
        self._running.add(process)
        if self._ending:
            process.kill()

    async def _reap(self, process: Process) -> None:
        await process.wait()
        self._forget(process)

    def _forget(self, process: Process) -> None:
        process.forget()
        self._running.discard(process)
        fewer, self._fewer = self._fewer, anyio.Event()
        fewer.set()

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            Problem: `job_not_found`.
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise Problem("job_not_found", f"there is no job {job_id!r}; ash_job_list names those that there are")
        return job

    def list(self) -> list[Job]:
        return list(self._jobs.values())

    def end_all(self) -> None:
        """Kill every command that runs here, at once, and every one that is started from now on."""
        self._ending = True
        for process in list(self._running):
            process.kill()

    def _drop_oldest(self) -> None:
        held = sum(job.log.held for job in self._ended.values())
        while self._ended:
            oldest = next(iter(self._ended.values()))
            old = self._clock() - oldest.ended_at >= KEPT_SECONDS
            if len(self._ended) <= (KEPT_LONGER if old else MAX_KEPT) and held <= MAX_KEPT_BYTES:
                return
            held -= oldest.log.held
            del self._ended[oldest.id], self._jobs[oldest.id]
            if oldest.key is not None:
                del self._by_key[oldest.key]
                self._spent.add(oldest.key)


async def stop(process: Process) -> int:
    """End a command and everything in its session, first politely, and return its exit code."""
    process.signal(signal.SIGTERM)
    code: int | None = None
    with anyio.move_on_after(TERM_SECONDS):
        code = await process.wait()
    # Also after a polite end: what it started may still be there.
    process.kill()
    return await process.wait() if code is None else code


def signal_number(name: str) -> int:
    """Return the number of a signal named `TERM` or `SIGTERM`, or given as a number.

    Raises:
        Problem: There is no such signal.
    """
    plain = name.strip().upper().removeprefix("SIG")
    number = getattr(signal, f"SIG{plain}", None)
    if isinstance(number, signal.Signals):
        return int(number)
    if plain.isdecimal() and 0 < int(plain) < 65:
        return int(plain)
    raise Problem("bad_request", f"{name!r} is no signal; use TERM, KILL, INT, HUP, USR1 or another name")
