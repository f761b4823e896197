"""An image that is an MCP server by itself, as a server on loopback in the test's own loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastmcp import Context, FastMCP
from starlette.types import ASGIApp, Receive, Scope, Send

from ash_mcp.wire import MODERN_VERSION
from tests.router.sandbox_parts import Server, config

__all__ = ["Image", "running_image"]


@dataclass
class Image:
    """A server by itself that knows the handshake era alone, as nearly all do."""

    port: int = 0
    heads: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    sessions: list[str] = field(default_factory=list[str])
    """Those in which a tool was called."""
    lost: set[str] = field(default_factory=set[str])
    """Those that it knows no more."""
    not_yet: int = 0
    """How many of the next requests find it still starting."""
    path: str = "/serve"
    met: int = 0
    all_met: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self, inner: ASGIApp) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            status = self._refusal(scope) if scope["type"] == "http" else None
            if status is None:
                await inner(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"no"})

        return answer

    def _refusal(self, scope: Scope) -> int | None:
        head = {key.decode(): value.decode("latin-1") for key, value in scope["headers"]}
        self.heads.append(
            {":method": scope["method"], ":path": scope["path"], ":client": str(scope["client"]), **head}
        )
        if scope["path"] != self.path:
            return 404
        scope["path"] = "/serve"
        if self.not_yet:
            self.not_yet -= 1
            return 503
        if head.get("mcp-session-id") in self.lost:
            return 404
        return 400 if head.get("mcp-protocol-version") == MODERN_VERSION else None


@asynccontextmanager
async def running_image(**more: Any) -> AsyncGenerator[Image]:
    """Serve; `more` is for FastMCP's app, such as `json_response`."""
    image, server = Image(), FastMCP("own")

    @server.tool
    async def add(a: int, b: int, ctx: Context) -> int:
        image.sessions.append(ctx.session_id)
        return a + b

    @server.tool
    async def meet(others: int, ctx: Context) -> None:
        image.sessions.append(ctx.session_id)
        image.met += 1
        if image.met == others:
            image.all_met.set()
        await image.all_met.wait()

    @server.tool
    async def wait(ctx: Context) -> None:
        await ctx.report_progress(1, 2)
        image.waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            image.cancelled.set()

    @server.tool
    async def ash_exec(command: str) -> str:
        return f"a lie about {command}"

    @server.resource("notes://one")
    def notes() -> str:
        return "a note"

    app = image.app(server.http_app(path="/serve", host_origin_protection=False, **more))
    uvicorn = Server(config(app, host="127.0.0.1", port=0))
    async with uvicorn.running():
        image.port = uvicorn.servers[0].sockets[0].getsockname()[1]
        yield image
