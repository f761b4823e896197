"""The WebSocket at `/_ash/terminal`: starts a pty or attaches to one, and shows it to one viewer (docs/terminal.md).

Binary messages are bytes, of the terminal's output one way and of its input the other; text messages are JSON objects
with a `type`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any, Final, cast

import anyio
from starlette.types import Receive, Scope, Send

from ash_recipes.runner import arguments as args
from ash_recipes.runner.context import Context, check_variables
from ash_recipes.runner.files import Files
from ash_recipes.runner.jobs import signal_number
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.processes import Command
from ash_recipes.runner.ptys import Pty, hang_up

__all__ = ["TERMINAL_PATH", "PtyDoor"]

TERMINAL_PATH: Final = "/_ash/terminal"
FIRST_SECONDS: Final = 30.0
"""How long a new connection may take to say what it wants."""
SEND_BYTES: Final = 65_536

ENDED: Final = 1000
TAKEN_OVER: Final = 4001
REFUSED: Final = 4002
"""Close codes: the command has ended; another viewer has attached; there is no such pty, or a message is wrong."""


class _Left(Exception):
    """The viewer has closed the connection."""


class PtyDoor:
    """Answers the WebSockets of one sandbox."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._files = Files(context.workspace)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        await receive()  # its connect
        await send({"type": "websocket.accept"})
        try:
            with anyio.fail_after(FIRST_SECONDS):
                first = await _next(receive)
            await self._serve(first, receive, send)
        except Problem as exc:
            await _say(send, "error", **exc.to_json())
            await _close(send, REFUSED)
        except TimeoutError:
            await _close(send, REFUSED)
        except (_Left, OSError):
            return

    async def _serve(self, first: bytes | Mapping[str, Any], receive: Receive, send: Send) -> None:
        kind, given = _typed(first)
        if kind == "start":
            asked = args.check(args.PtyStart, given)
            pty, offset = self._start(asked), 0
        elif kind == "attach":
            attach = args.check(args.PtyAttach, given)
            pty = self._context.ptys.get(attach.pty)
            offset = pty.log.dropped if attach.offset is None else min(attach.offset, pty.log.total)
            if attach.rows is not None and attach.columns is not None:
                pty.process.resize(attach.rows, attach.columns)
        else:
            raise Problem("bad_request", "the first message is of type start or attach")
        with anyio.CancelScope() as viewer:
            pty.attach(viewer, offset)
            try:
                await _say(send, "attached", pty=pty.id, offset=offset, input=pty.input_total)
                await _converse(pty, offset, receive, send)
            finally:
                pty.detach(viewer)
        if viewer.cancelled_caught:
            await _close(send, TAKEN_OVER)

    def _start(self, asked: args.PtyStart) -> Pty:
        check_variables(asked.env)
        env = self._context.environment.variables(asked.env)
        command = asked.command if asked.command is not None else _shell(env)
        if any("\0" in word for word in ([command] if isinstance(command, str) else command)):
            raise Problem("bad_request", "a command cannot hold a NUL character")
        env.setdefault("TERM", "xterm-256color")
        return self._context.ptys.start(
            command,
            cwd=self._files.resolve(asked.cwd) if asked.cwd is not None else self._context.workspace,
            env=env,
            size=(asked.rows, asked.columns),
            detached_seconds=asked.detached_seconds,
            key=asked.key,
            user=self._context.user_named(asked.user),
        )


def _shell(env: Mapping[str, str]) -> Command:
    for name in (env.get("SHELL", ""), "bash", "sh"):
        if name and shutil.which(name, path=env.get("PATH")) is not None:
            return [name]
    raise Problem("spawn_failed", "there is no shell in this sandbox; say a command")


async def _converse(pty: Pty, offset: int, receive: Receive, send: Send) -> None:
    """Show the terminal and take input, until the command ends or the viewer leaves."""
    failed: list[Problem] = []
    async with anyio.create_task_group() as group:

        async def take() -> None:
            try:
                await _take_input(pty, receive)
            except _Left:
                pass
            except Problem as exc:
                failed.append(exc)
            group.cancel_scope.cancel()

        group.start_soon(take)
        try:
            await _show(pty, offset, send)
        except OSError:
            pass  # the viewer has left
        group.cancel_scope.cancel()
    if failed:
        raise failed[0]


async def _show(pty: Pty, offset: int, send: Send) -> None:
    """Send the output from `offset` on, and at its end how the command ended."""
    at = offset
    while True:
        chunks, _ = pty.log.read(at, SEND_BYTES)
        for chunk in chunks:
            if chunk.offset > at:
                await _say(send, "lost", bytes=chunk.offset - at)
            await send({"type": "websocket.send", "bytes": chunk.data})
            at = pty.shown_to = chunk.offset + len(chunk.data)
            pty.notify()
        if chunks:
            continue
        if pty.exit_code is not None:
            await _say(send, "exited", exit_code=pty.exit_code)
            await _close(send, ENDED)
            return
        await pty.changed.wait()


async def _take_input(pty: Pty, receive: Receive) -> None:
    """Take what the viewer types and asks for, until it leaves."""
    while True:
        message = await _next(receive)
        if isinstance(message, bytes):
            await pty.type(message)
        else:
            await _obey(pty, message)


async def _obey(pty: Pty, message: Mapping[str, Any]) -> None:
    kind, given = _typed(message)
    if kind == "resize":
        size = args.check(args.PtyResize, given)
        pty.process.resize(size.rows, size.columns)
    elif kind == "signal":
        pty.process.signal(signal_number(args.check(args.PtySignal, given).signal))
    elif kind == "hang_up":
        await hang_up(pty)
    else:
        raise Problem("bad_request", f"a message of type {kind[:40]!r} is not known: resize, signal or hang_up")


def _typed(message: bytes | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(message, bytes):
        raise Problem("bad_request", "the first message is JSON: what to start, or what to attach to")
    given = dict(message)
    return str(given.pop("type", "")), given


async def _next(receive: Receive) -> bytes | Mapping[str, Any]:
    """Return the viewer's next message.

    Raises:
        Problem: It is text, and no JSON object.
    """
    message = await receive()
    if message["type"] != "websocket.receive":
        raise _Left
    if message.get("bytes") is not None:
        return message["bytes"]
    try:
        shape = json.loads(message["text"])
    except (ValueError, RecursionError):
        shape = None
    if not isinstance(shape, dict):
        raise Problem("bad_request", "a text message is one JSON object")
    return cast("dict[str, Any]", shape)


async def _say(send: Send, kind: str, **fields: Any) -> None:
    await send({"type": "websocket.send", "text": json.dumps({"type": kind, **fields})})


async def _close(send: Send, code: int) -> None:
    await send({"type": "websocket.close", "code": code})
