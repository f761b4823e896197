"""Serves a recipe's server that runs in a process of its own, to callers of both eras, whatever it speaks itself.

All callers share one connection to it. Its results come back as they are, progress goes to the call that asked for
it, and a caller that leaves cancels its call. Log messages carry no sign of the call that they belong to, so they go
to every call that is open; `asking` finds the caller of what the server asks, `suspended_calls` asks a stateless one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Final

import mcp_types as types
from mcp.client.client import Client
from mcp.server.lowlevel.server import Server
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.dispatcher import ProgressFnT
from mcp.shared.exceptions import MCPError
from mcp_types import CONNECTION_CLOSED, INTERNAL_ERROR
from mcp_types.methods import INPUT_REQUIRED_METHODS
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel, TypeAdapter
from starlette.types import ASGIApp, Receive, Scope, Send

from ash_recipes.runner.servers.asking import Call, Calls, Ctx, SessionCall
from ash_recipes.runner.servers.base import RecipeServer, StartProblem, intercept
from ash_recipes.runner.servers.child import Child
from ash_recipes.runner.servers.suspended_calls import ResumableCall, SuspendedCalls
from ash_recipes.runner.tools import RunnerTools

__all__ = ["open_bridge"]

MAX_ROUNDS: Final = 10
"""How often a stateless server may ask in one call of a caller with a session; what the SDK's clients allow."""

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
async def open_bridge(
    child: Child, calls: Calls, suspended: SuspendedCalls, tools: RunnerTools
) -> AsyncGenerator[RecipeServer]:
    """Start the recipe's server and serve it until the context is left.

    Raises:
        StartProblem: It does not start.
    """
    server = _mirror(await child.client(), child, calls, suspended)
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


def _mirror(client: Client, child: Child, calls: Calls, suspended: SuspendedCalls) -> Server[Any]:
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
            forward = _Forward(child, calls, suspended, request, result)
            server.add_request_handler(forward.method, params, forward)
    return server


class _Forward:
    """Answers one kind of request with what the recipe's server says to it."""

    def __init__(
        self,
        child: Child,
        calls: Calls,
        suspended: SuspendedCalls,
        request: type[types.Request[Any, Any]],
        result: type[BaseModel],
    ) -> None:
        self._child = child
        self._calls = calls
        self._suspended = suspended
        self._request = request
        self.method: str = request.model_fields["method"].default
        self._asks = self.method in INPUT_REQUIRED_METHODS
        self._result: TypeAdapter[Any] = TypeAdapter(result | types.InputRequiredResult if self._asks else result)

    async def __call__(self, ctx: Ctx, params: Any) -> BaseModel:
        try:
            client = await self._child.client()
        except StartProblem as exc:
            raise MCPError(INTERNAL_ERROR, f"the recipe's server has ended and does not start again: {exc}") from exc
        modern = client.protocol_version in MODERN_PROTOCOL_VERSIONS
        if self.method == "logging/setLevel" and modern:
            return types.EmptyResult()
        stateless = ctx.protocol_version in MODERN_PROTOCOL_VERSIONS

        async def in_turns(call: ResumableCall) -> BaseModel:
            mine = params.model_copy(update={"input_responses": None, "request_state": None})
            return await self._called(client, mine, call, call.progress)

        if self._asks and stateless and not modern:
            return await self._suspended.begin_or_resume(ctx, params, in_turns)
        call = SessionCall(ctx)
        result = await self._called(client, params, call, ctx.session.report_progress)
        return result if stateless else await self._answered(client, params, call, result)

    async def _called(self, client: Client, params: Any, call: Call, progress: ProgressFnT) -> BaseModel:
        asked = _made(self._request, params.model_copy(update={"meta": _own_meta(params.meta)}))
        try:
            with self._calls.open(call) if self._asks else nullcontext():
                return await client.session.send_request(asked, self._result, progress_callback=progress)
        except MCPError as exc:
            if exc.code == CONNECTION_CLOSED:
                self._child.lost(client)
                message = "the recipe's server ended during the call; the next call starts it again"
                raise MCPError(INTERNAL_ERROR, message) from exc
            raise

    async def _answered(self, client: Client, params: Any, call: SessionCall, result: BaseModel) -> BaseModel:
        """Ask a caller with a session what a stateless server wants to know, until it has what it needs."""
        rounds = 0
        while isinstance(result, types.InputRequiredResult):
            rounds += 1
            if rounds > MAX_ROUNDS:
                raise MCPError(INTERNAL_ERROR, f"the recipe's server asked more than {rounds - 1} times in one call")
            answers: dict[str, types.InputResponse] = {}
            for key, request in (result.input_requests or {}).items():
                answer = await call.ask(request)
                if isinstance(answer, types.ErrorData):
                    raise MCPError.from_error_data(answer)
                answers[key] = answer
            again = {"input_responses": answers, "request_state": result.request_state}
            result = await self._called(
                client, params.model_copy(update=again), call, call.ctx.session.report_progress
            )
        return result


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
