"""Tools of the terminal: commands, their history, the working directory."""

from __future__ import annotations

import datetime
from typing import Annotated, Any

from fastmcp import FastMCP
from fastmcp.tools.base import ToolResult
from pydantic import BaseModel, Field

from ash_recipes.general.answers import answer, tool
from ash_recipes.general.terminal import Remembered, Terminal
from ash_recipes.runner.execution import Execution

__all__ = ["add"]


class CommandResult(BaseModel):
    exit_code: Annotated[int, Field(description="0 means success; 128 and the signal's number for a killed command")]
    stdout: str
    stderr: str
    duration_seconds: float
    timed_out: bool
    truncated: Annotated[bool, Field(description="Whether the middle of an output was left out")]
    stdout_bytes: Annotated[int, Field(description="How much was written in all")]
    stderr_bytes: int
    output_file: Annotated[str | None, Field(description="Where the whole output stands when truncated")] = None
    cwd: Annotated[str, Field(description="The working directory after the command")]


class HistoryEntry(BaseModel):
    timestamp: str
    command: str
    success: bool
    exit_code: int


class History(BaseModel):
    commands: list[HistoryEntry]


class Directory(BaseModel):
    path: str


def add(server: FastMCP[Any], terminal: Terminal) -> None:
    """Add the tools that run commands in `terminal`."""
    _add_commands(server, terminal)
    _add_places(server, terminal)


def _add_commands(server: FastMCP[Any], terminal: Terminal) -> None:
    @tool(
        server,
        "terminal-controller_execute_command",
        title="Run a command",
        output=CommandResult,
    )
    async def execute_command(
        command: Annotated[str, Field(description="What bash runs; several lines and here-documents are fine")],
        timeout: Annotated[  # noqa: ASYNC109 (a name that callers know)
            float, Field(gt=0, le=86_400, description="Seconds after which it and all that it started is ended")
        ] = 30,
        user: Annotated[
            str | None, Field(description="Run it as this user of the sandbox; such a command leaves no state behind")
        ] = None,
    ) -> ToolResult:
        """Run a command with bash in the sandbox and return its output and exit code.

        The working directory and exported variables last until the next call; other variables, functions and options
        do not. Standard input is closed. The start and the end of a long output are shown, and the whole of it is
        kept in a file. For servers and other things that keep running, use terminal-controller_start_job.
        """
        done = await terminal.execute(command, timeout, user)
        shape = CommandResult(**_facts(done), cwd=str(terminal.cwd))
        return answer(_describe(done, timeout), shape)


def _add_places(server: FastMCP[Any], terminal: Terminal) -> None:
    @tool(
        server,
        "terminal-controller_get_command_history",
        title="Command history",
        output=History,
    )
    async def get_command_history(
        count: Annotated[int, Field(ge=1, le=50, description="How many of the last commands")] = 10,
    ) -> ToolResult:
        """Return the last commands of this terminal, oldest first, with whether each succeeded."""
        recent = list(terminal.history)[-count:]
        shape = History(commands=[_entry(command) for command in recent])
        if not recent:
            return answer("No command execution history.", shape)
        lines = [
            f"{number}. [{'✓' if entry.success else '✗'}] {entry.timestamp}: {entry.command}"
            for number, entry in enumerate(shape.commands, 1)
        ]
        return answer(f"Recent {len(recent)} command history:\n\n" + "\n".join(lines) + "\n", shape)

    @tool(
        server,
        "terminal-controller_get_current_directory",
        title="Working directory",
        output=Directory,
    )
    async def get_current_directory() -> ToolResult:
        """Return the terminal's working directory."""
        return answer(str(terminal.cwd), Directory(path=str(terminal.cwd)))

    @tool(
        server,
        "terminal-controller_change_directory",
        title="Change directory",
        output=Directory,
    )
    async def change_directory(
        path: Annotated[str, Field(description="Absolute, relative to the working directory, or from ~")],
    ) -> ToolResult:
        """Change the terminal's working directory, for commands, jobs and relative paths."""
        found = terminal.change_directory(path)
        return answer(f"Switched to directory: {found}", Directory(path=str(found)))


def _facts(done: Execution) -> dict[str, Any]:
    facts = done.to_json()
    return {name: facts[name] for name in CommandResult.model_fields if name in facts}


def _entry(command: Remembered) -> HistoryEntry:
    shown = command.command if len(command.command) <= 2000 else command.command[:1999] + "…"
    return HistoryEntry(
        timestamp=command.timestamp, command=shown, success=command.success, exit_code=command.exit_code
    )


def _describe(done: Execution, timeout: float) -> str:
    """Return what a model reads, in the form that clients of the terminal-controller package know."""
    duration = datetime.timedelta(seconds=done.duration_seconds)
    stdout, stderr = done.stdout.text(), done.stderr.text()
    if done.timed_out:
        stderr += (
            f"{'' if stderr.endswith(chr(10)) or not stderr else chr(10)}Command timed out after {timeout:g} seconds"
        )
    if done.exit_code == 0 and not done.timed_out:
        told = f"Command executed successfully (duration: {duration})\n\n"
        told += f"Output:\n{stdout}\n" if stdout else "Command had no output.\n"
        told += f"\nWarnings/Info:\n{stderr}" if stderr else ""
    else:
        told = f"Command execution failed (duration: {duration})\n"
        told += f"\nOutput:\n{stdout}\n" if stdout else ""
        told += f"\nError:\n{stderr}" if stderr else ""
        told += f"\nReturn code: {done.exit_code}"
    if done.truncated:
        total = done.stdout.left_out + done.stderr.left_out
        where = (
            f"the whole output is in {done.output_file}" if done.output_file else "the disk could not hold the rest"
        )
        told += f"\n\n[{total} bytes were left out; {where}]"
    return told
