"""The MCP server of the recipe `echo`. All that Ash needs of a Python recipe is such an object."""

from __future__ import annotations

import os
from typing import Annotated

import anyio
from fastmcp import Context, FastMCP
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

__all__ = ["server"]

server: FastMCP[None] = FastMCP("echo", instructions="Says back what it is told.")

READS_ONLY = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)


class Echoed(BaseModel):
    text: str


class Who(BaseModel):
    who: str | None
    """The environment variable WHO of the sandbox; null when it is not set."""


class Slept(BaseModel):
    steps: int


@server.tool(title="Echo", annotations=READS_ONLY)
def echo(text: Annotated[str, Field(description="What to say back")]) -> Echoed:
    """Return the text unchanged."""
    return Echoed(text=text)


@server.tool(title="Who am I", annotations=READS_ONLY)
def whoami() -> Who:
    """Return the sandbox's environment variable WHO, to see what a spawn was given."""
    return Who(who=os.environ.get("WHO"))


@server.tool(title="Slow", annotations=READS_ONLY)
async def slow(
    ctx: Context,
    steps: Annotated[int, Field(ge=1, le=1000, description="How many steps to take")] = 5,
    seconds: Annotated[float, Field(ge=0, le=600, description="How long all of them take")] = 1.0,
) -> Slept:
    """Take some steps, reporting progress after each; stops when the call is cancelled."""
    await ctx.info(f"taking {steps} steps in {seconds:g} s")
    for step in range(1, steps + 1):
        await anyio.sleep(seconds / steps)
        await ctx.report_progress(step, steps, f"step {step} of {steps}")
    return Slept(steps=steps)
