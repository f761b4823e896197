"""`ash up`: a hive in the foreground, or the stdio bridge to one."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from ash_mcp.cli.context import run_async

__all__ = ["up"]


def up(
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.  [8420]")] = None,
    backend: Annotated[str | None, typer.Option(help="Where sandboxes are made.  [local]")] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="Redis that hives share to be one. A URL with a password belongs in ASH_HUB_REDIS_URL."),
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(help="HOST:PORT at which the other hives reach this one.  [127.0.0.1, a free port]")
    ] = None,
    stdio: Annotated[
        bool, typer.Option("--stdio", help="Speak MCP on stdin and stdout for the hive that runs, or for a new one.")
    ] = False,
    demo: Annotated[bool, typer.Option("--demo", help="First show what a hive does: a sandbox from start to end.")] = (
        False
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Leave sandboxes running when the hive stops.")] = False,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Run sandboxes without isolation where it is missing.")] = (
        False
    ),
) -> None:
    """Run a hive on this machine until Ctrl-C.

    Every other setting comes from the environment: ASH_HUB_TTL_SECONDS, ASH_HUB_LIMITS__SANDBOXES and so on.
    """
    if stdio:
        if demo or any(value is not None for value in (host, port, backend, redis_url, advertise)) or keep or unsafe:
            raise typer.BadParameter(
                "--stdio joins the hive that runs, or starts one with the settings of the environment; "
                "leave the other options out"
            )
        from ash_mcp.bridge.stdio_bridge import run_bridge

        run_async(run_bridge)
        return
    if redis_url is not None and "@" in redis_url:
        raise typer.BadParameter("others could read the password in --redis-url; set ASH_HUB_REDIS_URL to it instead")
    gc.disable()  # what is imported stays: looking for garbage in it is a seventh of the start
    from ash_hub.cli.environment import read_settings
    from ash_hub.cli.serving import run_hive

    gc.freeze()
    gc.enable()
    options = {
        "host": host,
        "port": port,
        "backend": {"kind": backend} if backend is not None else None,
        "redis_url": redis_url,
        "advertise": advertise,
        "keep": keep or None,
    }
    settings = read_settings(options, unsafe=unsafe)
    raise typer.Exit(run_hive(settings, demo=demo))
