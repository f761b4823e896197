"""Whether this sandbox can reach anything, and the error that says so when it cannot."""

from __future__ import annotations

import os
import socket

from ash_recipes.runner.problems import Problem

__all__ = ["proxy", "require_network"]


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
        raise Problem(
            "no_network",
            'this sandbox has no network (its policy is "none"), so nothing on the web can be reached from it; if '
            'the task needs it, spawn a sandbox with network="internet" or a list of domains, where this hive '
            "offers that",
        )
