"""A FastMCP server in the runner's own process."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send

from ash_recipes.runner.servers.base import RecipeServer, StartProblem, intercept
from ash_recipes.runner.tools import RunnerTools

if TYPE_CHECKING:
    from fastmcp import FastMCP

__all__ = ["PythonServer", "keep_loaded", "open_python"]

loaded: dict[str, FastMCP[Any]] = {}
"""Servers that are there before anybody opens them, by their targets."""


class PythonServer:
    """Serves a FastMCP server's own ASGI app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def claimed(self, more: Mapping[str, str]) -> None:
        """Nothing to do: the claimed variables stand in this process's environment already."""


@asynccontextmanager
async def open_python(target: str, tools: RunnerTools, folder: Path | None) -> AsyncGenerator[RecipeServer]:
    """Load `module:object` and serve it until the context is left.

    Raises:
        StartProblem: It could not be loaded, or is no FastMCP server.
    """
    if folder is not None and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    server = loaded.get(target) or _load(target)
    # The SDK's own seam below FastMCP: what is not for the recipe never runs its validation and middleware.
    seam, own = server._mcp_server.middleware, intercept(tools)  # pyright: ignore[reportPrivateUsage]
    seam.insert(0, own)
    # Who may call is checked by the runner's token; a host or an origin of the hive says nothing here.
    app = server.http_app(path="/mcp", host_origin_protection=False, stateless_http=False)
    try:
        async with app.router.lifespan_context(app):
            yield PythonServer(app)
    finally:
        seam.remove(own)


def keep_loaded(target: str, folder: Path | None) -> None:
    """Load `module:object` now, for each `open_python` of this process and of those that are forked from it.

    Raises:
        StartProblem: As `open_python`.
    """
    if folder is not None and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    loaded[target] = _load(target)


def _load(target: str) -> FastMCP[Any]:
    module_name, _, attribute = target.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), attribute)
        from fastmcp import FastMCP

        server = found if isinstance(found, FastMCP) else found()  # pyright: ignore[reportUnknownVariableType]
    except Exception as exc:
        traceback.print_exc()
        raise StartProblem(f"{target} could not be loaded: {type(exc).__name__}: {exc}") from exc
    if not isinstance(server, FastMCP):
        raise StartProblem(f"{target} is a {type(server).__name__}, not a FastMCP server")
    return cast("FastMCP[Any]", server)
