"""Tools for commands that run in the background."""

from __future__ import annotations

import signal
from typing import Annotated, Any, Literal

import anyio
from fastmcp import FastMCP
from fastmcp.tools.base import ToolResult
from pydantic import BaseModel, Field

from ash_recipes.general.answers import answer, tool
from ash_recipes.general.terminal import Terminal
from ash_recipes.runner.context import current
from ash_recipes.runner.jobs import TERM_SECONDS, Job
from ash_recipes.runner.output import drop_partial_character
from ash_recipes.runner.problems import Problem

__all__ = ["add"]

READ_BYTES = 32_768

JobName = Annotated[str, Field(description="What start_job returned, such as job-1")]


class JobState(BaseModel):
    job: str
    command: str
    state: Literal["running", "exited"]
    exit_code: int | None = None
    timed_out: bool = False


class JobOutput(JobState):
    output: Annotated[str, Field(description="Standard output and error, in the order in which they came")]
    next_offset: Annotated[int, Field(description="Where to read on")]
    total_bytes: int
    lost_bytes: Annotated[int, Field(description="How many of the oldest bytes are no longer kept")]


class JobStates(BaseModel):
    jobs: list[JobState]


class Written(BaseModel):
    job: str
    written_bytes: int


def add(server: FastMCP[Any], terminal: Terminal) -> None:
    """Add the tools for background jobs."""
    _add_start_and_read(server, terminal)
    _add_write_and_stop(server)


def _add_start_and_read(server: FastMCP[Any], terminal: Terminal) -> None:
    @tool(
        server,
        "terminal-controller_start_job",
        title="Start a background job",
        output=JobState,
    )
    async def start_job(
        command: Annotated[str, Field(description="What bash runs")],
        stdin: Annotated[bool, Field(description="Keep its standard input open for write_job")] = False,
        timeout: Annotated[  # noqa: ASYNC109 (as in execute_command)
            float | None, Field(gt=0, description="Seconds after which it is ended; null for never")
        ] = None,
    ) -> ToolResult:
        """Start a command that goes on running, such as a server or a long build, and return its job name.

        It starts in the terminal's working directory with its exported variables, and changes neither.
        """
        job = terminal.start_job(command, stdin=stdin, timeout_seconds=timeout)
        return answer(f"Started {job.id}. Read its output with read_job.", _state(job))

    @tool(server, "terminal-controller_read_job", title="Read a background job", output=JobOutput)
    async def read_job(
        job: JobName,
        offset: Annotated[int, Field(ge=0, description="The next_offset of the last answer; 0 for the start")] = 0,
        wait: Annotated[float, Field(ge=0, le=30, description="Seconds to wait for output if there is none yet")] = 0,
    ) -> ToolResult:
        """Return what a job has written since `offset`, and whether it still runs."""
        found = current().jobs.get(job)
        page = await found.read(offset, READ_BYTES, wait)
        raw = b"".join(chunk.data for chunk in page.chunks)
        # A character may be cut where the page ends; it comes whole with the next one.
        more_to_come = found.running or page.next_offset < found.log.total
        whole = (drop_partial_character(raw) or raw) if more_to_come else raw
        text = whole.decode("utf-8", "replace")
        shape = JobOutput(
            **_state(found).model_dump(),
            output=text,
            next_offset=page.next_offset - (len(raw) - len(whole)),
            total_bytes=found.log.total,
            lost_bytes=max(0, found.log.dropped - offset),
        )
        return answer(f"{_describe(shape)} Read on from offset {shape.next_offset}.\n\n{text}", shape)


def _add_write_and_stop(server: FastMCP[Any]) -> None:
    @tool(server, "terminal-controller_write_job", title="Write to a background job", output=Written)
    async def write_job(
        job: JobName,
        text: Annotated[str, Field(description="What to write; end a line with a newline")] = "",
        eof: Annotated[bool, Field(description="Close its standard input afterwards")] = False,
    ) -> ToolResult:
        """Write to the standard input of a job that was started with stdin=true."""
        found = current().jobs.get(job)
        if not found.process.takes_input:
            raise Problem("bad_request", f"{job} has no open standard input; start it with stdin=true")
        written = await found.process.write(text.encode("utf-8", "surrogatepass"))
        if eof:
            await found.process.close_stdin()
        return answer(f"Wrote {written} bytes to {job}.", Written(job=job, written_bytes=written))

    @tool(
        server,
        "terminal-controller_stop_job",
        title="Stop a background job",
        output=JobState,
    )
    async def stop_job(job: JobName) -> ToolResult:
        """End a job and everything that it started; its output can still be read."""
        found = current().jobs.get(job)
        found.signal(signal.SIGTERM)
        with anyio.move_on_after(TERM_SECONDS):
            await found.ended.wait()
        found.signal(signal.SIGKILL)
        with anyio.move_on_after(5):
            await found.ended.wait()
        return answer(_describe(_state(found)), _state(found))

    @tool(server, "terminal-controller_list_jobs", title="List background jobs", output=JobStates)
    async def list_jobs() -> ToolResult:
        """Return the jobs of this sandbox, oldest first."""
        shape = JobStates(jobs=[_state(job) for job in current().jobs.list()])
        lines = [f"{_describe(job)} {job.command}" for job in shape.jobs]
        return answer("\n".join(lines) or "No jobs.", shape)


def _state(job: Job) -> JobState:
    command = job.command if isinstance(job.command, str) else " ".join(job.command)
    return JobState(
        job=job.id,
        command=command if len(command) <= 500 else command[:499] + "…",
        state="running" if job.running else "exited",
        exit_code=job.exit_code,
        timed_out=job.timed_out,
    )


def _describe(job: JobState) -> str:
    if job.state == "running":
        return f"{job.job} is running."
    return f"{job.job} has ended with exit code {job.exit_code}{' (timed out)' if job.timed_out else ''}."
