"""A server of its own for streamable HTTP or stdio: tools, a resource and a prompt, as a recipe may bring them."""

from __future__ import annotations

import sys

from fastmcp import FastMCP

from ash_recipes.echo.server import server

dual: FastMCP[None] = FastMCP("dual", instructions="A server with everything.", version="9.9")
dual.mount(server)


@dual.resource("note://{name}")
def note(name: str) -> str:
    """Return a note."""
    return f"note {name}"


@dual.resource("note://first")
def first() -> str:
    """Return the first note."""
    return "the first"


@dual.prompt
def greet(name: str) -> str:
    """Return a greeting."""
    return f"Greet {name}."


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        dual.run(transport="stdio", show_banner=False)
    else:
        dual.run(transport="http", port=int(sys.argv[1]), show_banner=False, log_level="error")
