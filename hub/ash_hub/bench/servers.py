"""Servers that the relay is measured with, each its own process: `python -m ash_hub.bench.servers KIND …`.

`constant` stands for a sandbox and answers everything alike; `plane` is the data plane with `constant` behind its
routes; `asgi` relays to it as an ASGI app with aiohttp; `tools` is a FastMCP server, and `proxy` FastMCP's own proxy
of it; `crowd` is a whole hive with many sandboxes, which all are the one `standin`, and `flood` calls them all the
time. Each says in one line of JSON where it listens, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, cast

import httptools
import uvicorn

from ash_mcp.types import DEFAULT_SCOPE, Endpoint, SandboxId, SessionName, new_sandbox_id

__all__ = ["main"]

_ANSWER: Final = (
    b'{"jsonrpc":"2.0","id":1,"result":{"resultType":"complete","isError":false,'
    b'"content":[{"type":"text","text":"hello"}],"structuredContent":{"result":"hello"}}}'
)
_HELLO: Final = (
    b'{"jsonrpc":"2.0","id":"ash-1","result":{"protocolVersion":"2025-11-25","capabilities":{},'
    b'"serverInfo":{"name":"constant","version":"0"}}}'
)


class _Constant(asyncio.Protocol):
    """Answers JSON in the stateless era and a stream in the handshake era, as sandboxes do."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._in_session = False
        self._last: tuple[bytes, bytes] | None = None
        """What was answered last, all of it, and how: parsing it again would only slow down who is measured."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._last is not None and self._last[0] == data:
            self._transport.write(self._last[1])
            return
        self._answer = b""
        self._parser.feed_data(data)
        self._last = (data, self._answer) if self._answer and data.startswith(b"POST ") else None

    def on_message_begin(self) -> None:
        self._body, self._in_session = b"", False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._in_session = self._in_session or name == b"mcp-session-id"

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if b'"initialize"' in self._body:
            self._answer = _json(_HELLO, b"mcp-session-id: constant\r\n")
        elif b'"id"' not in self._body:
            self._answer = b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n"
        elif self._in_session:
            event = b"event: message\r\ndata: " + _ANSWER + b"\r\n\r\n"
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            self._answer = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)
        else:
            self._answer = _json(_ANSWER)
        self._transport.write(self._answer)


def _json(body: bytes, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n%b" % (
        len(body),
        more,
        body,
    )


async def _constant(socket: str) -> None:
    await asyncio.get_running_loop().create_unix_server(_Constant, socket)
    await _until_told({})


async def _plane(socket: str, routes: str) -> None:
    """Serve the data plane as a hive does: admission with API keys, routes, sessions of the handshake era."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from mcp.server.lowlevel.server import Server

    from ash_hub.face.legacy_sessions import SdkSessions
    from ash_mcp.errors import AshError, StreamBroken
    from ash_router.admission.api_keys import KeyFile, KeyRing
    from ash_router.admission.bearer import Credentials
    from ash_router.admission.gate import Gate
    from ash_router.admission.host_names import NameRules
    from ash_router.caller.relay import Relay
    from ash_router.ledger import Ledger
    from ash_router.routes import Route, Routes
    from ash_router.sessions.session_gate import SessionGate
    from ash_router.sessions.session_map import LegacySessions
    from ash_router.store.memory import MemoryStore
    from ash_router.upstream.call_tokens import CallTokens

    async def explain(route: Route) -> AshError:
        return StreamBroken(f"{route.session} broke off")

    import gc

    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    sdk_sessions = SdkSessions(Server("plane"), lambda session_id: sessions.remove(session_id))
    sessions = LegacySessions(sdk_sessions.hold)
    known = Routes(MemoryStore())
    relay = Relay(
        routes=known,
        tokens=CallTokens(Ed25519PrivateKey.generate()),
        ledger=Ledger(),
        sessions=sessions,
        explain=explain,
    )
    first: SandboxId | None = None
    for number in range(int(routes)):
        route = Route(
            sandbox_id=new_sandbox_id(),
            owner="bench",
            scope=DEFAULT_SCOPE,
            session=SessionName(f"sb{number}"),
            endpoint=_endpoint(socket),
        )
        first = first or route.sandbox_id
        await known.bind(route)
    async with AsyncExitStack() as stack:
        keys = KeyFile(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "keys.json")
        _, token = keys.add(subject="bench")
        gate = Gate(NameRules(port=0), Credentials(KeyRing(keys)), local=False)
        await stack.enter_async_context(sdk_sessions.manager.run())
        app = SessionGate(sessions, cast("Any", sdk_sessions.manager.handle_request), sdk_sessions.end)
        await _serve(app, {"token": token, "sandbox_id": first}, http=relay.protocol(gate))
        await relay.aclose()


def _endpoint(named: str) -> Endpoint:
    if named.startswith("tcp:"):
        return Endpoint(host="127.0.0.1", port=int(named.removeprefix("tcp:")), proves=False)
    return Endpoint(unix=named)


class _Bare(asyncio.Protocol):
    """One end of a connection whose bytes go to the other end unread: what no relay can do without."""

    def __init__(self, socket: str | None = None) -> None:
        self._socket = socket
        self._early = b""
        self.other: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._socket is not None:
            self._reaching = asyncio.get_running_loop().create_task(self._reach(self._socket))

    async def _reach(self, socket: str) -> None:
        far = _Bare()
        await asyncio.get_running_loop().create_unix_connection(lambda: far, socket)
        far.other, self.other = self.transport, far.transport
        self.other.write(self._early)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early += data
        else:
            self.other.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.close()


async def _bare(socket: str) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: _Bare(socket), "127.0.0.1", 0)
    await _until_told({"port": server.sockets[0].getsockname()[1]})


async def _asgi(socket: str) -> None:
    """Relay as an ASGI app, with what one would take for it."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as upstream:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            body, more = b"", True
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
            kept = {key.decode(): value.decode() for key, value in scope["headers"] if key in _KEPT}
            async with upstream.post("http://sandbox/mcp", data=body, headers=kept) as answer:
                headers = [(key.lower().encode(), value.encode()) for key, value in answer.headers.items()]
                await send({"type": "http.response.start", "status": answer.status, "headers": headers})
                async for part in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b""})

        await _serve(app, {})


_KEPT: Final = frozenset({b"content-type", b"accept", b"mcp-protocol-version", b"mcp-method", b"mcp-name"})


async def _tools() -> None:
    from fastmcp import FastMCP

    server: FastMCP[Any] = FastMCP("tools")

    @server.tool
    def echo(text: str) -> str:
        return text

    assert callable(echo)
    await _serve_mcp(server)


async def _proxy(url: str) -> None:
    """Serve what one would build of FastMCP instead: a server that mounts its proxy to another under a name."""
    from fastmcp import FastMCP
    from fastmcp.server import create_proxy

    server: FastMCP[Any] = FastMCP("front")
    server.mount(create_proxy(url), namespace="sb0")
    await _serve_mcp(server)


async def _serve_mcp(server: Any) -> None:
    app = server.http_app(path="/mcp", host_origin_protection=False)
    async with app.router.lifespan_context(app):
        await _serve(app, {})


async def _serve(app: Any, said: dict[str, Any], **more: Any) -> None:
    config = uvicorn.Config(
        app, port=0, ws="none", lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1, **more
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    await server.up.wait()
    await _until_told({"port": server.servers[0].sockets[0].getsockname()[1], **said})
    server.should_exit = True
    await task


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.up.set()


async def _standin(socket: str) -> None:
    from ash_hub.bench.standin import TOOLS_OF_EACH, make_tools, standing_in

    async with standing_in(socket, make_tools(TOOLS_OF_EACH)):
        await _until_told({})


async def _crowd(socket: str, sandboxes: str, *owners: str) -> None:
    """Serve a whole hive where each of `owners` has that many sandboxes, stand-ins all."""
    from ash_hub.bench.crowd import open_crowd

    with tempfile.TemporaryDirectory(prefix="ash-bench-", dir="/tmp") as folder:
        async with open_crowd(Path(folder), socket, *owners, limits={"sandboxes": 10_000}) as crowd:
            ids = {owner: await crowd.spawn(owner, int(sandboxes)) for owner in owners}
            await _until_told({"port": crowd.port, "tokens": dict(crowd.tokens), "ids": ids})


async def _flood(port: str, token: str, sandboxes: str, count: str) -> None:
    """Keep as many calls in flight, spread over sandboxes: in a process of its own, so as to slow no other caller."""
    from ash_hub.bench.callers import repeating
    from ash_hub.bench.wire import named_calls

    async with repeating(int(port), named_calls(token, int(sandboxes), int(count))):
        await _until_told({})


async def _until_told(said: dict[str, Any]) -> None:
    """Say that all is up, and wait for the end of standard input."""
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
    await over.wait()


_KINDS: Final[dict[str, Callable[..., Awaitable[None]]]] = {
    "constant": _constant,
    "plane": _plane,
    "asgi": _asgi,
    "bare": _bare,
    "tools": _tools,
    "proxy": _proxy,
    "standin": _standin,
    "crowd": _crowd,
    "flood": _flood,
}


def main(kind: str, *arguments: str) -> None:
    import uvloop

    uvloop.run(cast("Any", _KINDS[kind](*arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
