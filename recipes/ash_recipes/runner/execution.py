"""The execution of one command to its end, with bounded output, and at most once for an idempotency key."""

from __future__ import annotations

import base64
import hashlib
import math
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from ash_recipes.runner.context import Context
from ash_recipes.runner.jobs import stop
from ash_recipes.runner.keys import SpentKeys
from ash_recipes.runner.output import Capture, Clipped, Spool, halves, json_size
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.processes import Command, Process, Stream
from ash_recipes.runner.users import User

__all__ = ["Execution", "KeyedRuns", "execute"]

ANSWER_BYTES = 900_000
"""What both streams together may take of an answer on the wire; MCP clients refuse events over 1 MiB."""
ABANDONED_SECONDS = 15.0
"""How long a command with a key goes on without a waiting call: its caller may repeat the call with the same key."""
KEPT_SECONDS = 600.0
"""How long the result of a command with a key is kept after its end."""
KEPT_BYTES = 64 * 1024 * 1024
"""How much all kept results may take; over it the oldest is dropped before its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a command ended, with its output cut to fit into an answer."""

    exit_code: int
    stdout: Clipped
    stderr: Clipped
    stdout_bytes: int
    """How many bytes the command wrote, those left out included."""
    stderr_bytes: int
    duration_seconds: float
    timed_out: bool
    output_file: Path | None
    """The file with both streams, up to `SPOOL_BYTES`, if they were cut and the disk had room."""

    @property
    def truncated(self) -> bool:
        return self.stdout.left_out + self.stderr.left_out > 0

    def to_json(self) -> dict[str, Any]:
        shape: dict[str, Any] = {
            "exit_code": self.exit_code,
            "stdout": self.stdout.text(),
            "stderr": self.stderr.text(),
            "duration_seconds": round(self.duration_seconds, 3),
            "timed_out": self.timed_out,
            "truncated": self.truncated,
            "stdout_bytes": self.stdout_bytes,
            "stderr_bytes": self.stderr_bytes,
        }
        for name, stream in (("stdout_base64", self.stdout), ("stderr_base64", self.stderr)):
            if not stream.utf8:
                shape[name] = base64.b64encode(stream.data).decode()
        if self.output_file is not None:
            shape["output_file"] = str(self.output_file)
        return shape


class _Output:
    """Collects both streams of one command: the ends of each for the answer, and the whole for a file."""

    def __init__(self, spool: Path, limit: int) -> None:
        self.limit = limit
        self.stdout = Capture(limit)
        self.stderr = Capture(limit)
        self.whole = Spool(spool, memory=2 * limit)

    def written(self, stream: Stream, data: bytes) -> None:
        (self.stdout if stream == "stdout" else self.stderr).append(data)
        self.whole.append(data)

    def finish(self, budget: int, **facts: Any) -> Execution:
        """Return the result, with the streams cut until they fit in `budget` bytes on the wire.

        If anything is cut, the whole output is kept in a file.
        """
        for limit in halves(self.limit):
            stdout, stderr = self.stdout.clip(limit), self.stderr.clip(limit)
            if _wire_size(stdout) + _wire_size(stderr) <= budget:
                break
        else:
            raise AssertionError("the smallest answer is within every budget")
        cut = stdout.left_out + stderr.left_out > 0
        output_file = self.whole.move_to_file() if cut else None
        self.whole.close()
        return Execution(
            stdout=stdout,
            stderr=stderr,
            stdout_bytes=self.stdout.total,
            stderr_bytes=self.stderr.total,
            output_file=output_file,
            **facts,
        )


def _wire_size(stream: Clipped) -> int:
    return json_size(stream.text()) + (0 if stream.utf8 else math.ceil(len(stream.data) / 3) * 4)


async def execute(
    context: Context,
    command: Command,
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdin: bytes | None = None,
    timeout_seconds: float | None,
    output_limit: int,
    budget: int = ANSWER_BYTES,
    pass_fds: Sequence[int] = (),
    user: User | None = None,
) -> Execution:
    """Run a command to its end.

    At its timeout it is ended by `stop`: SIGTERM, then SIGKILL to its whole session. When this call is cancelled, the
    whole session is killed at once.

    Args:
        output_limit: How many bytes of each stream are returned at most.
        budget: How many bytes both streams together may take on the wire.
        user: Whom it runs as; None: as the runner does.

    Raises:
        Problem: `spawn_failed`.
    """
    output = _Output(context.spool, output_limit)
    began = time.monotonic()
    process = Process(
        command, cwd=cwd, env=env, stdin=stdin is not None, on_data=output.written, pass_fds=pass_fds, user=user
    )
    timed_out, code = False, 0
    async with context.jobs.watched(process):
        with anyio.move_on_after(timeout_seconds) as limit:
            async with anyio.create_task_group() as feeding:
                if stdin is not None:
                    feeding.start_soon(_feed, process, stdin)
                code = await process.wait()
                feeding.cancel_scope.cancel()
        if limit.cancelled_caught:
            timed_out, code = True, await stop(process)
    return output.finish(budget, exit_code=code, duration_seconds=time.monotonic() - began, timed_out=timed_out)


async def _feed(process: Process, data: bytes) -> None:
    await process.write(data)
    await process.close_stdin()


@dataclass(slots=True, eq=False)
class _Run:
    """One command with a key, running or ended."""

    digest: bytes
    """Of the arguments that the key stands for: a command's stdin may be long."""
    done: anyio.Event = field(default_factory=anyio.Event)
    result: dict[str, Any] | None = None
    problem: Exception | None = None
    ended_at: float = 0.0
    waiting: int = 0
    """How many calls wait for it."""
    call_came: anyio.Event = field(default_factory=anyio.Event)
    """Set by the next call that waits for it; replaced when the last one has left."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    @property
    def size(self) -> int:
        """How many bytes its result takes in memory, roughly."""
        return 1024 + sum(sys.getsizeof(value) for value in (self.result or {}).values())


class KeyedRuns:
    """Commands by idempotency key: a call whose answer was lost can be repeated, and its command runs once.

    The result of a command is kept for `KEPT_SECONDS`, or less where all results take too many bytes. Its key is
    remembered for longer (`SpentKeys`), so that a repeat that comes too late is refused and not run again.
    """

    def __init__(
        self,
        context: Context,
        *,
        abandoned_seconds: float = ABANDONED_SECONDS,
        kept_bytes: int = KEPT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._abandoned_seconds = abandoned_seconds
        self._kept_bytes = kept_bytes
        self._clock = clock
        self._runs: dict[str, _Run] = {}
        self._ended: dict[str, _Run] = {}
        """The runs that have ended, in the order of their ends."""
        self._bytes = 0
        """The `size` of the ended runs together."""
        self._spent = SpentKeys(clock)

    async def once(self, key: str, asked: object, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Return what `work()` returns, or what it returned for the same key before.

        Work that no call waits for any more is cancelled after `abandoned_seconds`.

        Args:
            asked: The arguments that the key stands for, compared by their `repr`.

        Raises:
            Problem: The work's own. `bad_request`: the key stands for other arguments. `result_lost`: the result is
                kept no longer. `abandoned`: the work was cancelled.
        """
        self._drop_old()
        run, digest = self._runs.get(key), hashlib.blake2b(repr(asked).encode("utf-8", "surrogatepass")).digest()
        if run is None:
            self._spent.refuse(key)
            run = self._runs[key] = _Run(digest)
            self._context.jobs.tasks.start_soon(self._work, key, run, work)
        elif run.digest != digest:
            raise Problem("bad_request", f"the key {key!r} was used for another command; take a new one")
        run.waiting += 1
        run.call_came.set()
        try:
            await run.done.wait()
        finally:
            run.waiting -= 1
            if run.waiting == 0 and not run.done.is_set():
                run.call_came = anyio.Event()
                self._context.jobs.tasks.start_soon(self._stop_abandoned, run)
        if run.problem is not None:
            raise run.problem
        assert run.result is not None
        return run.result

    def cancel(self, key: str) -> bool:
        """End the command of a key, and have none start with it; return whether one ran."""
        run = self._runs.get(key)
        if run is None:
            self._spent.add(key)
            return False
        if not run.done.is_set():
            run.scope.cancel()
            return True
        return False

    async def _work(self, key: str, run: _Run, work: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        try:
            with run.scope:
                run.result = await work()
            if run.result is None:
                run.problem = Problem("abandoned", "the command was stopped: its caller had gone")
        except Exception as exc:  # raised to its callers; it must not end the runner
            run.problem = exc
        finally:
            run.ended_at = self._clock()
            self._ended[key] = run
            self._bytes += run.size
            run.done.set()
            self._drop_old()

    async def _stop_abandoned(self, run: _Run) -> None:
        with anyio.move_on_after(self._abandoned_seconds):
            await run.call_came.wait()
            return
        if run.waiting == 0:
            run.scope.cancel()

    def _drop_old(self) -> None:
        old = self._clock() - KEPT_SECONDS
        while self._ended:
            key, run = next(iter(self._ended.items()))
            if run.ended_at > old and self._bytes <= self._kept_bytes:
                return
            del self._ended[key], self._runs[key]
            self._bytes -= run.size
            self._spent.add(key)
