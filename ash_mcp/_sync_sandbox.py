"""Handles of the sync twin: each method is the SDK's of the same name, waited for. See there for arguments."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from ash_mcp import files, jobs, sandbox
from ash_mcp._connection import OnProgress
from ash_mcp.files import OnBytes
from ash_mcp.results import CallResult, Chunk, ExecResult, FileEntry, JobInfo, JobOutput, JobResult
from ash_mcp.sandbox import Command
from ash_mcp.types import SandboxId, SandboxInfo, SessionName, Tool

__all__ = ["Files", "Job", "OutputStream", "Sandbox"]

T = TypeVar("T")


class Run(Protocol):
    """Runs something in the hive's event loop and waits for it."""

    def __call__(self, do: Callable[[], Awaitable[T]], /) -> T: ...


class Sandbox:
    """`ash_mcp.Sandbox` without `await`."""

    def __init__(self, run: Run, box: sandbox.Sandbox) -> None:
        self._run = run
        self._box = box
        self.spawned_tools = box.spawned_tools
        self.files = Files(run, box.files)

    @property
    def info(self) -> SandboxInfo:
        return self._box.info

    @property
    def id(self) -> SandboxId:
        return self._box.id

    @property
    def session(self) -> SessionName:
        return self._box.session

    def exec(
        self,
        command: Command,
        *,
        check: bool = False,
        timeout_seconds: float = 60.0,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | str | None = None,
        output_limit: int | None = None,
    ) -> ExecResult:
        """Run a command to its end."""
        return self._run(
            lambda: self._box.exec(
                command,
                check=check,
                timeout_seconds=timeout_seconds,
                cwd=cwd,
                env=env,
                stdin=stdin,
                output_limit=output_limit,
            )
        )

    def stream(
        self,
        command: Command,
        *,
        timeout_seconds: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | str | None = None,
    ) -> OutputStream:
        """Return a command's output as it comes: `for chunk in box.stream("make")`."""
        stream = self._box.stream(command, timeout_seconds=timeout_seconds, cwd=cwd, env=env, stdin=stdin)
        return OutputStream(self._run, stream)

    def background(
        self,
        command: Command,
        *,
        stdin: bool = False,
        timeout_seconds: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        paced: bool = False,
    ) -> Job:
        """Start a command and return at once."""
        start = partial(self._box.background, command, stdin=stdin, cwd=cwd, env=env, paced=paced)
        return Job(self._run, self._run(partial(start, timeout_seconds=timeout_seconds)))

    def job(self, job_id: str) -> Job:
        """Return the handle of a job that was started before, by its id."""
        return Job(self._run, self._box.job(job_id))

    def jobs(self) -> list[JobInfo]:
        """Return the jobs that the sandbox knows, ended ones too."""
        return self._run(self._box.jobs)

    def tools(self) -> list[Tool]:
        """Return the sandbox's own tools, by the names that `call` takes."""
        return self._run(self._box.tools)

    def call(
        self,
        tool: str,
        /,
        *,
        arguments: Mapping[str, Any] | None = None,
        timeout_seconds: float | None = None,
        on_progress: OnProgress | None = None,
        **named: Any,
    ) -> CallResult:
        """Call one of the sandbox's tools, once."""
        merged = {**(arguments or {}), **named}
        return self._run(
            lambda: self._box.call(tool, arguments=merged, timeout_seconds=timeout_seconds, on_progress=on_progress)
        )

    def extend(self, seconds: float) -> SandboxInfo:
        """Let the sandbox live for `seconds` from now."""
        return self._run(lambda: self._box.extend(seconds))

    def logs(self, *, tail_bytes: int = 65_536) -> str:
        """Return the last of what the sandbox's main process wrote."""
        return self._run(lambda: self._box.logs(tail_bytes=tail_bytes))

    def destroy(self) -> None:
        """End the sandbox with everything in it. Idempotent."""
        self._run(self._box.destroy)

    def aclose(self) -> None:
        """Drop this handle; the sandbox lives on."""
        self._run(self._box.aclose)

    def __repr__(self) -> str:
        return repr(self._box)


class Files:
    """`ash_mcp.Files` without `await`."""

    def __init__(self, run: Run, inner: files.Files) -> None:
        self._run = run
        self._files = inner

    def read(self, path: str, *, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return a text file."""
        return self._run(lambda: self._files.read(path, encoding=encoding, errors=errors))

    def read_bytes(self, path: str) -> bytes:
        """Return the bytes of a file."""
        return self._run(lambda: self._files.read_bytes(path))

    def write(self, path: str, data: str | bytes, *, mode: int | None = None) -> int:
        """Write a file anew and return how many bytes it has."""
        return self._run(lambda: self._files.write(path, data, mode=mode))

    def list(self, path: str = ".") -> list[FileEntry]:
        """Return what is in a directory."""
        return self._run(lambda: self._files.list(path))

    def stat(self, path: str) -> FileEntry:
        """Return what is known of one path."""
        return self._run(lambda: self._files.stat(path))

    def exists(self, path: str) -> bool:
        """Say whether there is anything at `path`."""
        return self._run(lambda: self._files.exists(path))

    def mkdir(self, path: str, *, parents: bool = True) -> None:
        """Make a directory."""
        self._run(lambda: self._files.mkdir(path, parents=parents))

    def move(self, source: str, destination: str) -> None:
        """Rename a file or directory."""
        self._run(lambda: self._files.move(source, destination))

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, or with `recursive` a directory and all in it."""
        self._run(lambda: self._files.remove(path, recursive=recursive))

    def upload(self, source: str | os.PathLike[str], path: str, *, on_bytes: OnBytes | None = None) -> int:
        """Copy a local file into the sandbox and return its size."""
        return self._run(lambda: self._files.upload(source, path, on_bytes=on_bytes))

    def download(self, path: str, destination: str | os.PathLike[str], *, on_bytes: OnBytes | None = None) -> int:
        """Copy a file of the sandbox here and return its size."""
        return self._run(lambda: self._files.download(path, destination, on_bytes=on_bytes))


class Job:
    """`ash_mcp.Job` without `await`; `for chunk in job` yields its output from the start."""

    def __init__(self, run: Run, job: jobs.Job) -> None:
        self._run = run
        self._job = job
        self.id = job.id

    def read(self, offset: int = 0, *, limit: int = jobs.READ_BYTES, wait_seconds: float = 0.0) -> JobOutput:
        """Return output from `offset` on, and how the job stands."""
        return self._run(lambda: self._job.read(offset, limit=limit, wait_seconds=wait_seconds))

    def write(self, data: bytes | str = b"", *, eof: bool = False) -> None:
        """Write to the job's stdin, and with `eof` close it."""
        self._run(lambda: self._job.write(data, eof=eof))

    def signal(self, name: str = "TERM") -> None:
        """Send a signal to the job's whole process group."""
        self._run(lambda: self._job.signal(name))

    def wait(self, *, timeout_seconds: float | None = None) -> JobResult:
        """Wait until the job has ended."""
        return self._run(lambda: self._job.wait(timeout_seconds=timeout_seconds))

    def stop(self, *, grace_seconds: float = 2.0) -> JobResult:
        """End the job: SIGTERM, and SIGKILL after the grace."""
        return self._run(lambda: self._job.stop(grace_seconds=grace_seconds))

    def output(self) -> OutputStream:
        """Return the job's output from its start, as it comes."""
        return OutputStream(self._run, self._job.output())

    def __iter__(self) -> OutputStream:
        return self.output()

    def __repr__(self) -> str:
        return repr(self._job)


class OutputStream:
    """`ash_mcp.OutputStream` without `await`: an iterator of `Chunk`s and a context manager."""

    def __init__(self, run: Run, stream: jobs.OutputStream) -> None:
        self._run = run
        self._stream = stream

    @property
    def result(self) -> JobResult:
        return self._stream.result

    def __enter__(self) -> Self:
        self._run(self._stream.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.aclose()

    def aclose(self) -> None:
        """Stop the command if it still runs. Idempotent."""
        self._run(self._stream.aclose)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        chunk = self._run(self._next)
        if chunk is None:
            raise StopIteration
        return chunk

    async def _next(self) -> Chunk | None:
        # StopAsyncIteration cannot travel out of the loop's thread as itself.
        try:
            return await self._stream.__anext__()
        except StopAsyncIteration:
            return None
