"""The way to servers inside the sandbox: a connection of the hive's becomes one to a port of the sandbox's loopback.

    GET /_ash/ports/8000 with `Upgrade: websocket` ──▶ 200, and from then on the bytes of both sides as they come

uvicorn hands over connections for that one word only; those for other paths are real WebSockets, and go on to whoever
serves these. Nothing is read of what passes, so HTTP of every kind, streams and WebSockets need no code here.
"""

from __future__ import annotations

import asyncio
import json
import re
from asyncio import Transport
from collections.abc import Callable
from typing import Any, ClassVar, Final, cast

from ash_recipes.runner.problems import refusal

__all__ = ["PORTS_PATH", "PortDoor", "port_door"]

PORTS_PATH: Final = "/_ash/ports/"
HOSTS: Final = ("127.0.0.1", "::1")
"""Tried in turn: some servers listen on `localhost` and mean one of the two."""
CONNECT_SECONDS: Final = 5.0
LINGER_SECONDS: Final = 5.0
"""How long what is under way to a side may take once the other one has closed."""
MAX_OPEN: Final = 1024
HIGH_WATER_BYTES: Final = 65_536

_HEAD: Final = re.compile(rb"GET /_ash/ports/([1-9][0-9]{0,4}) HTTP/1\.1\r\n")
_TOKEN: Final = re.compile(rb"\r\nash-token: ([^\r\n]*)\r\n")
_TAKEN: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class _Side(asyncio.Protocol):
    """One of the two sides: what comes from it goes to the other, no faster than that one reads."""

    transport: Transport | None = None
    other: _Side | None = None
    is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("Transport", transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.is_closed:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if self.other is None:
            return
        if exc is None:
            self.other.close_soon()
        elif self.other.transport is not None:
            self.other.transport.abort()

    def close_soon(self) -> None:
        """Close it when it has what is under way to it, or in `LINGER_SECONDS`."""
        if self.transport is not None and not self.is_closed:
            self.transport.close()
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self.transport.abort)


class PortDoor(_Side):
    """The hive's side, which uvicorn hands over as it hands over WebSockets: with the head as its first bytes."""

    admits: ClassVar[Callable[[bytes | None], bool]]
    """Says whether a request with this token may come in."""
    open_now: ClassVar[set[PortDoor]]
    otherwise: ClassVar[Callable[..., asyncio.Protocol] | None]
    """Makes the protocol of a connection that is for no port; None: it is refused."""

    def __init__(self, **given: Any) -> None:
        self._given = given
        server_state = given["server_state"]
        self._connections: set[Any] = server_state.connections
        self._has_head = False
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connections.add(self)
        self.open_now.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self.open_now.discard(self)
        if self._connecting is not None:
            self._connecting.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._has_head:
            self._has_head = True
            self._take(data)
        elif self.other is None:
            self._close()  # it was to wait for the answer
        else:
            super().data_received(data)

    def shutdown(self) -> None:
        """Close it: the runner ends. uvicorn calls this."""
        self._close()

    def _take(self, head: bytes) -> None:
        other = type(self).otherwise
        if other is not None and not head.startswith(b"GET " + PORTS_PATH.encode()):
            self._give_to(other(**self._given), head)
            return
        asked, token = _HEAD.match(head), _TOKEN.search(head)
        if not type(self).admits(None if token is None else token[1]):
            self._refuse(401, "unauthenticated", "a good Ash-Token is needed")
        elif asked is None or not 0 < int(asked[1]) < 65_536:
            self._refuse(404, "not_found", f"connections are taken over at {PORTS_PATH}<port> only")
        elif len(self.open_now) > MAX_OPEN:
            self._refuse(503, "capacity_exceeded", f"{MAX_OPEN} connections to ports of this sandbox are open")
        else:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(int(asked[1])))

    def _give_to(self, protocol: asyncio.Protocol, head: bytes) -> None:
        assert self.transport is not None
        self._connections.discard(self)
        self.open_now.discard(self)
        protocol.connection_made(self.transport)
        protocol.data_received(head)
        # uvicorn makes this object the transport's protocol as soon as it has been given the head
        asyncio.get_running_loop().call_soon(self.transport.set_protocol, protocol)

    async def _connect(self, port: int) -> None:
        side = await _dialled(port)
        self._connecting = None
        if side is None:
            message = f"nobody listens on port {port} of this sandbox: start a server there, on 127.0.0.1 or 0.0.0.0"
            self._refuse(502, "port_closed", message)
            return
        assert self.transport is not None
        self.other, side.other = side, self
        self.transport.write(_TAKEN)
        if side.is_closed or side.transport is None:
            self._close()
        else:
            side.transport.resume_reading()

    def _refuse(self, status: int, kind: str, message: str) -> None:
        body = json.dumps(refusal(kind, message, retryable=status in (502, 503))).encode()
        head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        if self.transport is not None:
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self._close()

    def _close(self) -> None:
        self.close_soon()


class _Dialled(_Side):
    """The server's side. It is not read before the hive knows that it is there, since servers may speak first."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.transport is not None:
            self.transport.pause_reading()


async def _dialled(port: int) -> _Dialled | None:
    """Return a connection to a server of this sandbox; None where nobody listens."""
    loop = asyncio.get_running_loop()
    for host in HOSTS:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, side = await loop.create_connection(_Dialled, host, port)
        except (OSError, TimeoutError):
            continue
        return side
    return None


def port_door(
    admits: Callable[[bytes | None], bool], otherwise: Callable[..., asyncio.Protocol] | None = None
) -> type[PortDoor]:
    """Return the class for uvicorn's `ws`.

    Args:
        admits: Says whether a request with this token may come in.
        otherwise: Makes uvicorn's protocol of a WebSocket, for those that are for no port; None: there are none.
    """
    own = None if otherwise is None else staticmethod(otherwise)
    return type(
        "PortDoor", (PortDoor,), {"admits": staticmethod(admits), "open_now": set[PortDoor](), "otherwise": own}
    )
