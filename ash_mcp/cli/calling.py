"""`ash tools` and `ash call`: a sandbox's own tools."""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from ash_mcp.cli.arguments import check_required, read_arguments, read_json_arguments, usage_of
from ash_mcp.cli.context import Cli, SessionArgument
from ash_mcp.cli.output import clean, emit_json, emit_text
from ash_mcp.cli.values import read_duration
from ash_mcp.cli.waiting import waiting
from ash_mcp.results import CallResult, Progress
from ash_mcp.types import Tool

__all__ = ["call", "tools"]


class Output(StrEnum):
    TEXT = "text"
    JSON = "json"


async def tools(
    cli: Cli,
    session: SessionArgument,
    tool: Annotated[str | None, typer.Argument(help="Only this one, with all that is known of it.")] = None,
) -> None:
    """Show the tools of a sandbox, as `ash call` takes them."""
    async with cli.sandbox(session) as box:
        found = [item for item in await box.tools() if tool in (None, item.name)]
    if tool is not None and not found:
        raise typer.BadParameter(f"{session} has no tool {tool!r}; `ash tools {session}` shows what it has")
    lines: list[str] = []
    for item in found:
        description = clean(item.description.strip() if tool else item.description.strip().partition("\n")[0])
        lines += [clean(item.name), *(f"    {line}" for line in description.splitlines())]
        lines.append(f"    {clean(usage_of(item.name, item.input_schema))}")
    cli.tell({"tools": [_shape(item) for item in found]}, *lines)


def _shape(tool: Tool) -> dict[str, Any]:
    return {
        "name": tool.name,
        "title": tool.title,
        "description": tool.description,
        "input_schema": tool.input_schema,
        "output_schema": tool.output_schema,
        "annotations": tool.annotations,
    }


async def call(
    cli: Cli,
    session: SessionArgument,
    tool: Annotated[str, typer.Argument(metavar="TOOL", help="The tool's name, as `ash tools` shows it.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Its arguments; KEY:=JSON takes JSON.")
    ] = None,
    json_arguments: Annotated[
        str | None, typer.Option("--json", metavar="JSON", help="All arguments as a JSON object; - reads it on stdin.")
    ] = None,
    output: Annotated[Output, typer.Option(help="text, or json: the tool's whole result.")] = Output.TEXT,
    limit: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="How long the call may take.")
    ] = None,
) -> None:
    """Call a tool of a sandbox and print its answer.

    The exit code is 1 when the tool says that it failed. Here --json brings the arguments, and
    --output json prints JSON.
    """
    if words and json_arguments is not None:
        raise typer.BadParameter("give the arguments either as key=value or with --json, not both")
    seconds = read_duration(limit) if limit is not None else None
    given = None
    if json_arguments is not None:
        given = read_json_arguments(sys.stdin.read() if json_arguments == "-" else json_arguments)
    as_json = output is Output.JSON
    async with cli.sandbox(session) as box:
        if given is None:
            schema = next((item.input_schema for item in await box.tools() if item.name == tool), dict[str, Any]())
            given = read_arguments(words or (), schema, tool)
            check_required(given, schema, tool)
        async with waiting(f"calling {tool}", show=not as_json) as meter:

            def show(news: Progress) -> None:
                meter.update(label=news.message, done=news.done, total=news.total)

            result = await box.call(tool, arguments=given, timeout_seconds=seconds, on_progress=show)
    if as_json:
        emit_json(result.raw)
    else:
        emit_text(_text_of(result))
    if result.is_error:
        raise typer.Exit(1)


def _text_of(result: CallResult) -> str:
    """Return the content as text, with a line in place of what is none."""
    return "\n".join(_block(block) for block in result.content)


def _block(block: Mapping[str, Any]) -> str:
    match block.get("type"):
        case "text":
            return str(block.get("text", ""))
        case "image" | "audio" as kind:
            return f"[{kind}, {block.get('mimeType', 'unknown type')}, {_size(block.get('data'))} bytes]"
        case "resource_link":
            return f"[resource {block.get('uri')}; read it with the hive's read_resource]"
        case "resource":
            inner: Any = block.get("resource") or {}
            return str(inner.get("text", f"[resource {inner.get('uri')}, {_size(inner.get('blob'))} bytes]"))
        case kind:
            return f"[{kind} content; --output json shows it]"


def _size(data: Any) -> int:
    try:
        return len(base64.b64decode(data or ""))
    except (binascii.Error, TypeError, ValueError):
        return 0
