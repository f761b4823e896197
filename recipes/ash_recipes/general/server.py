"""The MCP server of the recipe `general`."""

from __future__ import annotations

from fastmcp import FastMCP

from ash_recipes.general import command_tools, edit_tools, fetch_tools, file_tools, job_tools, search_tools
from ash_recipes.general.answers import PlainRefusals
from ash_recipes.general.terminal import Terminal
from ash_recipes.runner.context import current

__all__ = ["build"]

INSTRUCTIONS = (
    "A Linux sandbox. Run commands with terminal-controller_execute_command: the working directory and exported "
    "variables last from one call to the next. Use start_job for what runs longer than a call. Paths are relative to "
    "the terminal's working directory."
)


def build() -> FastMCP[None]:
    """Return the server, with a terminal of its own in the runner's sandbox."""
    server: FastMCP[None] = FastMCP("general", instructions=INSTRUCTIONS, middleware=[PlainRefusals()])
    terminal = Terminal(current())
    for tools in (command_tools, job_tools, file_tools, edit_tools):
        tools.add(server, terminal)
    fetch_tools.add(server)
    search_tools.add(server)
    return server
