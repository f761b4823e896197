"""Tools that change rows of a text file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import anyio.to_thread
from fastmcp import FastMCP
from fastmcp.tools.base import ToolResult
from pydantic import BaseModel, Field

from ash_recipes.general import rows as edits
from ash_recipes.general.answers import answer, tool
from ash_recipes.general.file_tools import Content, FilePath, as_text, replace
from ash_recipes.general.terminal import Terminal
from ash_recipes.runner.files import Files
from ash_recipes.runner.problems import Problem

__all__ = ["add"]

EDIT_BYTES = 10 * 1024 * 1024
"""Larger files are for a command such as sed."""

Row = Annotated[int | None, Field(description="One row, counted from 0")]
Rows = Annotated[list[int] | None, Field(description="Several rows, counted from 0")]
Substring = Annotated[str | None, Field(description="Only this part of the rows, not all of them")]


class Edited(BaseModel):
    path: str
    rows: Annotated[list[int], Field(description="The rows that were changed, by their numbers before")]
    total_rows: Annotated[int, Field(description="How many rows the file has now")]
    size: int


def add(server: FastMCP[Any], terminal: Terminal) -> None:
    """Add the tools; their relative paths start at the terminal's working directory."""

    async def edit(path: str, change: Callable[[str], edits.Change], *, create: bool = False) -> Edited:
        found = terminal.resolve(path)
        return await anyio.to_thread.run_sync(_edit, terminal.files, found, change, create)

    @tool(server, "terminal-controller_insert_file_content", title="Insert into a file", output=Edited)
    async def insert_file_content(path: FilePath, content: Content, row: Row = None, rows: Rows = None) -> ToolResult:
        """Insert text before a row, or before several; without row and rows it goes to the end.

        The file is made if there is none.
        """
        at = edits.wanted(row, rows)
        shape = await edit(path, lambda text: edits.insert(text, as_text(content), at), create=True)
        if at is None:
            return answer(f"Successfully appended content to '{path}'.", shape)
        return answer(f"Successfully inserted content at {_named(row, at)} in '{path}'.", shape)

    @tool(server, "terminal-controller_delete_file_content", title="Delete from a file", output=Edited)
    async def delete_file_content(
        path: FilePath, row: Row = None, rows: Rows = None, substring: Substring = None
    ) -> ToolResult:
        """Delete a row or several, or only a substring of them; without row and rows, of the whole file."""
        at = edits.wanted(row, rows)
        shape = await edit(path, lambda text: edits.delete(text, at, substring))
        if substring is not None:
            return answer(_describe("removed", substring, shape, path), shape)
        if at is None:
            return answer(f"Successfully cleared all content from '{path}'.", shape)
        return answer(f"Successfully deleted {_named(row, shape.rows)} from '{path}'.", shape)

    @tool(
        server,
        "terminal-controller_update_file_content",
        title="Change a file",
        output=Edited,
    )
    async def update_file_content(
        path: FilePath, content: Content, row: Row = None, rows: Rows = None, substring: Substring = None
    ) -> ToolResult:
        """Replace a row or several, or only a substring of them; without row and rows, in the whole file."""
        at = edits.wanted(row, rows)
        shape = await edit(path, lambda text: edits.update(text, as_text(content), at, substring))
        if substring is not None:
            return answer(_describe("updated", substring, shape, path), shape)
        if at is None:
            return answer(f"Successfully updated all content in '{path}'.", shape)
        return answer(f"Successfully updated {_named(row, shape.rows)} in '{path}'.", shape)


def _edit(files: Files, path: str, change: Callable[[str], edits.Change], create: bool) -> Edited:
    text = ""
    try:
        with files.open(path) as file:
            raw = file.read(EDIT_BYTES + 1)
    except Problem as exc:
        if exc.kind != "file_not_found" or not create:
            raise
    else:
        if len(raw) > EDIT_BYTES:
            raise Problem("bad_request", f"{path} is larger than 10 MiB; change it by a command such as sed")
        # Bytes that are not UTF-8 come back as they were.
        text = raw.decode("utf-8", "surrogateescape")
    changed = change(text)
    size = replace(files, path, changed.text)
    total = len(edits.split(changed.text))
    return Edited(path=str(files.resolve(path)), rows=changed.rows[:1000], total_rows=total, size=size)


def _named(row: int | None, rows: list[int]) -> str:
    return f"row {row}" if row is not None else f"rows {rows[:20]}"


def _describe(done: str, substring: str, shape: Edited, path: str) -> str:
    shown = substring if len(substring) <= 100 else substring[:99] + "…"
    if not shape.rows:
        return f"No occurrences of '{shown}' found in '{path}'."
    return f"Successfully {done} '{shown}' in {len(shape.rows)} rows ({shape.rows[:20]}) of '{path}'."
