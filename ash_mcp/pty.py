"""A command on a terminal in a sandbox: its output as bytes, its input, its size, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

import anyio

from ash_mcp._answers import Fields, runner_error
from ash_mcp._protocol import as_object
from ash_mcp._websocket import Closed, WebSocket
from ash_mcp.errors import AshError, Conflict, ConnectFailed, LocalProtocolError, SandboxRefused, StreamBroken

__all__ = ["Pty"]

_TAKEN_OVER: Final = 4001
_KEPT_INPUT_BYTES: Final = 256 * 1024
"""How much of what was typed is kept to be sent again: more than the hive and the sandbox can hold."""
_PIECE_BYTES: Final = 32 * 1024
_FIRST_SECONDS: Final = 2.0
"""How long the first connection is tried for: that no hive answers should be known soon."""
_LONGEST_DELAY_SECONDS: Final = 2.0
_CLEANUP_SECONDS: Final = 5.0


class Pty:
    """A command on a terminal of its own; `async for data in pty` yields its output, raw, until it ends.

    A connection that is cut is opened anew, with the output from where it was and what was typed meanwhile: `read` and
    `write` go on. Leaving the context ends a command that this object has started, unless it was detached from.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[WebSocket]],
        *,
        start: Mapping[str, Any] | None = None,
        pty_id: str | None = None,
        offset: int | None = None,
        size: tuple[int, int] | None = None,
        reconnect_seconds: float = 60.0,
    ) -> None:
        self._connect = connect
        self._start = start
        self._id = pty_id
        self._offset = offset
        self._size = size
        self._reconnect_seconds = reconnect_seconds
        self._owns = start is not None
        self._socket: WebSocket | None = None
        self._opening = anyio.Lock()
        self._typed_total: int | None = None
        """How many bytes were typed in all, by the sandbox's count; None before it was told."""
        self._typed = bytearray()
        """The last of them."""
        self._lost = 0
        self._exit_code: int | None = None
        self._is_over = False
        self.on_reconnect: Callable[[AshError], object] | None = None
        """Called with why, whenever the connection has been cut and is about to be opened anew."""

    @property
    def id(self) -> str:
        """By which it is attached to again.

        Raises:
            LocalProtocolError: It was not started yet.
        """
        if self._id is None:
            raise LocalProtocolError("the terminal is not started yet; enter it, read or write first")
        return self._id

    @property
    def offset(self) -> int:
        """How far its output was read, in bytes from its beginning."""
        return self._offset or 0

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._socket is not None

    @property
    def lost_bytes(self) -> int:
        """How much of the output was dropped before it was read: while nobody is attached a MiB is kept."""
        return self._lost

    @property
    def exit_code(self) -> int | None:
        """As in `ExecResult`; None while it runs."""
        return self._exit_code

    async def __aenter__(self) -> Self:
        await self._opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        data = await self.read()
        if not data:
            raise StopAsyncIteration
        return data

    async def read(self) -> bytes:
        """Return the next output as soon as there is any; nothing once the command has ended.

        Raises:
            Conflict: Another client has attached to this terminal.
            SandboxGone: The sandbox has ended.
            SandboxRefused: The sandbox has no such terminal, or no longer.
            TransportError: The hive could not be reached again in time.
        """
        while not self._is_over:
            socket = await self._opened()
            try:
                message = await socket.receive()
            except Closed as closed:
                if closed.code == _TAKEN_OVER:
                    await self._drop(socket)
                    raise Conflict("another client has attached to this terminal") from None
                await self._cut(socket, StreamBroken(f"the terminal was closed with code {closed.code}"))
                continue
            except StreamBroken as error:
                await self._cut(socket, error)
                continue
            if isinstance(message, bytes):
                self._offset = self.offset + len(message)
                if message:
                    return message
            else:
                await self._hear(_fields(message), socket)
        return b""

    async def write(self, data: bytes | str) -> None:
        """Type `data`. It waits while the command leaves much unread; what a cut connection has lost is sent again."""
        raw = data.encode() if isinstance(data, str) else data
        for start in range(0, len(raw), _PIECE_BYTES):
            piece = raw[start : start + _PIECE_BYTES]
            socket = await self._opened()
            assert self._typed_total is not None
            self._typed_total += len(piece)
            self._typed += piece
            del self._typed[:-_KEPT_INPUT_BYTES]
            try:
                await socket.send(piece)
            except StreamBroken as error:
                await self._cut(socket, error)
                await self._opened()  # which sends it again

    async def resize(self, rows: int, columns: int) -> None:
        """Give the terminal another size."""
        self._size = rows, columns
        await self._ask("resize", rows=rows, columns=columns)

    async def signal(self, name: str) -> None:
        """Send a signal, by its name without SIG, to what runs in the foreground."""
        await self._ask("signal", signal=name)

    async def wait(self) -> int | None:
        """Read the output to its end, and return the exit code."""
        while await self.read():
            pass
        return self._exit_code

    async def detach(self) -> None:
        """Leave it running; `Sandbox.attach_pty` comes back to it. The sandbox ends it if nobody does for long."""
        self._owns = False
        if self._socket is not None:
            await self._drop(self._socket)

    async def aclose(self) -> None:
        """Hang up, if this object has started the command and it still runs, and close the connection. Idempotent."""
        socket, owns, self._owns = self._socket, self._owns, False
        if socket is None:
            return
        with anyio.move_on_after(_CLEANUP_SECONDS, shield=True):
            if owns and not self._is_over:
                try:
                    await socket.send(json.dumps({"type": "hang_up"}))
                    while True:
                        await socket.receive()
                except (StreamBroken, Closed):
                    pass
        await self._drop(socket)

    async def _ask(self, kind: str, **fields: Any) -> None:
        if self._is_over:
            return
        socket = await self._opened()
        try:
            await socket.send(json.dumps({"type": kind, **fields}))
        except StreamBroken as error:
            await self._cut(socket, error)

    async def _hear(self, fields: Fields, socket: WebSocket) -> None:
        """Take one of the sandbox's text messages."""
        kind = fields.text("type")
        if kind == "exited":
            self._exit_code, self._is_over = fields.integer("exit_code"), True
            await self._drop(socket)
        elif kind == "lost":
            self._lost += fields.integer("bytes")
            self._offset = self.offset + fields.integer("bytes")
        elif kind == "error":
            await self._drop(socket)
            raise _refusal(fields)

    # The connection.

    async def _cut(self, socket: WebSocket, error: AshError) -> None:
        if self._socket is socket:
            if self.on_reconnect is not None:
                self.on_reconnect(error)
            await self._drop(socket)

    async def _drop(self, socket: WebSocket) -> None:
        if self._socket is socket:
            self._socket = None
        await socket.aclose()

    async def _opened(self) -> WebSocket:
        """Return the connection; where there is none, open one, again and again for `reconnect_seconds`."""
        async with self._opening:
            if self._socket is not None:
                return self._socket
            seconds = _FIRST_SECONDS if self._typed_total is None else self._reconnect_seconds
            deadline, delay = anyio.current_time() + seconds, 0.05
            while True:
                try:
                    self._socket = await self._open()
                    return self._socket
                except AshError as error:
                    may_pass = error.retryable or isinstance(error, ConnectFailed | StreamBroken)
                    if not may_pass or anyio.current_time() + delay > deadline:
                        raise
                await anyio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY_SECONDS)

    async def _open(self) -> WebSocket:
        socket = await self._connect()
        try:
            await socket.send(json.dumps(self._first()))
            message = await socket.receive()
            fields = _fields(message if isinstance(message, str) else "")
            if fields.text("type") == "error":
                raise _refusal(fields)
            self._id, self._offset = fields.text("pty"), fields.integer("offset")
            await self._type_again(socket, fields.integer("input"))
        except Closed as closed:
            await socket.aclose()
            raise StreamBroken(f"the terminal was closed with code {closed.code}") from None
        except BaseException:
            await socket.aclose()
            raise
        return socket

    def _first(self) -> dict[str, Any]:
        size = {} if self._size is None else dict(zip(("rows", "columns"), self._size, strict=True))
        if self._id is None:
            return {"type": "start", **(self._start or {}), **size}
        offset = {} if self._offset is None else {"offset": self._offset}
        return {"type": "attach", "pty": self._id, **offset, **size}

    async def _type_again(self, socket: WebSocket, arrived: int) -> None:
        """Send what was typed before and has not arrived."""
        if self._typed_total is None:
            self._typed_total = arrived
        missing = self._typed_total - arrived
        if missing > len(self._typed):
            raise SandboxRefused(f"the sandbox has lost {missing} bytes of what was typed")
        if missing > 0:
            await socket.send(bytes(self._typed[-missing:]))
        self._typed_total = max(self._typed_total, arrived)


def _fields(message: str) -> Fields:
    try:
        shape = as_object(json.loads(message))
    except (ValueError, RecursionError):
        shape = None
    return Fields(shape)


def _refusal(fields: Fields) -> AshError:
    return runner_error(fields.object("error"))
