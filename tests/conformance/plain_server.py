"""A plain FastMCP server, the peer of the hive's endpoint: like it, without the suite's own fixture tools."""

from __future__ import annotations

import sys

import anyio
from fastmcp import FastMCP

server: FastMCP[None] = FastMCP("plain")


@server.tool
def add(first: int, second: int) -> int:
    """Add two numbers."""
    return first + second


if __name__ == "__main__":
    anyio.run(lambda: server.run_http_async(port=int(sys.argv[1]), show_banner=False, log_level="error"))
