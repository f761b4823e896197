"""The jobs of a sandbox: background commands that outlive the calls that started them, each with a bounded log."""

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
from ash_recipes.runner.output import Chunk, JobLog
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.processes import READ_BYTES, Command, Process, SessionLeader, Stream
from ash_recipes.runner.users import User

__all__ = ["Job", "JobPage", "Jobs", "signal_number"]

TERM_SECONDS = 0.5
"""How long after SIGTERM a command is sent SIGKILL."""
REAP_SECONDS = 1.0
"""How long the end of the runner waits for killed commands to exit."""
LOOK_SECONDS = 0.05
"""How often it is looked whether a command that waits for its reader has ended: its end sets no event."""
MAX_RUNNING = 64
KEPT_SECONDS = 600.0
"""How long every job is kept after its end, within the bounds below."""
KEPT_LONGER = 64
"""How many ended jobs are kept beyond that, the last to end."""
MAX_KEPT = 1000
"""How many ended jobs are kept at most; over it the oldest is dropped before its time."""
MAX_KEPT_BYTES = 64 * 1024 * 1024
"""How much the logs of ended jobs may hold; over it the oldest job is dropped before its time."""


@dataclass(frozen=True, slots=True)
class JobPage:
    """A piece of a job's log."""

    chunks: list[Chunk]
    next_offset: int


@dataclass(slots=True, eq=False)
class Job:
    """A command that runs or has ended, with its log."""

    id: str
    command: Command
    process: Process
    started_at: float
    """Seconds since the epoch."""
    log: JobLog = field(default_factory=JobLog)
    paced: bool = False
    """Whether a full log stops the command until it is read, instead of dropping the oldest output."""
    read_to: int = 0
    """The highest offset that a reader has asked for: it has everything before it."""
    key: str | None = None
    """The idempotency key of its start."""
    exit_code: int | None = None
    """None while it runs."""
    ended_at: float = 0.0
    """By the clock of `Jobs`."""
    timed_out: bool = False
    ended: anyio.Event = field(default_factory=anyio.Event)
    changed: anyio.Event = field(default_factory=anyio.Event)
    """Set, and replaced by a new one, when the log grows, when it was read, and when the command has ended."""

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
        """Send a signal to the job's whole process group; False when the command has ended.

        SIGKILL goes to the whole session, also to processes that made a process group of their own.
        """
        if not self.running or self.process.exited:
            return False  # its process id may already be another process's
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
        """Return at most `limit` bytes of the log from `offset` on, waiting for the first if the job still runs."""
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
        """The jobs that have ended, in the order of their ends."""
        self._by_key: dict[str, tuple[Any, Job]] = {}
        """Jobs by idempotency key, each with the arguments that the key stands for."""
        self._spent = SpentKeys(clock)
        self._running: set[SessionLeader] = set()
        """The processes to kill when all end, those that only `watched` knows included."""
        self._process_ended = anyio.Event()
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
        with anyio.move_on_after(REAP_SECONDS, shield=True):
            while self._running:
                await self._process_ended.wait()
        self.tasks.cancel_scope.cancel()
        await self.tasks.__aexit__(*error)
        self._tasks = None

    @property
    def tasks(self) -> TaskGroup:
        """The task group for work that outlives the call which began it."""
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
        user: User | None = None,
    ) -> Job:
        """Start a job, or return the one that the same key has started.

        Args:
            paced: Whether a full log stops the command until it is read, so that no output is lost.
            key: Idempotency key. It stands for the command, its directory, `stdin`, the timeout and the user.
            user: Whom it runs as; None: as the runner does.
            shown: What stands for the command in lists; None for the command itself.

        Raises:
            Problem: `spawn_failed`: the command could not be started, or too many run. `bad_request`: the key stands
                for another command. `result_lost`: the job of this key is kept no longer.
        """
        words = command if isinstance(command, str) else tuple(command)
        key_stands_for = (words, str(cwd), stdin, timeout_seconds, user)
        if key is not None and key in self._by_key:
            known, job = self._by_key[key]
            if known != key_stands_for:
                raise Problem("bad_request", f"the key {key!r} was used for another command; take a new one")
            return job
        if key is not None:
            self._spent.refuse(key)
        if sum(job.running for job in self._jobs.values()) >= self._max_running:
            raise Problem("spawn_failed", f"{self._max_running} jobs run already; stop one of them first")

        def on_data(stream: Stream, data: bytes) -> None:
            job.append_output(stream, data)  # nothing is read before the tasks below run

        async def has_room() -> None:
            await job.wait_for_room()

        process = Process(
            command,
            cwd=cwd,
            env=env,
            stdin=stdin,
            on_data=on_data,
            has_room=has_room,
            pass_fds=pass_fds,
            user=user,
        )
        self._count += 1
        job = Job(f"job-{self._count}", shown or command, process, started_at=time.time(), paced=paced, key=key)
        self._jobs[job.id] = job
        if key is not None:
            self._by_key[key] = (key_stands_for, job)
        self.adopt(process)  # at once: `end_all` may come before the task first runs
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
        """Read a process's output while the context is entered; kill the process if it still runs at the exit.

        `end_all` kills it, too.
        """
        async with self.owned(process):
            self.tasks.start_soon(process.read, "stdout")
            self.tasks.start_soon(process.read, "stderr")
            yield

    @contextlib.asynccontextmanager
    async def owned(self, process: SessionLeader) -> AsyncGenerator[None]:
        """Kill a process at the exit of the context if it still runs; `end_all` kills it, too."""
        self.adopt(process)
        try:
            yield
        finally:
            if process.exited:
                self._forget(process)
            else:
                process.kill()
                self.tasks.start_soon(self._reap, process)

    def adopt(self, process: SessionLeader) -> None:
        """Have `end_all` kill a process that is about to be `owned`."""
        self._running.add(process)
        if self._ending:
            process.kill()

    async def _reap(self, process: SessionLeader) -> None:
        await process.wait_exit()
        self._forget(process)

    def _forget(self, process: SessionLeader) -> None:
        process.forget()
        self._running.discard(process)
        ended, self._process_ended = self._process_ended, anyio.Event()
        ended.set()

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
        """Return the jobs that run and the ended ones that are kept, in the order of their starts."""
        return list(self._jobs.values())

    def end_all(self) -> None:
        """Kill every command that runs, now, and every one that is started from now on."""
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
    """End a command by SIGTERM, then its whole session by SIGKILL, and return the exit code."""
    process.signal(signal.SIGTERM)
    code: int | None = None
    with anyio.move_on_after(TERM_SECONDS):
        code = await process.wait()
    # also where SIGTERM was enough: processes that the command started may still run
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
