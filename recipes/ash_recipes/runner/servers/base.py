"""The protocol of a recipe's server as the runner uses it, however the server is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from starlette.types import Receive, Scope, Send

from ash_recipes.runner.tools import RunnerTools

__all__ = ["RecipeServer", "StartProblem", "intercept"]


class StartProblem(Exception):
    """The recipe's server could not be started; the message says why."""


class RecipeServer(Protocol):
    """A recipe's server, running."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request to `/mcp`, of either era."""
        ...

    async def claimed(self, more: Mapping[str, str]) -> None:
        """Take note that `more` has come to the sandbox's environment."""
        ...


def intercept(tools: RunnerTools) -> Any:
    """Return middleware for an SDK server: it answers the runner's own tools, and shortens results of the recipe's."""

    async def answer(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.method != "tools/call" or ctx.request_id is None or not isinstance(ctx.params, Mapping):
            return await call_next(ctx)
        name = ctx.params.get("name")
        if not isinstance(name, str) or name not in tools:
            result = await call_next(ctx)
            return result if tools.results is None else await tools.results.fitting(result)
        result = await tools.call(name, ctx.params.get("arguments"))
        if ctx.protocol_version in MODERN_PROTOCOL_VERSIONS:
            result["resultType"] = "complete"
        return result

    return answer
