"""Serves a recipe's server that runs in a process of its own, to callers of both eras, whatever it speaks itself.

All callers share one connection to it. Its results come back as they are, progress goes to the call that asked for
it, and a caller that leaves cancels its call. Log messages carry no sign of the call that they belong to, so they go
to every call that is open.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import mcp_types as types
from mcp.client.client import Client
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPError
from mcp_types import CONNECTION_CLOSED, INTERNAL_ERROR
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from ash_recipes.runner.servers.base import RecipeServer, StartProblem, intercept
from ash_recipes.runner.servers.child import Child
from ash_recipes.runner.tools import RunnerTools

__all__ = ["Calls", "open_bridge"]

Ctx = ServerRequestContext[Any, Any]

# Request, its parameters, its result, and the capability without which the server does not have it.
_FORWARDED: Final[tuple[tuple[type[types.Request[Any, Any]], type[BaseModel], type[BaseModel], str], ...]] = (
    (types.ListToolsRequest, types.PaginatedRequestParams, types.ListToolsResult, "tools"),
    (types.CallToolRequest, types.CallToolRequestParams, types.CallToolResult, "tools"),
    (types.ListResourcesRequest, types.PaginatedRequestParams, types.ListResourcesResult, "resources"),
    (
        types.ListResourceTemplatesRequest,
        types.PaginatedRequestParams,
        types.ListResourceTemplatesResult,
        "resources",
    ),
    (types.ReadResourceRequest, types.ReadResourceRequestParams, types.ReadResourceResult, "resources"),
    (types.ListPromptsRequest, types.PaginatedRequestParams, types.ListPromptsResult, "prompts"),
    (types.GetPromptRequest, types.GetPromptRequestParams, types.GetPromptResult, "prompts"),
    (types.CompleteRequest, types.CompleteRequestParams, types.CompleteResult, "completions"),
    (types.SetLevelRequest, types.SetLevelRequestParams, types.EmptyResult, "logging"),
)


class Calls:
    """The calls that are open now, each with the way back to its caller."""

    def __init__(self) -> None:
        self._open: set[_Call] = set()

    def add(self, call: _Call) -> None:
        self._open.add(call)

    def discard(self, call: _Call) -> None:
        self._open.discard(call)

    async def logged(self, params: types.LoggingMessageNotificationParams) -> None:
        """Pass a log message of the server on to every open call; where nobody asked for it, it is dropped."""
        for call in list(self._open):
            await call.log(params)


class _Call:
    def __init__(self, ctx: Ctx) -> None:
        self._ctx = ctx

    async def log(self, params: types.LoggingMessageNotificationParams) -> None:
        await self._ctx.session.send_log_message(  # pyright: ignore[reportDeprecated]
            params.level, params.data, params.logger, related_request_id=self._ctx.request_id
        )


class _Bridge:
    def __init__(self, app: ASGIApp, child: Child) -> None:
        self._app = app
        self._child = child

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def claimed(self, more: Mapping[str, str]) -> None:
        """Start the server again, since a process gets its environment only then."""
        if more:
            await self._child.restart()


@asynccontextmanager
async def open_bridge(child: Child, calls: Calls, tools: RunnerTools) -> AsyncGenerator[RecipeServer]:
    """Start the recipe's server and serve it until the context is left.

    Raises:
        StartProblem: It does not start.
    """
    server = _mirror(await child.client(), child, calls)
    server.middleware.insert(0, intercept(tools))
    app = server.streamable_http_app(
        streamable_http_path="/mcp",
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
    try:
        async with app.router.lifespan_context(app):
            yield _Bridge(app, child)
    finally:
        await child.aclose()


def _mirror(client: Client, child: Child, calls: Calls) -> Server[Any]:
    """Return a server that says of itself what the recipe's server says, and forwards what that can do."""
    info = client.server_info
    server: Server[Any] = Server(
        info.name if info is not None else "recipe",
        version=info.version if info is not None else "",
        title=info.title if info is not None else None,
        instructions=client.instructions,
        # Headers that mirror arguments are for gateways; the arguments themselves are what is forwarded.
        get_tool_input_schema=lambda name: None,
    )
    for request, params, result, capability in _FORWARDED:
        if getattr(client.server_capabilities, capability, None) is not None or capability == "tools":
            method: str = request.model_fields["method"].default
            server.add_request_handler(method, params, _forward(child, calls, request, method, result))
    return server


def _forward(
    child: Child, calls: Calls, request: type[types.Request[Any, Any]], method: str, result: type[BaseModel]
) -> Callable[[Ctx, Any], Awaitable[BaseModel]]:
    async def forward(ctx: Ctx, params: Any) -> BaseModel:
        try:
            client = await child.client()
        except StartProblem as exc:
            raise MCPError(INTERNAL_ERROR, f"the recipe's server has ended and does not start again: {exc}") from exc
        if method == "logging/setLevel" and client.protocol_version in MODERN_PROTOCOL_VERSIONS:
            return types.EmptyResult()
        asked = _made(request, params.model_copy(update={"meta": _own_meta(params.meta)}))
        call = _Call(ctx)
        calls.add(call)
        try:
            return await client.session.send_request(asked, result, progress_callback=ctx.session.report_progress)
        except MCPError as exc:
            if exc.code == CONNECTION_CLOSED:
                child.lost(client)
                message = "the recipe's server ended during the call; the next call starts it again"
                raise MCPError(INTERNAL_ERROR, message) from exc
            raise
        finally:
            calls.discard(call)

    return forward


def _made(request: Callable[..., types.Request[Any, Any]], params: BaseModel) -> types.Request[Any, Any]:
    return request(params=params)


def _own_meta(meta: Mapping[str, Any] | None) -> Any:
    """Return what a caller says beside its request, without what belongs to its own connection."""
    kept = {
        key: value
        for key, value in (meta or {}).items()
        if key not in ("progress_token", "progressToken") and not key.startswith("io.modelcontextprotocol/")
    }
    return kept or None
