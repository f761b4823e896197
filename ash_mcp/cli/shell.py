"""`ash shell`, and `ash exec -it`: a terminal of a sandbox shown in this one."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import anyio
import anyio.to_thread
import typer

from ash_mcp.cli import console
from ash_mcp.cli.context import Cli, SessionArgument, leaf
from ash_mcp.cli.output import complain, note
from ash_mcp.cli.values import read_pairs
from ash_mcp.errors import AshError, TransportError

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from ash_mcp.pty import Pty
    from ash_mcp.sandbox import Command

__all__ = ["shell", "show_new"]

_READ_BYTES: Final = 16 * 1024
_WAITING_PIECES: Final = 64
"""How much of what is typed may wait for the sandbox while `~.` is still heard."""
_LAST_SECONDS: Final = 1.0
_TELL_SECONDS: Final = 2.0
"""How long a cut connection may take before it is told, which disturbs what is on the screen."""
_PASSED_VARIABLES: Final = ("TERM", "COLORTERM", "LANG")
_SIGNALS: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


async def shell(
    cli: Cli,
    session: SessionArgument,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND]", help="After --; the sandbox's shell if absent.")
    ] = None,
    attach: Annotated[
        str | None, typer.Option("--attach", metavar="ID", help="Come back to a terminal that was detached from.")
    ] = None,
    cwd: Annotated[str | None, typer.Option(help="Where to run it; the workspace if absent.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="K=V", help="Environment variable.")] = None,
    user: Annotated[str | None, typer.Option("--user", "-u", help="Run it as this user of the sandbox.")] = None,
) -> None:
    """Open a terminal in a sandbox.

    The exit code is that of the shell. Enter ~ . detaches and leaves it running for an hour; a connection that is cut
    is opened anew, with nothing lost.
    """
    if attach is not None and (command or cwd or env or user):
        raise typer.BadParameter("--attach comes back to what runs already; leave out the rest")
    if attach is None:
        run = command[0] if command and len(command) == 1 else command or None
        await show_new(cli, session, run, cwd=cwd, env=env, user=user)
        return
    _require_terminal(cli)
    async with cli.sandbox(session) as box:
        rows, columns = console.size()
        await _show_to_end(box.attach_pty(attach, rows=rows, columns=columns), session)


async def show_new(
    cli: Cli,
    session: str,
    command: Command | None,
    *,
    cwd: str | None,
    env: Sequence[str] | None,
    user: str | None,
) -> None:
    """Run a command on a terminal that is shown in this one, and leave with its exit code."""
    variables = {name: os.environ[name] for name in _PASSED_VARIABLES if os.environ.get(name)}
    variables |= read_pairs(env or (), "a variable", variables=True)
    _require_terminal(cli)
    async with cli.sandbox(session) as box:
        rows, columns = console.size()
        pty = box.pty(command, rows=rows, columns=columns, cwd=cwd, env=variables, user=user)
        await _show_to_end(pty, session)


def _require_terminal(cli: Cli) -> None:
    if cli.as_json:
        raise typer.BadParameter("a terminal is not JSON; `ash exec --json` runs a command without one")
    if not console.is_terminal():
        raise typer.BadParameter("standard input and output are no terminal here; `ash exec -i` does without one")


@dataclass(slots=True)
class _Left:
    """How the terminal was left."""

    interrupted_by: int | None = None
    error: AshError | None = None


async def _show_to_end(pty: Pty, session: str) -> None:
    left, modes = _Left(), console.Modes()
    async with pty:
        with console.raw():
            try:
                await _show(pty, left, modes)
            except Exception as exc:
                error = leaf(exc)
                if not isinstance(error, AshError):
                    raise
                left.error = error
            finally:
                _write_all(modes.undo() + (b"\r\n" if pty.exit_code is None else b""))
        if pty.exit_code is None:
            await pty.detach()
    if left.error is not None:
        complain(left.error.message)
    if pty.exit_code is not None:
        raise typer.Exit(pty.exit_code)
    if left.error is None or isinstance(left.error, TransportError):
        note(f"ash: `ash shell {session} --attach {pty.id}` comes back to it")
    if left.error is not None:
        raise typer.Exit(1)
    raise typer.Exit(0 if left.interrupted_by is None else 128 + left.interrupted_by)


async def _show(pty: Pty, left: _Left, modes: console.Modes) -> None:
    """Pass both ways until the command has ended, or this terminal is left."""
    send, receive = anyio.create_memory_object_stream[bytes](_WAITING_PIECES)
    cut, typed = anyio.Event(), anyio.Event()

    def on_reconnect(_: AshError) -> None:
        nonlocal cut
        cut.set()
        cut = anyio.Event()

    async def tell_of_cuts() -> None:
        while True:
            await cut.wait()
            await anyio.sleep(_TELL_SECONDS)
            if not pty.is_connected:
                _write_all(b"\r\n[ash: the connection is cut; connecting again, Enter ~ . detaches]\r\n")

    pty.on_reconnect = on_reconnect
    with anyio.open_signal_receiver(*_SIGNALS, signal.SIGWINCH) as signals:
        async with send, receive, anyio.create_task_group() as group:

            async def obey() -> None:
                async for number in signals:
                    if number == signal.SIGWINCH:
                        await pty.resize(*console.size())
                        continue
                    left.interrupted_by = int(number)
                    group.cancel_scope.cancel()
                    return

            async def read_keys() -> None:
                await _read_keys(send)
                await send.aclose()
                with anyio.move_on_after(_LAST_SECONDS):  # what was typed before the escape
                    await typed.wait()
                group.cancel_scope.cancel()

            async def type_all() -> None:
                await _type(pty, receive)
                typed.set()

            group.start_soon(obey)
            group.start_soon(read_keys)
            group.start_soon(type_all)
            group.start_soon(tell_of_cuts)
            async for data in pty:
                modes.feed(data)
                # In a thread: a terminal that is slow must hold up neither keys nor signals.
                await anyio.to_thread.run_sync(_write_all, data, abandon_on_cancel=True)
            group.cancel_scope.cancel()


async def _read_keys(send: MemoryObjectSendStream[bytes]) -> None:
    """Hand over what is typed, until the escape comes or the terminal is gone."""
    escape = console.Escape()
    while True:
        await anyio.wait_readable(0)
        try:
            data = os.read(0, _READ_BYTES)
        except OSError:
            return
        if not data:
            return
        passed, is_escape = escape.feed(data)
        if passed:
            await send.send(passed)
        if is_escape:
            return


async def _type(pty: Pty, receive: MemoryObjectReceiveStream[bytes]) -> None:
    async for data in receive:
        await pty.write(data)


def _write_all(data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(1, left) :]
