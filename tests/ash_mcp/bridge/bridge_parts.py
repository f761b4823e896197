"""What the bridge's tests share: a small MCP server of both eras on a real port, and a host's end of the bridge."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import anyio
import mcp_types as types
import uvicorn
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler, ToolsListChanged

from ash_mcp.bridge.stdio_bridge import Bridge, FindHive, HiveLocator
from ash_mcp.errors import ConnectFailed
from ash_mcp.settings import ClientSettings

Context = ServerRequestContext[Any, Any]

INITIALIZE: dict[str, Any] = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "test", "version": "1"},
}
ENVELOPE: dict[str, Any] = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
}


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_up: Callable[[int], None]) -> None:
        super().__init__(config)
        self._on_up = on_up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_up(self.servers[0].sockets[0].getsockname()[1])


class SmallServer:
    """Serves `echo`, `progress`, `hang` and `change` in both eras, in a thread of its own; it lists `tools`."""

    def __init__(self) -> None:
        self.hanging = threading.Event()
        self.let_go = threading.Event()
        """Set when a call of `hang` was cancelled."""
        self.methods: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.tools = [{"name": "echo", "inputSchema": {"type": "object"}}]
        self.called: list[str] = []
        self._up = threading.Event()
        self.port = 0
        self.listens_after: str | None = None
        """A tool; subscriptions are opened only once it was called."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/mcp"

    @property
    def sessions(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self._manager._server_instances)  # pyright: ignore[reportPrivateUsage]

    async def _list(self, ctx: Context, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return types.ListToolsResult.model_validate({"tools": self.tools, "ttlMs": 0, "cacheScope": "private"})

    async def _call(self, ctx: Context, params: types.CallToolRequestParams) -> types.CallToolResult:
        self.called.append(params.name)
        match params.name:
            case "progress":
                await ctx.session.report_progress(0.5, 1.0, "halfway")
            case "change":
                await self._bus.publish(ToolsListChanged())
                await ctx.session.send_notification(types.ToolListChangedNotification())
            case "hang":
                self.hanging.set()
                try:
                    await anyio.sleep_forever()
                finally:
                    self.let_go.set()
            case _:
                pass
        return types.CallToolResult(content=[types.TextContent(text=json.dumps(params.arguments))])

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.methods.append(scope["method"])
        self.headers.append({key.decode(): value.decode() for key, value in scope["headers"]})
        await self._manager.handle_request(scope, receive, send)

    async def _serve(self) -> None:
        # all made here: what anyio makes belongs to the loop that it was made under
        self._bus = InMemorySubscriptionBus()
        server: Server[Any] = Server("small")
        server.add_request_handler("tools/list", types.PaginatedRequestParams, self._list)
        server.add_request_handler("tools/call", types.CallToolRequestParams, self._call)
        listening = ListenHandler(self._bus)

        async def listen(ctx: Context, params: types.SubscriptionsListenRequestParams) -> Any:
            while self.listens_after is not None and self.listens_after not in self.called:
                await anyio.sleep(0.01)
            return await listening(ctx, params)

        server.add_request_handler("subscriptions/listen", types.SubscriptionsListenRequestParams, listen)
        self._manager = StreamableHTTPSessionManager(server)
        self._loop = asyncio.get_running_loop()
        config = uvicorn.Config(
            cast("Any", self._app),
            port=0,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=0,
        )
        self._server = _Uvicorn(config, self._note_port)
        async with self._manager.run():
            await self._server.serve()

    def _note_port(self, port: int) -> None:
        self.port = port
        self._up.set()

    @contextmanager
    def serving(self) -> Generator[SmallServer]:
        thread = threading.Thread(target=anyio.run, args=(self._serve,))
        thread.start()
        try:
            assert self._up.wait(20)
            yield self
        finally:
            self._server.should_exit = self._server.force_exit = True
            thread.join(20)

    def die(self) -> None:
        """Break every connection and take no more, as after `kill -9`."""
        self._loop.call_soon_threadsafe(self._break_off)

    def _break_off(self) -> None:
        for listener in self._server.servers:
            listener.close()
        for connection in self._server.server_state.connections:
            cast("Any", connection).transport.abort()


@dataclass
class Host:
    """A host's end: what it writes to the bridge's stdin, and what it has read from its stdout."""

    inlet: Any
    outlet: Any
    unread: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    async def write(self, message: dict[str, Any] | bytes) -> None:
        await self.inlet.send(message if isinstance(message, bytes) else json.dumps(message).encode())

    async def request(self, request_id: str | int, method: str, /, **params: Any) -> None:
        await self.write({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params})

    async def notify(self, method: str, /, **params: Any) -> None:
        await self.write({"jsonrpc": "2.0", "method": method, "params": params})

    async def read(self, **wanted: Any) -> dict[str, Any]:
        """Return the first message that has all of `wanted`, keeping the others for later."""
        with anyio.fail_after(10):
            while True:
                for message in self.unread:
                    if wanted.items() <= message.items():
                        self.unread.remove(message)
                        return message
                line: bytes = await self.outlet.receive()
                assert b"\n" not in line
                self.unread.append(json.loads(line))

    async def call(self, request_id: str | int, tool: str, /, **arguments: Any) -> None:
        await self.request(request_id, "tools/call", name=tool, arguments=arguments)

    async def call_modern(self, request_id: str | int, tool: str, /, meta: dict[str, Any] | None = None) -> None:
        await self.request(request_id, "tools/call", name=tool, arguments={}, _meta={**ENVELOPE, **(meta or {})})

    async def shake_hands(self) -> dict[str, Any]:
        await self.request("init", "initialize", **INITIALIZE)
        answer = await self.read(id="init")
        await self.notify("notifications/initialized")
        return answer


def found_at(*urls: str) -> FindHive:
    """Return a look-up that finds these, one after the other, and then nothing."""
    left = list(urls)

    async def find() -> str:
        if not left:
            raise ConnectFailed("no hive anywhere")
        return left.pop(0)

    return find


@asynccontextmanager
async def bridged(
    find: FindHive, settings: ClientSettings | None = None, list_seconds: float = 0.01
) -> AsyncGenerator[Host]:
    """Run a bridge; leaving the context ends its stdin and waits for its end."""
    into, lines = anyio.create_memory_object_stream[bytes](0)
    out, outlet = anyio.create_memory_object_stream[bytes](1000)
    bridge = Bridge(settings or ClientSettings(), HiveLocator(find), out.send, list_seconds=list_seconds)
    with anyio.fail_after(20):
        async with lines, into, out, outlet, anyio.create_task_group() as group:
            group.start_soon(bridge.run, lines)
            yield Host(into, outlet)
            into.close()
