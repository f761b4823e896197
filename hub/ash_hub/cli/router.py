"""`ash router`: more data plane for hives that share a Redis, without a hub of its own."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["router"]

_PORT = 8421


def router(
    redis_url: Annotated[
        str | None, typer.Option(help="The Redis that the hives share; else ASH_HUB_REDIS_URL.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 takes a free one.  [ASH_HUB_PORT, else 8421]")
    ] = None,
    seed_routes: Annotated[
        bool,
        typer.Option("--seed-routes", help="Serve the routes of the system that Ash began from, and none of a hive."),
    ] = False,
) -> None:
    """Route calls to the sandboxes of hives that share a Redis, until Ctrl-C.

    It takes what goes to a sandbox: /mcp with X-Session-ID, /s/SESSION/mcp, and calls of SESSION_TOOL in the stateless
    era. Spawning is the hives'. The state directory (ASH_HUB_STATE_DIR) must hold their hive.key and keys.json.

    With --seed-routes it takes the place of that system's gateway instead, and needs no hive.
    """
    import os

    from ash_hub.cli.environment import read_settings
    from ash_hub.cli.serving import run_router

    if port is None and "ASH_HUB_PORT" not in os.environ:
        port = _PORT
    settings = read_settings({"host": host, "port": port, "redis_url": redis_url})
    if settings.redis_url is None:
        raise typer.BadParameter("a router reads its routes in a Redis: name it with --redis-url or ASH_HUB_REDIS_URL")
    raise typer.Exit(run_router(settings, seed_routes=seed_routes))
