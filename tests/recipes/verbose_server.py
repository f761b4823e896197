"""A server whose tools answer with as much as they are asked for."""

from __future__ import annotations

import base64

from fastmcp import FastMCP
from fastmcp.tools.base import ToolResult
from mcp_types import ImageContent
from pydantic import BaseModel

server: FastMCP[None] = FastMCP("verbose")


class Row(BaseModel):
    number: int
    text: str


class Rows(BaseModel):
    kind: str
    rows: list[Row]


@server.tool
def rows(count: int) -> Rows:
    return Rows(kind="rows", rows=[Row(number=number, text=f"row {number}") for number in range(count)])


@server.tool(output_schema=None)
def plain(characters: int) -> str:
    return ("é0123456789" * (characters // 11 + 1))[:characters]


@server.tool
def keys(count: int) -> dict[str, int]:
    return {f"key{number}": number for number in range(count)}


@server.tool(output_schema=None)
def picture(size: int) -> ImageContent:
    data = base64.b64encode(bytes(size)).decode()
    return ImageContent(type="image", data=data, mime_type="image/png")


@server.tool(output_schema=None)
def fail(characters: int) -> ToolResult:
    return ToolResult(content="x" * characters, is_error=True)


if __name__ == "__main__":
    server.run(show_banner=False)
