"""`ash exec`: a command in a sandbox as if it ran here: its streams, its exit code, Ctrl-C."""

from __future__ import annotations

import os
from typing import Annotated, Any, Final

import typer

from ash_mcp.cli.context import Cli, SessionArgument
from ash_mcp.cli.output import complain, emit_json
from ash_mcp.cli.piping import run_piped
from ash_mcp.cli.values import one_command, read_duration, read_pairs
from ash_mcp.results import ExecResult

__all__ = ["exec_command"]

TIMED_OUT: Final = 124
"""As timeout(1) says it."""

_PLAIN_SECONDS: Final = 24 * 3600.0
"""The bound of a command with --json that names none: its whole result is one answer."""


async def exec_command(
    cli: Cli,
    session: SessionArgument,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND", help="After --: one word is a line for bash, several are run without a shell."
        ),
    ] = None,
    limit: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="Kill it after this; exit code 124.")
    ] = None,
    cwd: Annotated[str | None, typer.Option(help="Where to run it; the workspace if absent.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="K=V", help="Environment variable.")] = None,
) -> None:
    """Run a command in a sandbox as if it ran here.

    Its output streams as it comes and its exit code becomes that of ash. Standard input goes to it. Ctrl-C
    interrupts it and its children. With --json its result is printed once it ended.
    """
    asked: dict[str, Any] = {
        "timeout_seconds": read_duration(limit) if limit is not None else None,
        "cwd": cwd,
        "env": read_pairs(env or (), "a variable", variables=True) or None,
    }
    run = one_command(command or [])
    async with cli.sandbox(session) as box:
        if cli.as_json:
            asked["timeout_seconds"] = asked["timeout_seconds"] or _PLAIN_SECONDS
            result = await box.exec(run, stdin=_whole_stdin(), **asked)
            emit_json(_shape(result))
            raise typer.Exit(TIMED_OUT if result.timed_out else _code(result.exit_code))
        ended = await run_piped(box, run, **asked)
    if ended.lost_bytes:
        complain(f"{ended.lost_bytes} bytes of the output were lost: they came faster than they were read here")
    if ended.interrupted_by is not None:
        raise typer.Exit(128 + ended.interrupted_by)
    code = TIMED_OUT if ended.timed_out else _code(ended.exit_code)
    raise typer.Exit(code or (1 if ended.lost_bytes else 0))


def _code(exit_code: int | None) -> int:
    """Return an exit code as shells show it: 128 and the signal's number for a command that a signal ended."""
    if exit_code is None:
        return 1
    return 128 - exit_code if exit_code < 0 else exit_code


def _whole_stdin() -> bytes | None:
    """Return what is on standard input, unless a person sits there or it is closed."""
    try:
        if os.isatty(0):
            return None
        with open(0, "rb", closefd=False) as stdin:
            return stdin.read()
    except OSError:
        return None


def _shape(result: ExecResult) -> dict[str, Any]:
    return {
        "exit_code": result.exit_code,
        "timed_out": result.timed_out,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "stdout_bytes": result.stdout_bytes,
        "stderr_bytes": result.stderr_bytes,
        "truncated": result.truncated,
        "output_file": result.output_file,
        "duration_seconds": result.duration_seconds,
    }
