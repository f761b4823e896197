"""Tools that look at directories and files, and write whole ones."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, Literal

import anyio.to_thread
from fastmcp import FastMCP
from fastmcp.tools.base import ToolResult
from pydantic import BaseModel, Field

from ash_recipes.general.answers import answer, fitting, tool
from ash_recipes.general.rows import terminated
from ash_recipes.general.terminal import Terminal
from ash_recipes.runner.files import Files
from ash_recipes.runner.output import json_size
from ash_recipes.runner.problems import Problem

__all__ = ["Content", "FilePath", "add", "as_text", "replace"]

READ_BYTES = 200_000
"""What a file's text may take on the wire; it goes twice."""
ROW_BYTES = 1024 * 1024
"""Longer rows are read in pieces, so that a file without newlines does not fill the memory."""

FilePath = Annotated[str, Field(description="Absolute, relative to the working directory, or from ~")]
Content = Annotated[
    str | dict[str, Any] | list[Any], Field(description="Text; an object or a list is written as JSON")
]


class Entry(BaseModel):
    name: str
    type: Literal["file", "directory", "symlink", "other"]
    size: int
    mode: int
    modified_at: str


class Listing(BaseModel):
    path: str
    entries: list[Entry]
    total: Annotated[int, Field(description="How many there are; more than are shown when truncated")]
    truncated: bool


class FileText(BaseModel):
    path: str
    content: str
    start_row: int
    rows: Annotated[int, Field(description="How many rows the content holds")]
    next_row: Annotated[int | None, Field(description="Where to read on, when not all that was asked for is here")]


class WrittenFile(BaseModel):
    path: str
    size: int


def add(server: FastMCP[Any], terminal: Terminal) -> None:
    """Add the tools; their relative paths start at the terminal's working directory."""
    _add_reading(server, terminal)
    _add_writing(server, terminal)


def _add_reading(server: FastMCP[Any], terminal: Terminal) -> None:
    @tool(server, "terminal-controller_list_directory", title="List a directory", output=Listing)
    async def list_directory(
        path: Annotated[str | None, Field(description="Which one; null for the working directory")] = None,
    ) -> ToolResult:
        """List the files and subdirectories of a directory."""
        found = terminal.files.resolve(terminal.resolve(path)) if path is not None else terminal.cwd
        listing = await anyio.to_thread.run_sync(terminal.files.list, str(found))
        shape = Listing(path=str(found), **listing)
        return answer(_describe(shape), shape)

    @tool(server, "terminal-controller_read_file", title="Read a file", output=FileText)
    async def read_file(
        path: FilePath,
        start_row: Annotated[int | None, Field(ge=0, description="First row, counted from 0")] = None,
        end_row: Annotated[
            int | None, Field(ge=0, description="Last row, included; start_row alone reads one")
        ] = None,
        as_json: Annotated[bool, Field(description="Check that it is JSON and indent it")] = False,
    ) -> ToolResult:
        """Read a text file, whole or some of its rows. Rows that are asked for come with their numbers."""
        if as_json and start_row is not None:
            raise Problem("bad_request", "rows cannot be read as JSON; leave out start_row or as_json")
        if end_row is not None and end_row < (start_row or 0):
            raise Problem("bad_request", "end_row must not be less than start_row")
        found = terminal.resolve(path)
        if as_json:
            return await _read_json(terminal, found)
        first = start_row or 0
        last = first if start_row is not None and end_row is None else end_row
        numbered = start_row is not None
        shape = await anyio.to_thread.run_sync(_read_rows, terminal.files, found, first, last)
        if numbered and shape.rows == 0:
            raise Problem("bad_request", f"start_row {first} is out of range: {path} ends before it")
        lines = shape.content.split("\n") if numbered else []
        text = "".join(f"Line {first + at}: {line}\n" for at, line in enumerate(lines[: shape.rows]))
        text = text if numbered else shape.content
        if shape.next_row is not None:
            text += f"\n[More follows; read on with start_row={shape.next_row} and an end_row.]"
        return answer(text, shape)


def _add_writing(server: FastMCP[Any], terminal: Terminal) -> None:
    @tool(
        server,
        "terminal-controller_write_file",
        title="Write a file",
        output=WrittenFile,
    )
    async def write_file(
        path: FilePath,
        content: Content,
        mode: Annotated[
            Literal["overwrite", "append"], Field(description="Replace the file or add to its end")
        ] = "overwrite",
    ) -> ToolResult:
        """Write a text file; missing directories are made, and a newline at the end is added where it is missing."""
        found, text = terminal.resolve(path), terminated(as_text(content))
        size = await anyio.to_thread.run_sync(_write, terminal.files, found, text, mode)
        shape = WrittenFile(path=str(terminal.files.resolve(found)), size=size)
        return answer(f"Successfully wrote {size} bytes to '{path}' in {mode} mode.", shape)


def as_text(content: str | dict[str, Any] | list[Any]) -> str:
    """Return what is to be written: text as it is, anything else as indented JSON."""
    return content if isinstance(content, str) else json.dumps(content, indent=4, ensure_ascii=False)


def replace(files: Files, path: str, text: str) -> int:
    """Replace a file's content as a whole, or not at all, and return its size."""
    upload = files.upload(path)
    try:
        upload.write(text.encode("utf-8", "surrogateescape"))
        return upload.finish()
    finally:
        upload.abandon()


def _write(files: Files, path: str, text: str, mode: str) -> int:
    if mode == "overwrite":
        return replace(files, path, text)
    return files.append(path, text.encode("utf-8", "surrogateescape"))


def _describe(listing: Listing) -> str:
    if not listing.entries:
        return f"Directory '{listing.path}' is empty"
    parts = {"Directories": "", "Files": ""}
    for entry in listing.entries:
        if entry.type == "directory" or os.path.isdir(os.path.join(listing.path, entry.name)):
            parts["Directories"] += f"📁 {entry.name}/\n"
        else:
            parts["Files"] += f"📄 {entry.name}\n"
    told = "\n".join(f"{title}:\n{lines}" for title, lines in parts.items() if lines)
    cut = f"\n[{len(listing.entries)} of {listing.total} entries shown]" if listing.truncated else ""
    return f"Contents of directory '{listing.path}':\n\n{told}{cut}"


def _rows_of(file: BinaryIO) -> Iterator[bytes]:
    with io.BufferedReader(file) as buffered:  # pyright: ignore[reportArgumentType]
        while row := buffered.readline(ROW_BYTES):
            yield row


def _read_rows(files: Files, path: str, first: int, last: int | None) -> FileText:
    parts: list[str] = []
    room, next_row = READ_BYTES, None
    for number, raw in enumerate(_rows_of(files.open(path))):
        if last is not None and number > last:
            break
        if number < first:
            continue
        row = raw.decode("utf-8", "replace")
        size = json_size(row)
        if size > room:
            next_row = number
            if not parts:  # one row alone is too long: its start is better than nothing
                parts.append(fitting(row, room) + "…")
                next_row = number + 1
            break
        room -= size
        parts.append(row)
    return FileText(
        path=str(files.resolve(path)), content="".join(parts), start_row=first, rows=len(parts), next_row=next_row
    )


async def _read_json(terminal: Terminal, path: str) -> ToolResult:
    shape = await anyio.to_thread.run_sync(_read_rows, terminal.files, path, 0, None)
    if shape.next_row is not None:
        raise Problem("bad_request", f"{path} is too long to be read as JSON here; use a command such as jq")
    try:
        parsed = json.loads(shape.content)
    except (ValueError, RecursionError) as exc:
        raise Problem("bad_request", f"{path} is not valid JSON: {exc}") from exc
    indented = json.dumps(parsed, indent=4, ensure_ascii=False)
    if json_size(indented) > 2 * READ_BYTES:
        raise Problem("bad_request", f"{path} is too long to be read as JSON here; use a command such as jq")
    return answer(indented, shape.model_copy(update={"content": indented}))
