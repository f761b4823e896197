"""The process of a Python session: started at its first use, asked one run at a time, interrupted when one is late."""

from __future__ import annotations

import json
import secrets
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import anyio

from ash_recipes.runner.context import Context
from ash_recipes.runner.output import Capture
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.processes import Process, Stream

__all__ = ["Ran", "Session"]

INTERPRETER = Path(__file__).with_name("interpreter.py")
TEXT_BYTES = 64_000
"""What is shown of the text of one run: its beginning and its end."""
INTERRUPT_SECONDS = 3.0
"""How long an interrupted run may take to end before its interpreter is killed."""
DRAIN_SECONDS = 2.0
ANSWER_BYTES = 4 * 1024 * 1024
_CHUNK = 65_536


@dataclass(frozen=True, slots=True)
class Ran:
    """What one run gave."""

    ok: bool
    """Whether it ended without an exception."""
    text: str
    pictures: Sequence[tuple[str, str]] = ()
    """The media type and the base64 of each."""
    pictures_left_out: int = 0
    timed_out: bool = False
    lost: str | None = None
    """Why the interpreter is a new one from here on, and all variables are gone."""


class _Output:
    """The text of one run, up to the mark that ends it."""

    def __init__(self, end: bytes) -> None:
        self._end = end
        self._last = b""
        self.text = Capture(TEXT_BYTES)
        self.ended = anyio.Event()

    def append(self, data: bytes) -> None:
        data = self._last + data
        before, mark, _ = data.partition(self._end)
        if mark:
            self._last = b""
            self.text.append(before)
            self.ended.set()
            return
        keep = len(self._end) - 1
        self._last = data[-keep:]
        self.text.append(data[:-keep])

    def whole(self) -> str:
        self.text.append(self._last)
        self._last = b""
        return self.text.clip().text()


class Session:
    """One interpreter, `python3` of the sandbox's own."""

    def __init__(self, context: Context, python: str = "python3") -> None:
        self._context = context
        self._python = python
        self._lock = anyio.Lock()
        self._process: Process | None = None
        self._socket: socket.socket | None = None
        self._output: _Output | None = None

    async def run(self, code: str, seconds: float) -> Ran:
        """Run code; a caller that leaves interrupts it.

        Raises:
            Problem: `spawn_failed`: there is no Python to start.
        """
        async with self._lock:
            if self._process is None or self._process.exited:
                await self._start()
            end = f"\0{secrets.token_hex(16)}\0"
            self._output = output = _Output(end.encode())
            timed_out, answer = False, None
            try:
                with anyio.move_on_after(seconds) as scope:
                    answer = await self._asked({"code": code, "end": end})
                timed_out = scope.cancelled_caught
            finally:
                if answer is None:
                    with anyio.CancelScope(shield=True):
                        answer = await self._interrupted() if timed_out or self._is_running() else None
            if answer is None:
                return await self._lost(output, timed_out)
            with anyio.move_on_after(DRAIN_SECONDS):
                await output.ended.wait()
            pictures = [(it["type"], it["data"]) for it in answer["pictures"]]
            return Ran(answer["ok"] and not timed_out, output.whole(), pictures, answer["left_out"], timed_out)

    async def restart(self) -> None:
        """End the interpreter; the next run starts another one."""
        async with self._lock:
            await self._end()

    def _is_running(self) -> bool:
        return self._process is not None and not self._process.exited

    async def _start(self) -> None:
        await self._end()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            command = (self._python, "-u", str(INTERPRETER), str(theirs.fileno()))
            try:
                process = Process(
                    ["sh", "-c", 'exec "$@" 2>&1', "sh", *command],
                    cwd=self._context.workspace,
                    env=self._context.environment.variables({"MPLBACKEND": "Agg"}),
                    on_data=self._written,
                    pass_fds=(theirs.fileno(),),
                )
            except Problem:
                ours.close()
                raise
        self._process, self._socket = process, ours
        self._context.jobs.adopt(process)
        self._context.jobs.tasks.start_soon(self._watch, process, ours)

    async def _watch(self, process: Process, ours: socket.socket) -> None:
        try:
            async with self._context.jobs.watched(process):
                await process.wait_exit()
            async with self._lock:  # whoever asks it has seen by then that it has ended
                pass
        finally:
            ours.close()

    def _written(self, stream: Stream, data: bytes) -> None:
        del stream
        if self._output is not None:
            self._output.append(data)

    async def _asked(self, request: dict[str, str]) -> dict[str, Any] | None:
        """Send a request and return the answer; None if the interpreter ended before."""
        assert self._socket is not None
        view = memoryview(json.dumps(request).encode() + b"\n")
        try:
            while view:
                await anyio.wait_writable(self._socket)
                view = view[self._socket.send(view) :]
            return await self._answer()
        except OSError:
            return None

    async def _answer(self) -> dict[str, Any] | None:
        assert self._socket is not None
        found = bytearray()
        while not found.endswith(b"\n"):
            await anyio.wait_readable(self._socket)
            data = self._socket.recv(_CHUNK)
            found += data
            if not data or len(found) > ANSWER_BYTES:
                return None
        try:
            answer: Any = json.loads(found)
        except ValueError:
            return None
        # Else the code wrote to a descriptor that is not its own.
        given = cast("dict[str, Any]", answer) if isinstance(answer, dict) else {}
        return given if {"ok", "pictures", "left_out"} <= given.keys() else None

    async def _interrupted(self) -> dict[str, Any] | None:
        """Interrupt the run and return its answer; None if it did not end."""
        if self._process is None:
            return None
        self._process.signal(signal.SIGINT)
        with anyio.move_on_after(INTERRUPT_SECONDS):
            try:
                return await self._answer()
            except OSError:
                return None
        return None

    async def _lost(self, output: _Output, timed_out: bool) -> Ran:
        process = self._process
        code = None
        if process is not None:
            with anyio.move_on_after(DRAIN_SECONDS):
                code = await process.wait()
        await self._end()
        why = "it did not stop when it was interrupted" if code is None else f"it ended with exit code {code}"
        return Ran(False, output.whole(), timed_out=timed_out, lost=why)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is not None:
            process.kill()
            with anyio.move_on_after(DRAIN_SECONDS):
                await process.wait_exit()
