"""Servers that a command starts: reads what the recipe says of it and opens the bridge to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from ash_recipes.runner.context import Context
from ash_recipes.runner.servers.asking import Calls
from ash_recipes.runner.servers.base import RecipeServer, StartProblem
from ash_recipes.runner.servers.bridge import open_bridge
from ash_recipes.runner.servers.child import Child, http_client_of, stdio_client_of
from ash_recipes.runner.servers.suspended_calls import SuspendedCalls
from ash_recipes.runner.tools import RunnerTools

__all__ = ["open_http", "open_stdio"]


@asynccontextmanager
async def open_stdio(
    asked: Mapping[str, Any], context: Context, tools: RunnerTools, folder: Path | None
) -> AsyncGenerator[RecipeServer]:
    """Serve a command that speaks MCP on its stdin and stdout.

    Raises:
        StartProblem: It does not start.
    """
    words, calls = _words(asked), Calls()
    child = Child(context, lambda: stdio_client_of(words, context, folder or context.workspace, calls))
    async with open_bridge(child, calls, SuspendedCalls(context.jobs.tasks), tools) as server:
        yield server


@asynccontextmanager
async def open_http(
    asked: Mapping[str, Any], context: Context, tools: RunnerTools, folder: Path | None
) -> AsyncGenerator[RecipeServer]:
    """Serve a command that serves streamable HTTP on a port of loopback.

    Raises:
        StartProblem: It does not start.
    """
    words, calls = _words(asked), Calls()
    port, path = asked.get("port"), asked.get("path") or "/mcp"
    if not isinstance(port, int) or not isinstance(path, str):
        raise StartProblem("an http server needs a port, and its path is a string")
    url = f"http://127.0.0.1:{port}{path}"
    child = Child(context, lambda: http_client_of(words, url, context, folder or context.workspace, calls))
    async with open_bridge(child, calls, SuspendedCalls(context.jobs.tasks), tools) as server:
        yield server


def _words(asked: Mapping[str, Any]) -> list[str]:
    command = asked.get("command")
    if not isinstance(command, list) or not command:
        raise StartProblem("the server's command is a list of words")
    return [str(word) for word in cast("list[Any]", command)]
