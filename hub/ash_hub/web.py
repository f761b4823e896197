"""The hive's ASGI app: MCP, health, readiness, metrics. Whatever reaches it was admitted before."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ash_hub.metrics import CONTENT_TYPE, Metrics
from ash_mcp.errors import HiveFault, NotFound
from ash_mcp.wire import HEADER_ORIGIN, MCP_PATH, ORIGIN_HUB, failure_to_json, http_status
from ash_router.admission import ADMITTED_KEY

__all__ = ["build_app"]

_OURS = {HEADER_ORIGIN: ORIGIN_HUB}


def build_app(mcp: ASGIApp, metrics: Metrics, unready: Callable[[], str | None]) -> ASGIApp:
    """Return the app.

    Args:
        mcp: Serves `/mcp`.
        unready: Why the hive cannot serve now, or None.
    """

    async def home(request: Request) -> Response:
        url = str(request.url.replace(path=MCP_PATH, query=""))
        return PlainTextResponse(f"Ash, the Agent Sandbox Hive. Connect an MCP host to {url}\n", headers=_OURS)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok", headers=_OURS)

    async def readyz(_: Request) -> Response:
        reason = unready()
        return PlainTextResponse(reason or "ready", status_code=503 if reason else 200, headers=_OURS)

    async def show_metrics(_: Request) -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE, headers=_OURS)

    async def not_found(request: Request, _: Exception) -> Response:
        error = NotFound(f"there is nothing at {request.url.path}; MCP is at {MCP_PATH}")
        return JSONResponse({"error": failure_to_json(error)}, status_code=404, headers=_OURS)

    app = Starlette(
        routes=[
            Route("/", home),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", show_metrics),
        ],
        exception_handlers={404: not_found},
    )

    async def admitted_only(scope: Scope, receive: Receive, send: Send) -> None:
        if ADMITTED_KEY not in scope:
            error = HiveFault("a request came in past admission")
            await JSONResponse({"error": failure_to_json(error)}, http_status(error))(scope, receive, send)
        elif scope["path"] == MCP_PATH:
            await mcp(scope, receive, _marked(send))
        else:
            await app(scope, receive, send)

    return admitted_only


def _marked(send: Send) -> Send:
    """Add to each answer that it is the hive's own."""
    ours = (HEADER_ORIGIN.encode(), ORIGIN_HUB.encode())

    async def mark(message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            headers = message.get("headers", ())
            message = {**message, "headers": [*headers, ours]}  # type: ignore[misc]
        await send(message)

    return mark  # type: ignore[return-value]
