"""The MCP server of the recipe `python`."""

from __future__ import annotations

from typing import Annotated

from fastmcp import FastMCP
from fastmcp.tools.base import ToolResult
from mcp_types import ImageContent, TextContent, ToolAnnotations
from pydantic import Field

from ash_recipes.general.answers import PlainRefusals, fitting, refusal
from ash_recipes.python.session import Ran, Session
from ash_recipes.runner.context import current
from ash_recipes.runner.execution import execute
from ash_recipes.runner.problems import Problem

__all__ = ["build"]

INSTRUCTIONS = (
    "A Python interpreter. Variables last from one `run` to the next; the value of the last line is shown, and so are "
    "matplotlib's figures. Files are in the working directory."
)
TEXT_BYTES = 200_000
INSTALL_SECONDS, INSTALL_BYTES = 600.0, 16_384


def build() -> FastMCP[None]:
    """Return the server, with an interpreter of its own in the runner's sandbox."""
    from ash_recipes.python import RECIPE

    server: FastMCP[None] = FastMCP("python", instructions=INSTRUCTIONS, middleware=[PlainRefusals()])
    session = Session(current())
    hints = {name: ToolAnnotations.model_validate(given) for name, given in RECIPE["tools"].items()}

    @server.tool(title="Run Python", annotations=hints["run"])
    async def run(
        code: Annotated[str, Field(description="Any number of lines; the value of the last one is shown")],
        timeout: Annotated[  # noqa: ASYNC109 (a name that callers know)
            float, Field(gt=0, le=86_400, description="Seconds after which it is interrupted")
        ] = 60,
    ) -> ToolResult:
        """Run code in the session's interpreter and return what it printed, its last value and its figures.

        Variables, imports and open files last until the next call. `display(value)` shows a value before the end. Of
        long text the beginning and the end are shown. Standard input is closed.
        """
        try:
            return _result(await session.run(code, timeout))
        except Problem as problem:
            return refusal(problem)

    @server.tool(title="Install packages", annotations=hints["install"])
    async def install(
        packages: Annotated[list[str], Field(min_length=1, description="As pip takes them: `pandas`, `numpy==2.1`")],
    ) -> ToolResult:
        """Install packages from PyPI for the session's interpreter, which can import them at once."""
        context = current()
        words = ["python3", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet", "--"]
        try:
            done = await execute(
                context,
                [*words, *packages],
                cwd=context.workspace,
                env=context.environment.variables(),
                timeout_seconds=INSTALL_SECONDS,
                output_limit=INSTALL_BYTES,
            )
        except Problem as problem:
            return refusal(problem)
        text = (done.stdout.text() + done.stderr.text()).strip() or f"installed {', '.join(packages)}"
        return ToolResult(content=fitting(text, TEXT_BYTES), is_error=done.exit_code != 0)

    @server.tool(title="Restart the interpreter", annotations=hints["restart"])
    async def restart() -> str:
        """Start the interpreter anew: all variables are gone, files stay."""
        await session.restart()
        return "the interpreter is a new one"

    return server


def _result(ran: Ran) -> ToolResult:
    notes: list[str] = []
    if ran.timed_out:
        notes.append("[interrupted: it took longer than its timeout]")
    if ran.lost is not None:
        notes.append(f"[the interpreter is a new one, and all variables are gone: {ran.lost}]")
    if ran.pictures_left_out:
        notes.append(f"[{ran.pictures_left_out} pictures left out: too large or too many; save them to files]")
    text = "\n".join(part for part in (fitting(ran.text, TEXT_BYTES).rstrip("\n"), *notes) if part)
    pictures = [ImageContent(type="image", mime_type=kind, data=data) for kind, data in ran.pictures]
    if not text and not pictures:
        text = "[nothing was printed]"
    blocks = [*([TextContent(type="text", text=text)] if text else []), *pictures]
    return ToolResult(content=blocks, is_error=not ran.ok)
