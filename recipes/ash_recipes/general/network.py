"""Whether this sandbox can reach anything, and the error that says so when it cannot."""

from __future__ import annotations

import os
import socket

from ash_recipes.runner.context import current
from ash_recipes.runner.problems import Problem

__all__ = ["proxy", "refused_by_policy", "require_network"]

_ASK_SECONDS = 5.0


def proxy() -> str | None:
    """Return the proxy that the sandbox was given, if any."""
    names = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    return next((value for name in names if (value := os.environ.get(name))), None)


def require_network() -> None:
    """Return if the sandbox has a proxy or an interface beside loopback.

    Raises:
        Problem: `no_network`.
    """
    if proxy() is None and all(name == "lo" for _, name in socket.if_nameindex()):
        note = current().network_note
        what = note or "network: none, as its spawn or its recipe asked"
        advice = "" if note else '; if the task needs it, spawn one with network="internet" or a list of domains'
        raise Problem("no_network", f"this sandbox has {what}, so nothing on the web can be reached from it{advice}")


async def refused_by_policy(url: str) -> str | None:
    """Return how the hive's egress proxy refuses `url`, and by which policy; None where it lets it out, or is away.

    Only for a request that failed, whose library tells no more: this makes another one.
    """
    import httpx

    try:
        async with httpx.AsyncClient(timeout=_ASK_SECONDS) as client, client.stream("GET", url) as response:
            return response.reason_phrase if "ash-egress" in response.headers else None
    except httpx.HTTPError:
        return None
