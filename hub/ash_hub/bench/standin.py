"""A stand-in for many sandboxes: one server that answers at once, to measure their number and not their work.

It has the runner's private surface, lists the tools that it was given, and answers every call alike, as JSON in the
stateless era and as a stream in the handshake era. A GET is a stream that stays open and says nothing more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import httptools

__all__ = ["TOOLS_OF_EACH", "make_tools", "standing_in"]

TOOLS_OF_EACH: Final = 20

_CALLED: Final[Mapping[str, Any]] = {
    "resultType": "complete",
    "isError": False,
    "content": [{"type": "text", "text": "hello"}],
}
_OPENED: Final[Mapping[str, Any]] = {
    "protocolVersion": "2025-11-25",
    "capabilities": {"tools": {}},
    "serverInfo": {"name": "standin", "version": "0"},
}
_STREAM: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def make_tools(count: int, schema_bytes: int = 300) -> list[dict[str, Any]]:
    """Return tools as a server lists them, with input schemas of about that size."""
    words = "What to do, and how. " * 4
    needed = max(0, schema_bytes - 130)
    return [
        {
            "name": f"tool_{number}",
            "description": f"Does the thing number {number}. {words}",
            "inputSchema": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "description": words},
                    **{f"p{part}": {"type": "string", "description": "x" * 200} for part in range(needed // 250)},
                },
                "required": ["text"],
            },
        }
        for number in range(count)
    ]


@asynccontextmanager
async def standing_in(socket: str, tools: Sequence[Mapping[str, Any]]) -> AsyncGenerator[None]:
    """Serve on a Unix socket while the context is open."""
    loop = asyncio.get_running_loop()
    open_now: set[asyncio.Transport] = set()
    server = await loop.create_unix_server(lambda: _StandIn(tools, open_now), socket, backlog=4096)
    try:
        yield
    finally:
        server.close()
        for transport in list(open_now):
            transport.abort()


class _StandIn(asyncio.Protocol):
    def __init__(self, tools: Sequence[Mapping[str, Any]], open_now: set[asyncio.Transport]) -> None:
        self._tools = tools
        self._open = open_now
        self._parser = httptools.HttpRequestParser(self)
        self._url = self._body = b""
        self._in_session = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._open.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._body, self._in_session = b"", b"", False

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._in_session = self._in_session or name == b"mcp-session-id"

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self._url.startswith(b"/mcp"):
            self._transport.write(_whole({}))
        elif self._parser.get_method() == b"GET":
            self._transport.write(_STREAM + b"3\r\n:\n\n\r\n")
        else:
            self._transport.write(self._answer(json.loads(self._body)))

    def _answer(self, message: Mapping[str, Any]) -> bytes:
        method = message["method"]
        if "id" not in message:
            return b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n"
        if method == "initialize":
            return _whole(_response(message, _OPENED), b"mcp-session-id: standin\r\n")
        listed = {"resultType": "complete", "tools": self._tools}
        response = _response(message, listed if method == "tools/list" else _CALLED)
        if not self._in_session:
            return _whole(response)
        event = b"event: message\r\ndata: " + json.dumps(response).encode() + b"\r\n\r\n"
        return _STREAM + b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)


def _response(message: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": message["id"], "result": result}


def _whole(body: Mapping[str, Any], more: bytes = b"") -> bytes:
    raw = json.dumps(body).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n" % (len(raw), more)
    return head + raw
