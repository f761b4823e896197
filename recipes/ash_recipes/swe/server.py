"""The MCP server of the recipe `swe`."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Sequence
from typing import Annotated, Any

import anyio.to_thread
from fastmcp import FastMCP
from fastmcp.tools.base import ToolResult
from mcp_types import ToolAnnotations
from pydantic import Field

from ash_recipes.general import command_tools, edit_tools, file_tools, job_tools
from ash_recipes.general.answers import PlainRefusals, fitting, refusal
from ash_recipes.general.terminal import Terminal
from ash_recipes.runner.context import current
from ash_recipes.runner.execution import execute
from ash_recipes.runner.files import Files
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.regular_files import translated
from ash_recipes.swe.patches import Change, PatchProblem, applied, parse

__all__ = ["build"]

INSTRUCTIONS = (
    "A Linux sandbox for work on source code. Run commands with terminal-controller_execute_command, find things with "
    "search, change files with apply_patch. Relative paths start at the terminal's working directory."
)
TEXT_BYTES = 100_000
FILE_BYTES = 10 * 1024 * 1024
SEARCH_SECONDS = 60.0


def build() -> FastMCP[None]:
    """Return the server, with a terminal of its own in the runner's sandbox."""
    from ash_recipes.swe import RECIPE

    server: FastMCP[None] = FastMCP("swe", instructions=INSTRUCTIONS, middleware=[PlainRefusals()])
    terminal = Terminal(current())
    for tools in (command_tools, job_tools, file_tools, edit_tools):
        tools.add(server, terminal)
    hints = {name: ToolAnnotations.model_validate(given) for name, given in RECIPE["tools"].items()}
    _add_patches(server, terminal, hints["apply_patch"])
    _add_search(server, terminal, hints["search"])
    return server


def _add_patches(server: FastMCP[Any], terminal: Terminal, hints: ToolAnnotations) -> None:
    @server.tool(title="Apply a patch", annotations=hints)
    async def apply_patch(
        patch: Annotated[
            str,
            Field(
                description="A unified diff, or `*** Begin Patch`, then for each file `*** Update File: path` with "
                "hunks of `@@` and lines that begin with a space, - or +, `*** Add File: path` with + lines, or "
                "`*** Delete File: path`, then `*** End Patch`. Show three lines around each change"
            ),
        ],
    ) -> ToolResult:
        """Change, add, move and delete files by one patch: all of it, or nothing where it does not fit.

        Line numbers need not be right, the lines must be.
        """
        try:
            changes = parse(patch)
            done = await anyio.to_thread.run_sync(_apply, terminal, changes)
        except PatchProblem as problem:
            return refusal(Problem("bad_request", str(problem)))
        except Problem as problem:
            return refusal(problem)
        return ToolResult(content="\n".join(done))


def _apply(terminal: Terminal, changes: Sequence[Change]) -> list[str]:
    """Compute all files first, then write them, and return a line for each."""
    files = terminal.files
    after: dict[str, str | None] = {}
    modes: dict[str, int] = {}
    for change in changes:
        path = _place(terminal, change.path)
        before = after[path] if path in after else _text(files, path)
        text = applied(change, before)
        if change.move_to is not None:
            target = _place(terminal, change.move_to)
            if (after[target] if target in after else _text(files, target)) is not None:
                raise PatchProblem(f"{change.move_to} is there already; nothing was changed")
            with contextlib.suppress(FileNotFoundError):  # where the patch adds what it moves
                modes[target] = modes[path] if path in modes else stat.S_IMODE(os.stat(path).st_mode)
            after[path], after[target] = None, text
        else:
            after[path] = text
    for path, text in after.items():
        if text is not None:
            files.write(path, text.encode(errors="surrogateescape"), None, modes.get(path))
        elif _text(files, path) is not None:
            files.remove(path, recursive=False)
    verbs = {"add": "added", "update": "updated", "delete": "deleted"}
    moved = {change.path: f", moved to {change.move_to}" for change in changes if change.move_to is not None}
    return [f"{verbs[change.kind]} {change.path}{moved.get(change.path, '')}" for change in changes]


def _place(terminal: Terminal, path: str) -> str:
    """Return the one path that stands for all ways to write it; a link at its end stays one."""
    with translated(path):
        above, name = os.path.split(os.path.abspath(terminal.files.resolve(terminal.resolve(path))))
        return os.path.join(os.path.realpath(above), name)


def _text(files: Files, path: str) -> str | None:
    with translated(path):
        found = files.resolve(path)
        if not found.exists():
            return None
        is_text = found.is_file() and found.stat().st_size <= FILE_BYTES
    if not is_text:
        raise PatchProblem(f"{path} is no file, or one of more than {FILE_BYTES >> 20} MiB; nothing was changed")
    with files.open(path) as file:
        return file.read().decode(errors="surrogateescape")


def _add_search(server: FastMCP[Any], terminal: Terminal, hints: ToolAnnotations) -> None:
    @server.tool(title="Search", annotations=hints)
    async def search(
        pattern: Annotated[str, Field(min_length=1, description="A regular expression")],
        path: Annotated[str, Field(description="A file or a directory")] = ".",
        glob: Annotated[str | None, Field(description="Only files whose names match, as `*.py`")] = None,
        context: Annotated[int, Field(ge=0, le=20, description="Lines around each match")] = 0,
        ignore_case: bool = False,
    ) -> ToolResult:
        """Find lines in the files of a directory, as `path:line:text`.

        Hidden and binary files are left out, and with ripgrep what .gitignore names.
        """
        here = current()
        try:
            done = await execute(
                here,
                _search_words(pattern, terminal.resolve(path), glob, context, ignore_case=ignore_case),
                cwd=terminal.cwd,
                env=here.environment.variables(),
                timeout_seconds=SEARCH_SECONDS,
                output_limit=TEXT_BYTES,
            )
        except Problem as problem:
            return refusal(problem)
        if done.timed_out:
            return refusal(
                Problem("bad_request", f"it took longer than {SEARCH_SECONDS:g} s; search a smaller directory")
            )
        text = done.stdout.text().rstrip("\n")
        if done.exit_code > 1 and not text:
            return refusal(Problem("bad_request", done.stderr.text().strip() or "the search failed"))
        return ToolResult(content=fitting(text, TEXT_BYTES) or "nothing found")


def _search_words(pattern: str, path: str, glob: str | None, context: int, *, ignore_case: bool) -> list[str]:
    case = ["-i"] if ignore_case else []
    around = [f"-C{context}"] if context else []
    if shutil.which("rg"):
        only = ["--glob", glob] if glob else []
        return ["rg", "--no-heading", "-nH", "--max-columns", "500", *case, *around, *only, "-e", pattern, "--", path]
    only = [f"--include={glob}"] if glob else []
    hidden = ["--exclude-dir=.[!.]*", "--exclude=.*"]
    return ["grep", "-rnHIE", *case, *around, *only, *hidden, "-e", pattern, "--", path]
