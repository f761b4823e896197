"""A WebSocket over the SDK's HTTP client: its handshake is a request, and its frames pass on the same connection."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import anyio

from ash_mcp._protocol import parse_message
from ash_mcp._reading import read_body
from ash_mcp._verdict import Head, error_of_status
from ash_mcp.errors import RemoteProtocolError, SandboxRefused, StreamBroken

if TYPE_CHECKING:
    import httpx
    from websockets.frames import Frame

__all__ = ["Closed", "WebSocket"]

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""Of RFC 6455."""
_READ_BYTES: Final = 65_536
_MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
_MAX_REFUSAL_BYTES: Final = 64 * 1024
QUIET_SECONDS: Final = 15.0
"""After so long without a byte the other side is sent a ping; after twice as long it counts as gone."""
_CLOSE_SECONDS: Final = 2.0


class Closed(Exception):
    """The other side has closed the WebSocket properly."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"closed with code {code}")
        self.code = code


class WebSocket:
    """An open WebSocket. One task may receive while others send."""

    def __init__(self, response: httpx.Response) -> None:
        from websockets.protocol import Protocol, Side, State

        self._response = response
        self._stream: Any = response.extensions["network_stream"]
        self._frames = Protocol(Side.CLIENT, state=State.OPEN, max_size=_MAX_MESSAGE_BYTES)
        self._received: deque[str | bytes | Closed] = deque()
        self._parts: list[bytes] = []
        self._is_text = False
        self._is_reading = False
        self._sending = anyio.Lock()

    @classmethod
    async def open(cls, client: httpx.AsyncClient, url: str, headers: dict[str, str]) -> WebSocket:
        """Open a WebSocket; exceptions of httpx are the caller's to translate.

        Raises:
            AshError: The hive or the sandbox refused.
        """
        key = base64.b64encode(os.urandom(16))
        asked = {
            **headers,
            "connection": "Upgrade",
            "upgrade": "websocket",
            "sec-websocket-key": key.decode(),
            "sec-websocket-version": "13",
        }
        response = await client.send(client.build_request("GET", url, headers=asked), stream=True)
        try:
            await _check(response, key)
        except BaseException:
            with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                await response.aclose()
            raise
        return cls(response)

    async def send(self, message: str | bytes) -> None:
        """Send a message.

        Raises:
            StreamBroken: The connection is cut.
        """
        from websockets.exceptions import InvalidState

        try:
            if isinstance(message, str):
                self._frames.send_text(message.encode())
            else:
                self._frames.send_binary(message)
        except InvalidState as exc:
            raise StreamBroken("the other side is closing the connection") from exc
        await self._flush()

    async def receive(self) -> str | bytes:
        """Return the next message, and see to it that a dead connection is noticed.

        Raises:
            Closed: The other side has closed it.
            StreamBroken: The connection is cut.
        """
        self._is_reading = True
        try:
            while not self._received:
                await self._read_more()
        finally:
            self._is_reading = False
        message = self._received.popleft()
        if isinstance(message, Closed):
            raise message
        return message

    async def aclose(self) -> None:
        """Say goodbye, and close the connection. Idempotent."""
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True), contextlib.suppress(StreamBroken):
            if self._frames.close_sent is None and self._frames.close_rcvd is None:
                self._frames.send_close(1000)
                await self._flush()
                while not self._is_reading and self._frames.close_rcvd is None:
                    self._received.clear()
                    await self._read_more()
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            await self._response.aclose()

    async def _read_more(self) -> None:
        import httpcore

        data = None
        for is_last in (False, True):
            try:
                data = await self._stream.read(_READ_BYTES, timeout=QUIET_SECONDS)
                break
            except httpcore.ReadTimeout as exc:
                if is_last:
                    raise StreamBroken("nothing came for too long") from exc
                self._frames.send_ping(b"")
                await self._flush()
            except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as exc:
                raise StreamBroken(f"the connection broke: {exc or type(exc).__name__}") from exc
        if not data:
            raise StreamBroken("the connection was closed without a word")
        self._frames.receive_data(data)
        for frame in self._frames.events_received():
            self._take(frame)  # type: ignore[arg-type]
        await self._flush()
        if self._frames.parser_exc is not None:
            raise StreamBroken(f"what came is no WebSocket: {self._frames.parser_exc}")

    def _take(self, frame: Frame) -> None:
        from websockets.frames import Opcode

        if frame.opcode is Opcode.CLOSE:
            received = self._frames.close_rcvd
            self._received.append(Closed(None if received is None else received.code))
        elif frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            if frame.opcode is not Opcode.CONT:
                self._is_text = frame.opcode is Opcode.TEXT
            self._parts.append(bytes(frame.data))
            if frame.fin:
                data, self._parts = b"".join(self._parts), []
                self._received.append(data.decode("utf-8", "replace") if self._is_text else data)

    async def _flush(self) -> None:
        """Send what the protocol has to say: in the order in which it said it."""
        import httpcore

        async with self._sending:
            for data in self._frames.data_to_send():
                if not data:
                    return  # it wants the connection closed
                try:
                    await self._stream.write(data)
                except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as exc:
                    raise StreamBroken(f"the connection broke: {exc or type(exc).__name__}") from exc


async def _check(response: httpx.Response, key: bytes) -> None:
    """Raise why a handshake was not accepted."""
    if response.status_code == 101:
        accepted = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
        if response.headers.get("sec-websocket-accept") != accepted:
            raise RemoteProtocolError("the handshake of the WebSocket was answered by something else")
        return
    head = Head.of(response.status_code, response.headers)
    body = parse_message(await read_body(response, head, max_bytes=_MAX_REFUSAL_BYTES))
    if head.from_sandbox:
        raise SandboxRefused(f"the sandbox refused a WebSocket: it answered {head.status}")
    raise error_of_status(head, body) or RemoteProtocolError(f"a WebSocket was answered with {head.status}")
