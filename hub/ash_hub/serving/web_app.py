"""The hive's ASGI app: MCP, health, readiness, metrics.

Whatever reaches it was admitted before, and the relay marks its answers as the hub's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ash_hub.serving.metrics import CONTENT_TYPE, Metrics
from ash_mcp.errors import HiveFault, NotFound
from ash_mcp.wire import MCP_PATH, failure_to_json, http_status
from ash_router.admission.base import ADMITTED_KEY

__all__ = ["build_app"]


def build_app(
    mcp: ASGIApp,
    metrics: Metrics,
    unready: Callable[[], str | None],
    unready_for_calls: Callable[[], str | None],
    more: Sequence[Route] = (),
    note: str | None = None,
) -> ASGIApp:
    """Return the app.

    Args:
        mcp: Serves `/mcp`.
        unready: Why something of the hive does not work now, spawns included; None when all works.
        unready_for_calls: Why calls to known sandboxes do not work now, or None. A balancer asks this one: a store or
            a backend that is away must not take every replica out of rotation.
        more: Further routes.
        note: What a ready hive has to say as well.
    """

    async def home(request: Request) -> Response:
        url = str(request.url.replace(path=MCP_PATH, query=""))
        return PlainTextResponse(f"Ash, the Agent Sandbox Hive. Connect an MCP host to {url}\n")

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(_: Request) -> Response:
        reason = unready()
        ready = "ready" if note is None else f"ready; note: {note}"
        return PlainTextResponse(reason or ready, status_code=503 if reason else 200)

    async def readyz_calls(_: Request) -> Response:
        reason = unready_for_calls()
        return PlainTextResponse(reason or "ready", status_code=503 if reason else 200)

    async def show_metrics(_: Request) -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)

    async def not_found(request: Request, _: Exception) -> Response:
        error = NotFound(f"there is nothing at {request.url.path}; MCP is at {MCP_PATH}")
        return JSONResponse({"error": failure_to_json(error)}, status_code=404)

    app = Starlette(
        routes=[
            Route("/", home),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/readyz/calls", readyz_calls),
            Route("/metrics", show_metrics),
            *more,
        ],
        exception_handlers={404: not_found},
    )

    async def admitted_only(scope: Scope, receive: Receive, send: Send) -> None:
        if ADMITTED_KEY not in scope:
            error = HiveFault("a request came in past admission")
            await JSONResponse({"error": failure_to_json(error)}, http_status(error))(scope, receive, send)
        elif scope["path"] == MCP_PATH:
            await mcp(scope, receive, send)
        else:
            await app(scope, receive, send)

    return admitted_only
