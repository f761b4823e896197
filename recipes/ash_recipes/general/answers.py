"""How the tools of this recipe answer: text for a model, the same as an object, and typed failures."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec

from fastmcp import FastMCP
from fastmcp.exceptions import ValidationError
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools.base import ToolResult
from mcp_types import CallToolRequestParams, ToolAnnotations
from pydantic import BaseModel
from pydantic import ValidationError as PydanticValidationError

from ash_recipes.general.hints import HINTS
from ash_recipes.runner.arguments import explain
from ash_recipes.runner.output import json_size
from ash_recipes.runner.problems import Problem

__all__ = ["PlainRefusals", "answer", "fitting", "refusal", "tool"]

TEXT_BYTES = 400_000
"""What one text may take on the wire; it goes twice, and clients refuse events over 1 MiB."""

P = ParamSpec("P")


def answer(text: str, shape: BaseModel) -> ToolResult:
    """Return a successful result."""
    return ToolResult(content=text, structured_content=shape.model_dump(mode="json"))


def tool(
    server: FastMCP[Any],
    name: str,
    *,
    title: str,
    output: type[BaseModel],
) -> Callable[[Callable[P, Awaitable[ToolResult]]], Callable[P, Awaitable[ToolResult]]]:
    """Add a function as a tool; a `Problem` that it raises becomes a failed result with its kind."""

    def add(function: Callable[P, Awaitable[ToolResult]]) -> Callable[P, Awaitable[ToolResult]]:
        @functools.wraps(function)
        async def answered(*args: P.args, **kwargs: P.kwargs) -> ToolResult:
            try:
                return await function(*args, **kwargs)
            except Problem as exc:
                return refusal(exc)

        server.tool(
            name=name,
            title=title,
            output_schema=output.model_json_schema(),
            annotations=ToolAnnotations.model_validate({"title": title, **HINTS[name]}),
        )(answered)
        return answered

    return add


class PlainRefusals(Middleware):
    """Says what is wrong with the arguments of a call in a sentence, with a kind, instead of pydantic's report."""

    async def on_call_tool(
        self, context: MiddlewareContext[CallToolRequestParams], call_next: CallNext[CallToolRequestParams, Any]
    ) -> Any:
        try:
            return await call_next(context)
        except (ValidationError, PydanticValidationError) as exc:
            cause = exc if isinstance(exc, PydanticValidationError) else exc.__cause__
            if not isinstance(cause, PydanticValidationError):
                raise
            return refusal(Problem("bad_request", explain(cause, await self._accepted(context))))

    async def _accepted(self, context: MiddlewareContext[CallToolRequestParams]) -> list[str]:
        inner = context.fastmcp_context
        tool = await inner.fastmcp.get_tool(context.message.name) if inner is not None else None
        return sorted(tool.parameters.get("properties", {})) if tool is not None else []


def refusal(problem: Problem) -> ToolResult:
    """Return a failed result."""
    shape = {"error": {"kind": problem.kind, "message": problem.message}}
    return ToolResult(content=f"Error: {problem.message}", structured_content=shape, is_error=True)


def fitting(text: str, budget: int = TEXT_BYTES) -> str:
    """Return as much of the start of `text` as fits in `budget` bytes on the wire."""
    while (size := json_size(text)) > budget:
        text = text[: min(len(text) * budget // size, len(text) - 1)]
    return text
