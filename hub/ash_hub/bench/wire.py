"""A bare HTTP connection: requests made of bytes beforehand, so that the client adds as little as can be."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import httptools
from anyio.abc import ByteStream

from ash_mcp.errors import RemoteProtocolError
from ash_mcp.types import Endpoint
from ash_mcp.wire import MCP_PATH, MODERN_VERSION

__all__ = [
    "Answer",
    "Wire",
    "connected",
    "endpoint_of",
    "handshake",
    "legacy_call",
    "modern_call",
    "named_calls",
    "post",
]

_READ_BYTES: Final = 65536
HANDSHAKE_VERSION: Final = "2025-11-25"


@dataclass(slots=True)
class Answer:
    """A whole response."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes

    def message(self) -> dict[str, Any]:
        """Return the JSON-RPC message that it holds, or that its stream ends with."""
        if not self.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            return json.loads(self.body)
        data = [line[5:] for line in self.body.splitlines() if line.startswith(b"data:")]
        return json.loads(data[-1])


class _Reader:
    """What httptools tells of one response."""

    def __init__(self) -> None:
        self.answer = Answer(0, {}, b"")
        self.done = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answer.headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self.answer.body += body

    def on_message_complete(self) -> None:
        self.done = True


class Wire:
    """One kept-alive connection."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def exchange(self, request: bytes) -> Answer:
        """Send one request and return its whole answer.

        Raises:
            RemoteProtocolError: It was refused, or was no HTTP.
        """
        reader = _Reader()
        parser = httptools.HttpResponseParser(reader)
        await self._stream.send(request)
        try:
            while not reader.done:
                parser.feed_data(await self._stream.receive(_READ_BYTES))
        except (httptools.HttpParserError, anyio.EndOfStream, anyio.BrokenResourceError) as exc:
            raise RemoteProtocolError(f"the other end broke off: {exc!r}") from exc
        reader.answer.status = parser.get_status_code()
        if reader.answer.status >= 400:
            raise RemoteProtocolError(f"refused with {reader.answer.status}: {reader.answer.body[:500]!r}")
        return reader.answer


@asynccontextmanager
async def connected(endpoint: Endpoint) -> AsyncGenerator[Wire]:
    """Open a connection while the context is open."""
    if endpoint.unix is not None:
        stream: ByteStream = await anyio.connect_unix(endpoint.unix)
    else:
        assert endpoint.host is not None and endpoint.port is not None
        stream = await anyio.connect_tcp(endpoint.host, endpoint.port)
    async with stream:
        yield Wire(stream)


def endpoint_of(url: str) -> Endpoint:
    parts = urlsplit(url)
    return Endpoint(host=parts.hostname, port=parts.port or 80)


def post(message: Mapping[str, Any], headers: Mapping[str, str]) -> bytes:
    """Return a POST to the MCP endpoint as it goes over the wire."""
    body = json.dumps(message).encode()
    named = {
        "host": "127.0.0.1",
        "content-type": "application/json",
        "accept": "application/json, text/event-stream",
        "content-length": str(len(body)),
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"POST {MCP_PATH} HTTP/1.1\r\n{head}\r\n".encode() + body


def modern_call(
    method: str, params: Mapping[str, Any], headers: Mapping[str, str], request_id: int | str = 1
) -> bytes:
    """Return a request of the stateless era."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": MODERN_VERSION,
        "io.modelcontextprotocol/clientInfo": {"name": "ash-bench", "version": "0"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    mirrored = {"mcp-protocol-version": MODERN_VERSION, "mcp-method": method}
    if "name" in params:
        mirrored["mcp-name"] = str(params["name"])
    message = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": {**params, "_meta": meta}}
    return post(message, {**mirrored, **headers})


def named_calls(token: str, sandboxes: int, count: int) -> list[bytes]:
    """Return as many calls, spread evenly over the sandboxes `sb1` and so on of who has the token."""
    bearer = {"authorization": f"Bearer {token}"}
    params: list[dict[str, Any]] = [
        {"name": f"sb{number % sandboxes + 1}_tool_0", "arguments": {"text": "x"}} for number in range(count)
    ]
    return [modern_call("tools/call", each, bearer) for each in params]


def legacy_call(method: str, params: Mapping[str, Any], headers: Mapping[str, str]) -> bytes:
    """Return a request of the handshake era; `headers` hold its session."""
    return post({"jsonrpc": "2.0", "id": 1, "method": method, "params": dict(params)}, headers)


async def handshake(wire: Wire, headers: Mapping[str, str]) -> dict[str, str]:
    """Open a session of the handshake era and return the headers of what is said in it."""
    offer = {
        "protocolVersion": HANDSHAKE_VERSION,
        "capabilities": {},
        "clientInfo": {"name": "ash-bench", "version": "0"},
    }
    answer = await wire.exchange(legacy_call("initialize", offer, headers))
    version = answer.message()["result"]["protocolVersion"]
    session = answer.headers[b"mcp-session-id"].decode()
    inside = {**headers, "mcp-session-id": session, "mcp-protocol-version": version}
    await wire.exchange(post({"jsonrpc": "2.0", "method": "notifications/initialized"}, inside))
    return inside
