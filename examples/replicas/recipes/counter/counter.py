"""A server that notes each of its calls in a file, and says whose it is."""

import os
from pathlib import Path

from fastmcp import FastMCP

server: FastMCP[None] = FastMCP("counter")


@server.tool
def note(number: int) -> dict[str, str | int]:
    """Note a call."""
    with Path("calls").open("a") as file:
        file.write(f"{number}\n")
    return {"who": os.environ["WHO"], "number": number}
