"""`ash exec`: run a command in a sandbox, with its streams, its exit code and Ctrl-C passed through."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

import typer

from ash_mcp.cli.context import Cli, SessionArgument
from ash_mcp.cli.output import complain, emit_json
from ash_mcp.cli.piping import Ended, input_waits, run_piped
from ash_mcp.cli.shell import show_new
from ash_mcp.cli.values import one_command, read_duration, read_pairs
from ash_mcp.results import ExecResult

__all__ = ["exec_command"]

TIMED_OUT: Final = 124
"""The exit code that timeout(1) uses."""

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
    stdin: Annotated[
        bool | None,
        typer.Option(
            "--stdin/--no-stdin", "-i/-n", help="Pass standard input on to it; -n: and do not say when it was not."
        ),
    ] = None,
    tty: Annotated[
        bool, typer.Option("--tty", "-t", help="On a terminal of its own, with -i; Enter ~ . detaches.")
    ] = False,
    user: Annotated[str | None, typer.Option("--user", "-u", help="Run it as this user of the sandbox.")] = None,
) -> None:
    """Run a command in a sandbox as if it ran here.

    Its output streams as it comes and its exit code becomes that of ash. Standard input goes to it with -i only, as
    with docker and kubectl; else it reads the end of its input at once. Ctrl-C interrupts it and its children. With
    --json its result is printed once it ended. With -it it has a terminal, as with `ash shell`.
    """
    if tty:
        if cli.as_json or limit is not None or stdin is False:
            raise typer.BadParameter("--tty goes with neither --json, --timeout nor -n")
        await show_new(cli, session, one_command(command or []), cwd=cwd, env=env, user=user)
    asked: dict[str, Any] = {
        "timeout_seconds": read_duration(limit) if limit is not None else None,
        "cwd": cwd,
        "env": read_pairs(env or (), "a variable", variables=True) or None,
        "user": user,
    }
    run = one_command(command or [])
    async with cli.sandbox(session) as box:
        if cli.as_json:
            asked["timeout_seconds"] = asked["timeout_seconds"] or _PLAIN_SECONDS
            result = await box.exec(run, stdin=_whole_stdin() if stdin else None, **asked)
            emit_json(_shape(result))
            raise typer.Exit(_code(result))
        ended = await run_piped(box, run, stdin=bool(stdin), **asked)
    if stdin is None and input_waits():
        complain("what came on standard input was not passed on; -i passes it, -n omits this line")
    if ended.lost_bytes:
        complain(f"{ended.lost_bytes} bytes of the output were lost: they came faster than they were read here")
    if ended.interrupted_by is not None:
        raise typer.Exit(128 + ended.interrupted_by)
    raise typer.Exit(_code(ended) or (1 if ended.lost_bytes else 0))


def _code(result: ExecResult | Ended) -> int:
    if result.timed_out:
        return TIMED_OUT
    return result.exit_code if result.exit_code is not None else 1


def _whole_stdin() -> bytes | None:
    """Return what is on standard input to its end, or None where it is closed."""
    if sys.stdin is None:
        return None
    with open(0, "rb", closefd=False) as stdin:
        return stdin.read()


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
