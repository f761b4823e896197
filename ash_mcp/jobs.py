"""Background jobs, and the output of a running command as a stream."""

from __future__ import annotations

import base64
import uuid
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

import anyio

from ash_mcp._answers import job_output
from ash_mcp.errors import AshTimeout, JobNotFound, LocalProtocolError, SandboxGone, SandboxRefused
from ash_mcp.files import CHUNK_BYTES, RunnerCall
from ash_mcp.results import Chunk, JobOutput, JobResult, Line, StreamName

__all__ = ["Job", "OutputLines", "OutputStream"]

_WAIT_SECONDS: Final = 20.0
"""How long one read waits for output; the runner allows 30."""

READ_BYTES: Final = 256 * 1024

_CLEANUP_SECONDS: Final = 5.0
_LONGEST_LINE_BYTES: Final = 1024 * 1024


class Job:
    """A command that was started in the background. `async for chunk in job` yields its output from the start."""

    def __init__(self, call: RunnerCall, job_id: str) -> None:
        self._call = call
        self.id = job_id

    async def read(self, offset: int = 0, *, limit: int = READ_BYTES, wait_seconds: float = 0.0) -> JobOutput:
        """Return output from `offset` on and the job's state; read on with its `next_offset`.

        Args:
            offset: Where to start, in the bytes of both streams together.
            limit: The most bytes to return.
            wait_seconds: How long to wait when there is none yet, at most 30.

        Raises:
            JobNotFound: The sandbox knows no such job.
        """
        arguments = {"job": self.id, "offset": offset, "limit": limit, "wait_seconds": min(wait_seconds, 30.0)}
        return job_output(await self._call("ash_job_read", arguments, repeatable=True))

    async def write(self, data: bytes | str = b"", *, eof: bool = False) -> None:
        """Write to the job's stdin, and with `eof` close it. Only for a job started with `stdin=True`."""
        raw = memoryview(data.encode() if isinstance(data, str) else data)
        for start in range(0, max(len(raw), 1), CHUNK_BYTES):
            arguments: dict[str, Any] = {"job": self.id}
            if piece := raw[start : start + CHUNK_BYTES]:
                arguments["data_base64"] = base64.b64encode(piece).decode()
            if eof and start + CHUNK_BYTES >= len(raw):
                arguments["eof"] = True
            await self._call("ash_job_write", arguments, repeatable=False)

    async def signal(self, name: str = "TERM") -> None:
        """Send a signal, by its name without SIG, to the job's whole process group."""
        await self._call("ash_job_signal", {"job": self.id, "signal": name}, repeatable=False)

    async def wait(self, *, timeout_seconds: float | None = None) -> JobResult:
        """Wait until the job has ended; its output stays to be read.

        Raises:
            AshTimeout: It still runs; nothing was done to it.
        """
        with anyio.move_on_after(timeout_seconds):
            offset = 0
            while True:
                output = await self.read(offset, limit=1, wait_seconds=_WAIT_SECONDS)
                if not output.running:
                    return _result(output, lost=output.dropped_bytes)
                offset = output.total_bytes
        raise AshTimeout(f"job {self.id} still runs after {timeout_seconds} s")

    async def stop(self, *, grace_seconds: float = 2.0) -> JobResult:
        """End the job: SIGTERM to its process group, and SIGKILL to what is left after the grace."""
        await self.signal("TERM")
        try:
            return await self.wait(timeout_seconds=grace_seconds)
        except AshTimeout:
            await self.signal("KILL")
            return await self.wait(timeout_seconds=_CLEANUP_SECONDS)

    def output(self) -> OutputStream:
        """Return an iterator of the job's output from its start. Leaving it early leaves the job running."""
        return OutputStream(self._call, job=self)

    def __aiter__(self) -> OutputStream:
        return self.output()

    def __repr__(self) -> str:
        return f"<Job {self.id}>"


class OutputStream:
    """The output of a command while it runs: an async iterator of `Chunk`s; after its end `result` says how that was.

    A gap between one chunk's end and the next one's `offset` is output that the sandbox dropped because it was read
    too slowly; it counts in `result.lost_bytes`. Offsets that contradict each other raise `SandboxRefused`.

    As an async context manager it stops a command of its own when it is left early; so does cancelling a read.
    """

    def __init__(
        self,
        call: RunnerCall,
        *,
        job: Job | None = None,
        start: Mapping[str, Any] | None = None,
        stdin: bytes | str | None = None,
    ) -> None:
        self._call = call
        self._job = job
        self._start = start
        self._stdin = stdin
        self._owns_job = job is None
        self._chunks: deque[Chunk] = deque()
        self._offset = 0
        self._lost = 0
        self._result: JobResult | None = None

    @property
    def result(self) -> JobResult:
        """How the command ended.

        Raises:
            LocalProtocolError: The stream was not read to its end yet.
        """
        if self._result is None:
            raise LocalProtocolError("the stream has not ended yet; read it to its end first")
        return self._result

    async def __aenter__(self) -> Self:
        await self._ensure_started()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop the command if it is this stream's own and still runs. Idempotent."""
        if self._owns_job and self._job is not None and self._result is None:
            self._owns_job = False
            with anyio.move_on_after(_CLEANUP_SECONDS, shield=True):
                try:
                    await self._job.signal("KILL")
                except (JobNotFound, SandboxGone):
                    return

    def lines(self) -> OutputLines:
        """Return an iterator of the output as lines of text, each when it is complete, instead of chunks."""
        return OutputLines(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self._result is not None:
                raise StopAsyncIteration
            try:
                await self._fill()
            except anyio.get_cancelled_exc_class():
                await self.aclose()
                raise
        return self._chunks.popleft()

    async def _ensure_started(self) -> Job:
        if self._job is None:
            own = {"stdin": self._stdin is not None, "paced": True, "key": uuid.uuid4().hex}
            arguments = {**(self._start or {}), **own}
            fields = await self._call("ash_job_start", arguments, repeatable=True)
            self._job = Job(self._call, fields.text("job"))
            if self._stdin is not None:
                await self._job.write(self._stdin, eof=True)
        return self._job

    async def _fill(self) -> None:
        job = await self._ensure_started()
        output = await job.read(self._offset, wait_seconds=_WAIT_SECONDS)
        before = self._offset
        for chunk in output.chunks:
            self._advance(chunk.offset)
            self._offset += len(chunk.data)
            self._chunks.append(chunk)
        self._advance(output.next_offset)
        if output.running:
            return
        if self._offset >= output.total_bytes:
            self._result = _result(output, lost=self._lost)
        elif self._offset == before:
            raise SandboxRefused(f"the sandbox keeps back the end of job {job.id}'s output, from {before} on")

    def _advance(self, offset: int) -> None:
        """Move to `offset` and count the bytes between as lost."""
        if offset < self._offset:
            raise SandboxRefused(f"the sandbox sent a job's output twice, at {offset} and at {self._offset}")
        self._lost += offset - self._offset
        self._offset = offset


class OutputLines:
    """The output of a command as an async iterator of `Line`s. What is longer than a MiB comes in pieces."""

    def __init__(self, stream: OutputStream) -> None:
        self._stream = stream
        self._parts: dict[StreamName, bytes] = {"stdout": b"", "stderr": b""}
        self._lines: deque[Line] = deque()
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Line:
        while not self._lines and not self._is_over:
            try:
                chunk = await anext(self._stream)
            except StopAsyncIteration:
                self._end()
            else:
                self._take(chunk)
        if not self._lines:
            raise StopAsyncIteration
        return self._lines.popleft()

    def _take(self, chunk: Chunk) -> None:
        *whole, rest = (self._parts[chunk.stream] + chunk.data).split(b"\n")
        self._lines += [_line(data.removesuffix(b"\r"), chunk.stream) for data in whole]
        if len(rest) > _LONGEST_LINE_BYTES:
            self._lines.append(_line(rest, chunk.stream))
            rest = b""
        self._parts[chunk.stream] = rest

    def _end(self) -> None:
        self._is_over = True
        self._lines += [_line(data, name) for name, data in self._parts.items() if data]


def _line(data: bytes, stream: StreamName) -> Line:
    return Line(data.decode("utf-8", "replace"), stream)


def _result(output: JobOutput, *, lost: int) -> JobResult:
    return JobResult(
        exit_code=output.exit_code,
        timed_out=output.timed_out,
        total_bytes=output.total_bytes,
        lost_bytes=lost,
    )
