"""How the tools of this recipe answer: text for a model, the same as an object, and typed failures."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec

from fastmcp import FastMCP
from fastmcp.tools.base import ToolResult
from mcp_types import ToolAnnotations
from pydantic import BaseModel

from ash_recipes.runner.output import json_size
from ash_recipes.runner.problems import Problem

__all__ = ["answer", "fitting", "tool"]

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
    reads_only: bool = False,
    destructive: bool = False,
    idempotent: bool = False,
    open_world: bool = False,
) -> Callable[[Callable[P, Awaitable[ToolResult]]], Callable[P, Awaitable[ToolResult]]]:
    """Add a function as a tool; a `Problem` that it raises becomes a failed result with its kind."""

    def add(function: Callable[P, Awaitable[ToolResult]]) -> Callable[P, Awaitable[ToolResult]]:
        @functools.wraps(function)
        async def answered(*args: P.args, **kwargs: P.kwargs) -> ToolResult:
            try:
                return await function(*args, **kwargs)
            except Problem as exc:
                failed = {"error": {"kind": exc.kind, "message": exc.message}}
                return ToolResult(content=f"Error: {exc.message}", structured_content=failed, is_error=True)

        server.tool(
            name=name,
            title=title,
            output_schema=output.model_json_schema(),
            annotations=ToolAnnotations(
                title=title,
                read_only_hint=reads_only,
                destructive_hint=destructive,
                idempotent_hint=idempotent or reads_only,
                open_world_hint=open_world,
            ),
        )(answered)
        return answered

    return add


def fitting(text: str, budget: int = TEXT_BYTES) -> str:
    """Return as much of the start of `text` as fits in `budget` bytes on the wire."""
    while (size := json_size(text)) > budget:
        text = text[: min(len(text) * budget // size, len(text) - 1)]
    return text
