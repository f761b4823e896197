"""Says how seldom the garbage collector looked while this was imported, and how seldom it does now."""

from __future__ import annotations

import gc

from fastmcp import FastMCP

server: FastMCP[None] = FastMCP("collecting")
STARTING = gc.get_threshold()[0]


@server.tool
def thresholds() -> list[int]:
    """Return both."""
    return [STARTING, gc.get_threshold()[0]]
