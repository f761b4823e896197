"""A router for the seed's routes, in the place of the seed's gateway: it serves what its hashes name, and no hive.

It holds no key of a hive and follows no routes of one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ash_hub.router_alone import Router
from ash_hub.serving.auth import require_tls_files
from ash_hub.serving.http_server import server_of, url_of
from ash_hub.serving.listeners import listen
from ash_hub.settings import HubSettings
from ash_mcp.errors import ConfigError
from ash_router.admission.gate import HEALTH_PATH, READY_PATH
from ash_router.seed.seed_relay import SeedRelay
from ash_router.seed.uuid_admission import UuidAdmission
from ash_router.store.base import SeedRoutes
from ash_router.store.select import open_seed_routes

__all__ = ["open_seed_router"]


@asynccontextmanager
async def open_seed_router(settings: HubSettings) -> AsyncGenerator[Router]:
    """Serve the seed's routes while the context is open.

    Raises:
        ConfigError: What is missing or wrong, and what to do.
    """
    if settings.redis_url is None:
        raise ConfigError("the seed's routes are in a Redis: set ASH_HUB_REDIS_URL (--redis-url)")
    require_tls_files(settings)
    limits = settings.relay_limits
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(listen(settings.host, settings.port))
        url, patience = settings.redis_url.get_secret_value(), limits.lookup_timeout_seconds
        routes = await stack.enter_async_context(open_seed_routes(url, patience_seconds=patience))
        relay = SeedRelay(limits, settings.seed.answer_seconds)
        stack.push_async_callback(relay.aclose)
        server = server_of(_app(routes), relay.protocol(UuidAdmission(routes)), settings)
        await stack.enter_async_context(server.serving(listener))
        yield Router(url_of(settings, listener.getsockname()[1]), settings)


def _app(routes: SeedRoutes) -> Starlette:
    """Return what answers probes, in the words of the seed's gateway."""

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(_: Request) -> Response:
        reason = await routes.unready()
        return PlainTextResponse(reason or "ready", status_code=503 if reason else 200)

    return Starlette(routes=[Route(HEALTH_PATH, healthz), Route(READY_PATH, readyz)])
